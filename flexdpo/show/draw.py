"""The picture of a row under any mask; and one of everything: its tries, its mask, and how a batch is packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch.nn.attention.flex_attention import create_mask

from flexdpo.attention.generator import mask_mod
from flexdpo.attention.mask_mods import MaskMod
from flexdpo.errors import FlexdpoError, found
from flexdpo.layout.row import Row
from flexdpo.show.mask_image import TOKENS_DRAWN_SINGLY, draw_mask_panel, row_title
from flexdpo.show.packing import BatchLayout, draw_packing_panel, packing_height
from flexdpo.show.plots import INK, new_figure, save_figure
from flexdpo.show.trie import draw_trie_panel, trie_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEWS = ("all", "trie", "mask", "packing")
_WIDTH, _MASK, _HEADING, _AXIS = 7.5, 7.1, 0.42, 0.5


def draw(
    row: Row,
    *,
    window: int | None = None,
    chunk: int | None = None,
    mask_function: MaskMod | None = None,
    title: str | None = None,
    block_size: int | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw which token of a row attends to which, query down and key across, and what a kernel makes of the tiles.

    ``window``, ``chunk`` and ``mask_function`` are those of :func:`flexdpo.mask_mod`, the last drawn for head 0. Above
    stands ``title``, by default the numbers of documents and tokens. A tile has ``block_size`` tokens to a side, by
    default 128, and fewer for a row of less than eight of them. With a ``path`` the picture is written as well, in the
    format of its ending, ``.png`` for instance. The matplotlib figure is unknown to pyplot; a notebook shows it.

    Raises:
        FlexdpoError: as :func:`flexdpo.mask_mod`; if a mask other than the row's own is to be drawn for more than 2048
            tokens; or if the picture cannot be written.
    """
    if not isinstance(row, Row):
        raise FlexdpoError(f"draw takes one flexdpo.Row, got {found(row)}")
    length, visible = row.layout.length, None
    drawn = mask_mod(row.to("cpu"), window=window, chunk=chunk, mask_function=mask_function)
    if (window, chunk, mask_function) != (None, None, None):
        if length > TOKENS_DRAWN_SINGLY:
            raise FlexdpoError(
                f"a mask other than the row's own is drawn for at most {TOKENS_DRAWN_SINGLY} tokens, got {length}; "
                "draw a shorter row"
            )
        visible = create_mask(drawn, 1, 1, length, length, device="cpu")[0, 0].numpy()
    figure = new_figure(_WIDTH, _WIDTH)
    place = figure.add_gridspec(1, 1, left=0.1, right=0.985, bottom=0.065, top=0.95)[0]
    draw_mask_panel(figure, place, row, block_size=block_size, visible=visible)
    figure.text(0.1, 0.966, row_title(row) if title is None else title, fontsize=11, color=INK)
    if path is not None:
        save_figure(figure, path)
    return figure


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
    figure = new_figure(_WIDTH, total)
    for title, height, draw_panel in shown:
        figure.text(0.1, (top - 0.27) / total, title, fontsize=11, color=INK)
        top -= _HEADING
        bottom = top - height
        place = figure.add_gridspec(1, 1, left=0.1, right=0.985, top=top / total, bottom=bottom / total)[0]
        draw_panel(figure, place)
        top = bottom - _AXIS
    return figure
