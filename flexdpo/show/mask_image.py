"""Pictures of one packed row: which token attends to which, and what the kernel makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flexdpo.attention.block_masks import classify_tiles
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.errors import FlexdpoError
from flexdpo.show.plots import INK, ink_on, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from flexdpo.layout.row import Row

# what a cell of the mask is: hidden, or the kind of the key token; response k is FIRST_RESPONSE + k
HIDDEN, PADDING, PROMPT, IMAGE, SHARED, FIRST_RESPONSE = range(6)
# what a tile of the BlockMask is
EMPTY, PARTIAL, FULL = range(3)

# longer rows are drawn as averages over squares of tokens, about this many to a side
TOKENS_DRAWN_SINGLY = 2048
SQUARES_PER_SIDE = 1024
TILES_MARKED_SINGLY = 40
LEGEND_RESPONSES = 8

_KIND_COLOURS = {PADDING: "#9ca3af", PROMPT: "#3f6fa8", IMAGE: "#b3423a", SHARED: "#7a4fa3"}
_KIND_NAMES = {
    PADDING: "padding (sees only itself)",
    PROMPT: "prompt",
    IMAGE: "image",
    SHARED: "shared by responses",
}
_RESPONSE_COLOURS = ("#2e9e6b", "#e07b39", "#d4b02a", "#c2477f", "#47b5c4", "#8a6d3b")


class TokenKinds(NamedTuple):
    """What every token of a row is."""

    # PADDING, PROMPT, IMAGE (of a prompt), SHARED (in several responses) or FIRST_RESPONSE + k, [S]
    kinds: NDArray[np.int64]
    documents: NDArray[np.int64]  # number of the document each token belongs to, [S]; -1 at padding
    num_responses: int  # the largest number of responses in one document


def token_kinds(row: Row) -> TokenKinds:
    """Tell prompt, image, response and padding tokens of a row apart.

    A token that lies in no response is a prompt token; one that lies in several belongs to the beginning that
    these responses share. Responses count from 0 within their document.
    """
    length = row.layout.length
    documents = np.full(length, -1, dtype=np.int64)
    for number, (start, end) in enumerate(row.documents):
        documents[start:end] = number
    kinds = np.full(length, PADDING, dtype=np.int64)
    kinds[: row.num_tokens] = PROMPT
    if row.layout.images is not None:
        kinds[row.layout.images.features[0].numpy() >= 0] = IMAGE
    listed = np.zeros(length, dtype=np.int64)
    responses_seen = [0] * len(row.documents)
    for path in row.response_paths:
        if not path.size:
            continue  # a sequence of one token has no target
        document = int(documents[path[0]])
        kinds[path] = FIRST_RESPONSE + responses_seen[document]
        responses_seen[document] += 1
        listed[path] += 1
    kinds[listed > 1] = SHARED
    return TokenKinds(kinds, documents, max(responses_seen, default=0))


def mask_categories(row: Row) -> NDArray[np.int64]:
    """Evaluate the mask of a row densely from its definition, ``[S, S]`` int64, query down, key across.

    ``HIDDEN`` where the query may not attend to the key, otherwise the key's kind as in `TokenKinds`.
    """
    key = np.arange(row.layout.length)
    query = key[:, None]
    visible = (key <= query) & (query < row.subtree_end[0].cpu().numpy())
    return np.where(visible, token_kinds(row).kinds, HIDDEN)


def tile_kinds(row: Row, block_size: int = 128, visible: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Classify the tiles of a row's mask, or of another ``[S, S]`` one, as a block-sparse kernel sees them.

    Empty tiles are skipped, partial ones masked cell by cell, full ones run without a mask. The tiles of a
    row that is no multiple of ``block_size`` reach past its end, where nothing is visible.

    Returns:
        ``[N, N]`` int64, ``N = ceil(S / block_size)``, query tiles down, key tiles across.

    Raises:
        FlexdpoError: if ``block_size`` is not positive.
    """
    if block_size < 1:
        raise FlexdpoError(f"block_size must be at least 1 token, got {block_size}")
    if visible is None:
        non_empty, full = (tiles[0].cpu().numpy() for tiles in classify_tiles(row.layout, CAUSAL, block_size))
    else:
        starts = np.arange(0, len(visible), block_size)
        counts = np.add.reduceat(np.add.reduceat(visible, starts, axis=0, dtype=np.int64), starts, axis=1)
        non_empty, full = counts > 0, counts == block_size * block_size
    return np.where(full, FULL, np.where(non_empty, PARTIAL, EMPTY))


def draw_mask_panel(
    figure: Figure, place: Any, row: Row, *, block_size: int = 128, visible: NDArray[np.bool_] | None = None
) -> None:
    """Draw the mask of a row, or another ``[S, S]`` one, into a square ``SubplotSpec``, query down and key across.

    A cell is coloured where the query may attend to the key, by what the key is: prompt, response k, a
    beginning that responses share, padding. Documents alternate in tint and are framed. The strips above and
    to the right say what each token is and plot its logical position. A row of at least two tiles also shows
    the tiles that a block-sparse kernel skips, masks cell by cell, or runs unmasked. Above 2048 tokens the picture is
    averaged over squares of tokens, so that memory stays small.
    """
    tokens = token_kinds(row)
    colours = token_colours(tokens)
    tiles = tile_kinds(row, block_size, visible) if row.layout.length >= 2 * block_size else None
    grid = place.subgridspec(
        3, 3, width_ratios=(1, 0.024, 0.075), height_ratios=(0.075, 0.024, 1), wspace=0.02, hspace=0.02
    )
    axes = figure.add_subplot(grid[2, 0])
    _draw_cells(axes, row, colours, visible)
    if tiles is not None:
        _draw_tiles(axes, tiles, block_size)
    for start, end in row.documents:
        # inside the frame lies all that a query may see
        axes.plot([start, end, end, start, start], [start, start, end, end, start], color=INK, linewidth=0.8)
    _draw_legend(axes, tokens, tiles, block_size)
    _draw_strip(figure.add_subplot(grid[1, 0], sharex=axes), row, colours, along="key")
    _draw_strip(figure.add_subplot(grid[2, 1], sharey=axes), row, colours, along="query")
    _draw_positions(figure.add_subplot(grid[0, 0], sharex=axes), row, along="key")
    _draw_positions(figure.add_subplot(grid[2, 2], sharey=axes), row, along="query")
    corner = figure.add_subplot(grid[0, 2])
    corner.text(1, 1, "logical\nposition", fontsize=7.5, color=INK, ha="right", va="top")
    corner.set_axis_off()


def kind_name(kind: int) -> str:
    """A kind of token in words."""
    return _KIND_NAMES.get(kind, f"response {kind - FIRST_RESPONSE}")


def token_colours(tokens: TokenKinds) -> NDArray[np.float32]:
    """Give every token its colour, ``[S, 3]`` in 0 to 1; every second document is paler."""
    from matplotlib.colors import to_rgb

    palette = np.ones((FIRST_RESPONSE + tokens.num_responses, 3))
    for kind in range(PADDING, len(palette)):
        palette[kind] = to_rgb(kind_colour(kind, tokens.num_responses))
    colours = palette[tokens.kinds]
    odd = (tokens.documents >= 0) & (tokens.documents % 2 == 1)
    colours[odd] += 0.38 * (1 - colours[odd])
    return colours.astype(np.float32)


def kind_colour(kind: int, num_responses: int) -> Any:
    """The colour of a kind of token, among ``num_responses`` responses."""
    if kind < FIRST_RESPONSE:
        return _KIND_COLOURS[kind]
    response = kind - FIRST_RESPONSE
    if num_responses <= len(_RESPONSE_COLOURS):
        return _RESPONSE_COLOURS[response]
    from matplotlib import colormaps

    return colormaps["turbo"](0.3 + 0.65 * response / (num_responses - 1))


def averaged_cells(row: Row, colours: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Average the picture over squares of ``step x step`` cells without ever holding all ``S x S`` cells."""
    length, subtree_end = row.layout.length, row.subtree_end[0].cpu().numpy()
    starts = np.arange(0, length, step)
    widths = np.minimum(starts + step, length) - starts
    image = np.empty((starts.size, starts.size, 3), dtype=np.float32)
    for band, start in enumerate(starts.tolist()):
        # how many queries of the band may attend to each key
        visible = np.maximum(np.minimum(subtree_end, start + step) - np.maximum(np.arange(length), start), 0)
        painted = 1 - (visible[:, None] / widths[band]) * (1 - colours)  # white where hidden
        image[band] = np.add.reduceat(painted, starts) / widths[:, None]
    return image


def _draw_cells(axes: Any, row: Row, colours: NDArray[np.float32], visible: NDArray[np.bool_] | None) -> None:
    length = row.layout.length
    step = 1 if length <= TOKENS_DRAWN_SINGLY or visible is not None else -(-length // SQUARES_PER_SIDE)
    if step == 1:
        hidden = (mask_categories(row) == HIDDEN if visible is None else ~visible)[:, :, None]
        image = np.where(hidden, np.float32(1), colours[None])
    else:
        image = averaged_cells(row, colours, step)
    reach = len(image) * step
    axes.imshow(image, extent=(0, reach, reach, 0), aspect="auto", interpolation="nearest" if length <= 300 else None)
    if length <= 64:
        # below the marks of the tiles
        axes.hlines(np.arange(1, length), 0, length, color="white", linewidth=0.7, zorder=0.5)
        axes.vlines(np.arange(1, length), 0, length, color="white", linewidth=0.7, zorder=0.5)
    axes.set_xlim(0, length)
    axes.set_ylim(length, 0)
    axes.set_ylabel("query token (index in the row)", fontsize=9, color=INK)
    style_axes(axes, "key token (index in the row)")


def _draw_tiles(axes: Any, tiles: NDArray[np.int64], block_size: int) -> None:
    """Shade the tiles that are skipped, outline the others, and put a dot into those that need no mask."""
    if len(tiles) > TILES_MARKED_SINGLY:
        return  # the marks would hide the mask; the legend still counts them
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    def boxes(kind: int) -> list[Any]:
        return [
            Rectangle((j * block_size, i * block_size), block_size, block_size) for i, j in np.argwhere(tiles == kind)
        ]

    axes.add_collection(PatchCollection(boxes(EMPTY), facecolor="#eceff3", edgecolor="white", linewidth=0.6))
    for kind in (PARTIAL, FULL):
        axes.add_collection(PatchCollection(boxes(kind), facecolor="none", edgecolor=INK, linewidth=0.5, alpha=0.55))
    i, j = np.nonzero(tiles == FULL)
    axes.plot((j + 0.5) * block_size, (i + 0.5) * block_size, "o", color="white", markersize=4,
              markeredgecolor=INK, markeredgewidth=0.6)  # fmt: skip


def _draw_strip(axes: Any, row: Row, colours: NDArray[np.float32], along: str) -> None:
    """Draw one coloured cell per token; rows of up to 48 tokens carry the logical position in each."""
    length = len(colours)
    image, extent = (colours[None], (0, length, 1, 0)) if along == "key" else (colours[:, None], (0, 1, length, 0))
    axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest")
    if length <= 48:
        for index, position in enumerate(row.position_ids[0].tolist()):
            x, y = (index + 0.5, 0.5) if along == "key" else (0.5, index + 0.5)
            ink = ink_on(colours[index])
            axes.text(x, y, str(position), ha="center", va="center_baseline", fontsize=6.5, color=ink)
    axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)


def _draw_positions(axes: Any, row: Row, along: str) -> None:
    """Plot the logical position of every token; it steps back to the prompt's end where a response begins."""
    positions = row.position_ids[0].cpu().numpy()
    edges = np.arange(positions.size + 1)
    highest = max(int(positions.max()), 1)
    axes.stairs(
        positions, edges, orientation="vertical" if along == "key" else "horizontal",
        fill=True, facecolor="#d5dae1", edgecolor="none",
    )  # fmt: skip
    axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False, labelsize=7, colors=INK)
    axes.spines[:].set_visible(False)
    if along == "key":
        axes.set_ylim(0, highest * 1.05)
        axes.set_yticks([highest])
        axes.tick_params(left=True, labelleft=True, length=2)
    else:
        axes.set_xlim(0, highest * 1.05)
        axes.set_xticks([highest], [str(highest)], ha="right")
        axes.tick_params(bottom=True, labelbottom=True, length=2)


def _draw_legend(axes: Any, tokens: TokenKinds, tiles: NDArray[np.int64] | None, block_size: int) -> None:
    """Put the legend into the upper triangle, where a causal mask never shows anything."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    last = FIRST_RESPONSE + tokens.num_responses - 1
    present = sorted(set(tokens.kinds.tolist()), key=lambda kind: (kind == PADDING, kind))
    names = {kind: kind_name(kind) for kind in present}
    if tokens.num_responses > LEGEND_RESPONSES:
        # of many responses the two outermost
        names = {kind: name for kind, name in names.items() if kind <= FIRST_RESPONSE or kind == last}
        names[last] = f"... to {names[last]}"
    count = tokens.num_responses
    entries: list[Any] = [Patch(color=kind_colour(kind, count), label=name) for kind, name in names.items()]
    if tiles is not None:
        empty, partial, full = (f"{(tiles == kind).sum():,}" for kind in (EMPTY, PARTIAL, FULL))
        marks: dict[str, Any] = {
            f"{empty} empty tiles ({block_size} x {block_size}), skipped": Patch(fc="#eceff3", ec="#cbd2da"),
            f"{partial} partial tiles, masked": Patch(fc="none", ec=INK, linewidth=0.6),
            f"{full} full tiles, no mask needed": Line2D([], [], marker="o", linestyle="", color="white", mec=INK),
        }
        for label, mark in marks.items():
            entries.append(mark if len(tiles) <= TILES_MARKED_SINGLY else Line2D([], [], linestyle=""))
            entries[-1].set_label(label)
    legend = axes.legend(
        handles=entries,
        title="query attends to key; the key is", alignment="left", borderpad=0.8, loc="upper right",
        fontsize=8.5, title_fontsize=8.5, framealpha=1.0, edgecolor="#cbd2da",
    )  # fmt: skip
    legend.set_zorder(5)


def row_title(row: Row) -> str:
    """What a row holds, in numbers."""
    number, padding = len(row.documents), row.subtree_end.shape[-1] - row.num_tokens
    documents = f"{number} document" + ("s" if number != 1 else "")
    tokens = f"{row.num_tokens:,} tokens run instead of {row.unshared_tokens:,}"
    return f"One packed row: {documents}, {tokens}" + (f", {padding:,} padding" if padding else "")
