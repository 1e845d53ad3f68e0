"""One picture of everything: a row's tries, its mask with the tiles of the kernel, and how a batch is packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from flexdpo.layout.row import Row
from flexdpo.show.mask_image import draw_mask_panel, row_title
from flexdpo.show.packing import BatchLayout, draw_packing_panel, packing_height
from flexdpo.show.plots import INK, new_figure
from flexdpo.show.trie import draw_trie_panel, trie_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEWS = ("all", "trie", "mask", "packing")
_WIDTH, _MASK, _HEADING, _AXIS = 7.5, 7.1, 0.42, 0.5


def overview_figure(
    row: Row, layouts: Sequence[BatchLayout], *, view: str = "all", block_size: int | None = None
) -> Figure:
    """Draw a row and its batch's layouts, or one of :data:`VIEWS`; tiles are those of :func:`flexdpo.draw`."""
    batch = "A batch, laid out three ways (area is work)"
    panels = {
        "trie": ("The tries of the row", trie_height(row), partial(draw_trie_panel, row=row)),
        "mask": (row_title(row), _MASK, partial(draw_mask_panel, row=row, block_size=block_size)),
        "packing": (batch, packing_height(layouts), partial(draw_packing_panel, layouts=layouts)),
    }
    shown = [panel for name, panel in panels.items() if view in ("all", name)]
    top = total = sum(height + _HEADING + _AXIS for _, height, _ in shown)
    figure = new_figure(_WIDTH, total, dpi=160)
    for title, height, draw in shown:
        figure.text(0.1, (top - 0.27) / total, title, fontsize=11, color=INK)
        top -= _HEADING
        bottom = top - height
        place = figure.add_gridspec(1, 1, left=0.1, right=0.985, top=top / total, bottom=bottom / total)[0]
        draw(figure, place)
        top = bottom - _AXIS
    return figure
