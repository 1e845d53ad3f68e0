"""One picture of everything: a row's tries, its mask with the tiles of the kernel, and how a batch is packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.layout.packing import pack
from flexdpo.show.mask_image import INK, draw_mask_panel, row_title
from flexdpo.show.packing import PACKING_TITLE, batch_layouts, draw_packing_panel, packing_height
from flexdpo.show.plots import new_figure, save_figure
from flexdpo.show.trie import draw_trie_panel, trie_height

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row

VIEWS = ("all", "trie", "mask", "packing")
_WIDTH, _MASK, _HEADING, _AXIS = 7.5, 7.1, 0.42, 0.5


def first_row(
    groups: Sequence[Group],
    max_tokens_per_row: int | None = None,
    *,
    sharing: str = "group",
    pad_to_multiple_of: int = 1,
) -> Row:
    """The row to draw: the first that the groups are packed into."""
    return pack(groups, max_tokens_per_row, pad_to_multiple_of=pad_to_multiple_of, sharing=sharing)[0]


def picture_block_size(length: int) -> int:
    """The side of a tile to draw: the kernel's 128, or, for rows that have too few of them, about an eighth of it."""
    if length >= 8 * 128:
        return 128
    return max(2, 1 << max(0, (length // 8).bit_length() - 1))


def draw_overview(
    groups: Sequence[Group],
    path: str | Path,
    *,
    view: str = "all",
    max_tokens_per_row: int | None = None,
    sharing: str = "group",
    pad_to_multiple_of: int = 1,
    block_size: int | None = None,
) -> Path:
    """Draw groups into a file, 1200 pixels wide.

    Args:
        groups: A batch; the tries and the mask are those of its first row.
        path: The picture to write; the ending chooses the format, ``.png`` or ``.pdf`` for instance.
        view: ``"trie"``, ``"mask"``, ``"packing"`` or ``"all"``.
        max_tokens_per_row: Longest row; by default all groups stand in the row that is drawn, and the batch is packed
            into rows of a quarter of its tokens.
        sharing: ``"group"`` or ``"step"``.
        pad_to_multiple_of: The row is padded to a multiple of this many tokens.
        block_size: Tokens to a side of a tile; by default 128, and smaller for a row of less than eight of them.

    Raises:
        FlexdpoError: if a group does not fit, a setting is unknown, or the picture cannot be written.
    """
    return save_figure(
        overview_figure(
            groups,
            view=view,
            max_tokens_per_row=max_tokens_per_row,
            sharing=sharing,
            pad_to_multiple_of=pad_to_multiple_of,
            block_size=block_size,
        ),
        path,
    )


def overview_figure(
    groups: Sequence[Group],
    *,
    view: str = "all",
    max_tokens_per_row: int | None = None,
    sharing: str = "group",
    pad_to_multiple_of: int = 1,
    block_size: int | None = None,
) -> Figure:
    """The figure of :func:`draw_overview`; the axes of the mask come first where there are any."""
    if view not in VIEWS:
        raise FlexdpoError(f"--view {view!r} is unknown{nearest(view, VIEWS)}; views: {', '.join(VIEWS)}")
    row = first_row(groups, max_tokens_per_row, sharing=sharing, pad_to_multiple_of=pad_to_multiple_of)
    layouts = batch_layouts(groups, max_tokens_per_row, sharing=sharing)
    heights = {"trie": trie_height(row), "mask": _MASK, "packing": packing_height(layouts)}
    shown = [name for name in heights if view in ("all", name)]
    total = sum(heights[name] + _HEADING + _AXIS for name in shown)
    figure = new_figure(_WIDTH, total, dpi=160)
    titles = {"trie": "The tries of the row", "mask": row_title(row), "packing": PACKING_TITLE}
    top = total
    boxes = {}
    for name in shown:
        figure.text(0.1, (top - 0.27) / total, titles[name], fontsize=11, color=INK)
        below = top - _HEADING
        boxes[name] = figure.add_gridspec(
            1, 1, left=0.1, right=0.985, top=below / total, bottom=(below - heights[name]) / total
        )[0]
        top = below - heights[name] - _AXIS
    if "mask" in boxes:
        size = row.subtree_end.shape[-1]
        draw_mask_panel(figure, boxes["mask"], row, block_size=block_size or picture_block_size(size))
    if "trie" in boxes:
        draw_trie_panel(figure, boxes["trie"], row)
    if "packing" in boxes:
        draw_packing_panel(figure, boxes["packing"], layouts)
    return figure
