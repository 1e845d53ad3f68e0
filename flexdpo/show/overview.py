"""One picture of everything: a row's tries, its mask with the tiles of the kernel, and how a batch is packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.show.mask_image import draw_mask_panel, row_title
from flexdpo.show.packing import PACKING_TITLE, draw_packing_panel, packing_height
from flexdpo.show.plots import INK, new_figure, save_figure
from flexdpo.show.trie import draw_trie_panel, trie_height

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from flexdpo.layout.row import Row
    from flexdpo.show.packing import BatchLayout

VIEWS = ("all", "trie", "mask", "packing")
_WIDTH, _MASK, _HEADING, _AXIS = 7.5, 7.1, 0.42, 0.5


def picture_block_size(length: int) -> int:
    """The side of a tile to draw: the kernel's 128, or, for rows that have too few of them, about an eighth of it."""
    if length >= 8 * 128:
        return 128
    return max(2, 1 << max(0, (length // 8).bit_length() - 1))


def draw_overview(
    row: Row, layouts: Sequence[BatchLayout], path: str | Path, *, view: str = "all", block_size: int | None = None
) -> Path:
    """Draw a row and the batch it comes from into a file, 1200 pixels wide; see :func:`overview_figure`.

    The ending of ``path`` chooses the format, ``.png`` or ``.pdf`` for instance.
    """
    return save_figure(overview_figure(row, layouts, view=view, block_size=block_size), path)


def overview_figure(
    row: Row, layouts: Sequence[BatchLayout], *, view: str = "all", block_size: int | None = None
) -> Figure:
    """Draw a row and its batch's layouts, or one view of :data:`VIEWS`; the axes of the mask come first.

    A tile has ``block_size`` tokens to a side, by default 128, and fewer for a row of less than eight tiles.
    """
    if view not in VIEWS:
        raise FlexdpoError(f"--view {view!r} is unknown{nearest(view, VIEWS)}; views: {', '.join(VIEWS)}")
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
        top = below - heights[name]
        boxes[name] = figure.add_gridspec(1, 1, left=0.1, right=0.985, top=below / total, bottom=top / total)[0]
        top -= _AXIS
    if "mask" in boxes:
        size = block_size or picture_block_size(row.layout.length)
        draw_mask_panel(figure, boxes["mask"], row, block_size=size)
    if "trie" in boxes:
        draw_trie_panel(figure, boxes["trie"], row)
    if "packing" in boxes:
        draw_packing_panel(figure, boxes["packing"], layouts)
    return figure
