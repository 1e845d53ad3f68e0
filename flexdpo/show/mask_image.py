"""Pictures of one packed row: which token attends to which, and what the kernel makes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexdpo.attention.block_masks import classify_tiles
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import TILE, Row
from flexdpo.show.plots import INK, ink_on, style_axes

# what a cell of the mask is: hidden, or the kind of the key token; response k is FIRST_RESPONSE + k
HIDDEN, PADDING, PROMPT, IMAGE, SHARED, FIRST_RESPONSE = range(6)
EMPTY, PARTIAL, FULL = range(3)  # what a tile of the BlockMask is
# longer rows are drawn as averages over squares of tokens, about this many to a side
TOKENS_DRAWN_SINGLY, SQUARES_PER_SIDE = 2048, 1024
TILES_MARKED_SINGLY, LEGEND_RESPONSES = 40, 8

_KIND_COLOURS = ("#ffffff", "#9ca3af", "#3f6fa8", "#b3423a", "#7a4fa3")
_KIND_NAMES = ("hidden", "padding (sees only itself)", "prompt", "image", "shared by responses")
_RESPONSE_COLOURS = ("#2e9e6b", "#e07b39", "#d4b02a", "#c2477f", "#47b5c4", "#8a6d3b")


class TokenKinds(NamedTuple):
    """What every token of a row is."""

    kinds: NDArray[np.int64]  # PADDING, PROMPT, IMAGE, SHARED (in several responses) or FIRST_RESPONSE + k, [S]
    documents: NDArray[np.int64]  # number of the document each token belongs to, [S]; -1 at padding


def token_kinds(row: Row) -> TokenKinds:
    """Tell prompt, image, response and padding tokens of a row apart; responses count from 0 in their document."""
    kinds, documents = np.full((2, row.layout.length), [[PADDING], [-1]], dtype=np.int64)
    for number, (start, end) in enumerate(row.documents):
        documents[start:end] = number
    kinds[: row.num_tokens] = PROMPT
    if row.layout.images is not None:
        kinds[row.layout.images.features[0].numpy() >= 0] = IMAGE
    listed, responses_seen = np.zeros_like(kinds), [0] * len(row.documents)
    for path in row.response_paths:
        if path.size:  # a sequence of one token has no target
            document = documents[path[0]]
            kinds[path] = FIRST_RESPONSE + responses_seen[document]
            responses_seen[document] += 1
            listed[path] += 1
    kinds[listed > 1] = SHARED
    return TokenKinds(kinds, documents)


def mask_categories(row: Row) -> NDArray[np.int64]:
    """The mask of a row, ``[S, S]``, query down: the kind of the key, or ``HIDDEN`` where the query may not attend."""
    key = np.arange(row.layout.length)
    query = key[:, None]
    visible = (key <= query) & (query < row.subtree_end[0].cpu().numpy())
    return np.where(visible, token_kinds(row).kinds, HIDDEN)


def tile_kinds(row: Row, block_size: int, visible: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """The tiles of a row's mask, or of another ``[S, S]`` one, as a kernel sees them, ``[N, N]``, query tiles down.

    ``EMPTY`` ones are skipped, ``PARTIAL`` ones masked cell by cell, ``FULL`` ones run without a mask. The last of a
    row that is no multiple of ``block_size`` reach past its end, where nothing is visible.
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


def picture_block_size(length: int) -> int:
    """The side of a tile to draw: the kernel's 128, or, for rows that have too few of them, about an eighth of it."""
    return min(max(2, (1 << (length // 8).bit_length()) // 2), TILE)


def draw_mask_panel(
    figure: Any, place: Any, row: Row, *, block_size: int | None = None, visible: NDArray[np.bool_] | None = None
) -> None:
    """Draw the mask of a row, or another ``[S, S]`` one, into a square ``SubplotSpec``, query down and key across.

    A cell is coloured where the query may attend to the key, by what the key is. Documents alternate in tint and are
    framed. The strips above and to the right say what each token is and plot its logical position. A row of at least
    two tiles also shows what a kernel makes of them; they are of :func:`picture_block_size` where no size is given.
    """
    tokens = token_kinds(row)
    colours, length = token_colours(tokens), row.layout.length
    block_size = picture_block_size(length) if block_size is None else block_size
    tiles = tile_kinds(row, block_size, visible) if length >= 2 * block_size else None
    grid = place.subgridspec(
        3, 3, width_ratios=(1, 0.024, 0.075), height_ratios=(0.075, 0.024, 1), wspace=0.02, hspace=0.02
    )
    axes = figure.add_subplot(grid[2, 0])
    step = 1 if length <= TOKENS_DRAWN_SINGLY or visible is not None else -(-length // SQUARES_PER_SIDE)
    if step == 1:
        hidden = (mask_categories(row) == HIDDEN if visible is None else ~visible)[:, :, None]
        image = np.where(hidden, np.float32(1), colours[None])
    else:
        image = averaged_cells(row, colours, step)
    reach = len(image) * step
    axes.imshow(image, extent=(0, reach, reach, 0), aspect="auto", interpolation="nearest" if length <= 300 else None)
    if length <= 64:
        for lines in (axes.hlines, axes.vlines):
            # below the marks of the tiles
            lines(np.arange(1, length), 0, length, color="white", linewidth=0.7, zorder=0.5)
    axes.set(xlim=(0, length), ylim=(length, 0))
    axes.set_ylabel("query token (index in the row)", fontsize=9, color=INK)
    style_axes(axes, "key token (index in the row)")
    if tiles is not None:
        _draw_tiles(axes, tiles, block_size)
    for start, end in row.documents:
        # inside the frame lies all that a query may see
        axes.plot([start, end, end, start, start], [start, start, end, end, start], color=INK, linewidth=0.8)
    _draw_legend(axes, tokens, tiles, block_size)
    for share, *places in (("sharex", grid[1, 0], grid[0, 0]), ("sharey", grid[2, 1], grid[2, 2])):
        strip, heights = (figure.add_subplot(each, **{share: axes}) for each in places)
        _draw_margin(strip, heights, row, colours, across=share == "sharex")
    corner = figure.add_subplot(grid[0, 2])
    corner.text(1, 1, "logical\nposition", fontsize=7.5, color=INK, ha="right", va="top")
    corner.set_axis_off()


def kind_name(kind: int) -> str:
    """A kind of token in words."""
    return _KIND_NAMES[kind] if kind < FIRST_RESPONSE else f"response {kind - FIRST_RESPONSE}"


def token_colours(tokens: TokenKinds, last: int | None = None) -> NDArray[np.float32]:
    """The colour of every token, ``[S, 3]`` in 0 to 1, among kinds up to ``last``; every second document is paler."""
    colours = _palette(int(tokens.kinds.max()) if last is None else last)[tokens.kinds]
    odd = (tokens.documents >= 0) & (tokens.documents % 2 == 1)
    colours[odd] += 0.38 * (1 - colours[odd])
    return colours.astype(np.float32)


def _palette(last: int) -> NDArray[np.float64]:
    """The colour of every kind of token up to the ``last`` at least, ``[K, 3]``."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    responses: Any = _RESPONSE_COLOURS
    if (count := last + 1 - FIRST_RESPONSE) > len(responses):
        responses = colormaps["turbo"](np.linspace(0.3, 0.95, count))
    return np.array([to_rgb(colour) for colour in (*_KIND_COLOURS, *responses)])


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


def _draw_tiles(axes: Any, tiles: NDArray[np.int64], block_size: int) -> None:
    """Shade the tiles that are skipped, outline the others, and put a dot into those that need no mask."""
    if len(tiles) > TILES_MARKED_SINGLY:
        return  # the marks would hide the mask; the legend still counts them
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    def outlines(which: NDArray[np.bool_], **look: Any) -> None:
        boxes = [Rectangle((j, i), block_size, block_size) for i, j in np.argwhere(which) * block_size]
        axes.add_collection(PatchCollection(boxes, **look))

    outlines(tiles == EMPTY, facecolor="#eceff3", edgecolor="white", linewidth=0.6)
    outlines(tiles != EMPTY, facecolor="none", edgecolor=INK, linewidth=0.5, alpha=0.55)
    i, j = np.nonzero(tiles == FULL)
    axes.plot((j + 0.5) * block_size, (i + 0.5) * block_size, "o", color="white", markersize=4,
              markeredgecolor=INK, markeredgewidth=0.6)  # fmt: skip


def _draw_margin(strip: Any, heights: Any, row: Row, colours: NDArray[np.float32], *, across: bool) -> None:
    """Draw a coloured cell per token, with its logical position in up to 48 of them, and beside it plot the positions.

    They step back to the prompt's end where a response begins.
    """
    length, positions = len(colours), row.position_ids[0].cpu().numpy()
    image, extent = (colours[None], (0, length, 1, 0)) if across else (colours[:, None], (0, 1, length, 0))
    strip.imshow(image, extent=extent, aspect="auto", interpolation="nearest")
    for index, position in enumerate(positions if length <= 48 else ()):
        place = (index + 0.5, 0.5) if across else (0.5, index + 0.5)
        ink = ink_on(colours[index])
        strip.text(*place, str(position), ha="center", va="center_baseline", fontsize=6.5, color=ink)
    strip.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    heights.tick_params(bottom=not across, left=across, labelbottom=not across, labelleft=across)
    heights.tick_params(labelsize=7, length=2, colors=INK)
    for axes in (strip, heights):
        axes.spines[:].set_visible(False)
    orientation, highest = "vertical" if across else "horizontal", max(int(positions.max()), 1)
    heights.stairs(positions, orientation=orientation, fill=True, facecolor="#d5dae1", edgecolor="none")
    if across:
        heights.set(ylim=(0, highest * 1.05), yticks=[highest])
    else:
        heights.set(xlim=(0, highest * 1.05))
        heights.set_xticks([highest], [str(highest)], ha="right")


def _draw_legend(axes: Any, tokens: TokenKinds, tiles: NDArray[np.int64] | None, block_size: int) -> None:
    """Put the legend into the upper triangle, where a causal mask never shows anything."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    last = int(tokens.kinds.max())
    palette, many = _palette(last), last - FIRST_RESPONSE >= LEGEND_RESPONSES
    entries: list[Any] = [
        Patch(color=palette[kind], label=("... to " if many and kind == last else "") + kind_name(kind))
        for kind in sorted(set(tokens.kinds.tolist()), key=lambda kind: (kind == PADDING, kind))
        if not many or kind <= FIRST_RESPONSE or kind == last  # of many responses the two outermost
    ]
    if tiles is not None:
        for kind, what, mark in (
            (EMPTY, f"empty tiles ({block_size} x {block_size}), skipped", Patch(fc="#eceff3", ec="#cbd2da")),
            (PARTIAL, "partial tiles, masked", Patch(fc="none", ec=INK, linewidth=0.6)),
            (FULL, "full tiles, no mask needed", Line2D([], [], marker="o", linestyle="", color="white", mec=INK)),
        ):
            entries.append(mark if len(tiles) <= TILES_MARKED_SINGLY else Line2D([], [], linestyle=""))
            entries[-1].set_label(f"{(tiles == kind).sum():,} {what}")
    axes.legend(
        handles=entries,
        title="query attends to key; the key is", alignment="left", borderpad=0.8, loc="upper right",
        fontsize=8.5, title_fontsize=8.5, framealpha=1.0, edgecolor="#cbd2da",
    ).set_zorder(5)  # fmt: skip


def row_title(row: Row) -> str:
    """What a row holds, in numbers."""
    number, padding = len(row.documents), row.layout.length - row.num_tokens
    documents = f"{number} document{'s' * (number != 1)}"
    tokens = f"{row.num_tokens:,} tokens run instead of {row.unshared_tokens:,}"
    return f"One packed row: {documents}, {tokens}" + (f", {padding:,} padding" if padding else "")
