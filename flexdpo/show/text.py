"""The same for a terminal: tries as trees, the mask or its tiles, and the packing of a batch, in characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flexdpo.show.mask_image import (
    EMPTY,
    FIRST_RESPONSE,
    FULL,
    PADDING,
    PARTIAL,
    PROMPT,
    SHARED,
    render_row_text,
    row_title,
    tile_kinds,
)
from flexdpo.show.trie import Run, trie_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexdpo.layout.row import Row
    from flexdpo.show.packing import BatchLayout, Lane

_MARKS = {PROMPT: "█", SHARED: "▚", PADDING: "·"}
_TILES = {EMPTY: "·", PARTIAL: "▒", FULL: "█"}


def overview_text(row: Row, layouts: Sequence[BatchLayout], *, width: int = 120, block_size: int = 128) -> str:
    """Render a row and a batch, at most ``width`` characters wide.

    Args:
        row: A packed row.
        layouts: What :func:`flexdpo.show.packing.batch_layouts` gives.
        width: Characters of a line; a longer row's mask is shown by its tiles, and nothing where these are too many.
        block_size: Tokens to a side of a tile.
    """
    parts = [row_title(row), trie_text(row)]
    length = int(row.subtree_end.shape[-1])
    if length <= width:
        parts.append(render_row_text(row, width))
    elif -(-length // block_size) <= width:
        parts.append(tiles_text(row, block_size))
    return "\n\n".join([*parts, packing_text(layouts, width)])


def trie_text(row: Row) -> str:
    """The tries of a row as trees, one line for each run: what it is, its tokens and where they stand."""
    runs = trie_runs(row)
    children: dict[int, list[int]] = {}
    for number, run in enumerate(runs):
        children.setdefault(run.parent, []).append(number)
    lines: list[str] = []

    # documents are shallow: a trie of K responses is at most K deep
    def write(number: int, indent: str, branch: str, below: str) -> None:
        lines.append(f"{indent}{branch}{_described(runs[number])}")
        inner = children.get(number, [])
        for child in inner:
            last = child == inner[-1]
            write(child, indent + below, "└─ " if last else "├─ ", "   " if last else "│  ")

    for root in children.get(-1, []):
        write(root, "", f"document {runs[root].document}: ", "   ")
    return "\n".join(lines)


def _described(run: Run) -> str:
    name = {PROMPT: "prompt", SHARED: "shared by responses"}.get(run.kind, f"response {run.kind - FIRST_RESPONSE}")
    count = f"{len(run)} token{'s' * (len(run) != 1)}"
    where = f"row {run.start} to {run.stop - 1}" if len(run) > 1 else f"row {run.start}"
    return f"{name}, {count} ({where}, from position {run.position})"


def tiles_text(row: Row, block_size: int = 128) -> str:
    """The tiles of a row's mask, one character each, queries down."""
    tiles = tile_kinds(row.subtree_end[0].cpu().numpy(), block_size)
    lines = ["".join(_TILES[kind] for kind in line) for line in tiles.tolist()]
    counts = [int((tiles == kind).sum()) for kind in (FULL, PARTIAL, EMPTY)]
    legend = f"tiles of {block_size} x {block_size}: █ {counts[0]} full  ▒ {counts[1]} partial  · {counts[2]} empty"
    return "\n".join([*lines, "", legend])


def packing_text(layouts: Sequence[BatchLayout], width: int = 120) -> str:
    """Layouts of one batch on one scale, a line for each sequence or row."""
    longest = max(len(lane) for layout in layouts for lane in layout.lanes)
    step = max(1, -(-longest // width))
    lines = []
    for layout in layouts:
        lines.append(layout.title())
        lines += [_lane_text(lane, step) for lane in layout.lanes]
        lines.append("")
    scale = f"  (a character is {step} tokens)" if step > 1 else ""
    return "\n".join([*lines, f"█ prompt  0 1 ... response  ▚ shared by responses  · padding{scale}"])


def _lane_text(lane: Lane, step: int) -> str:
    """Every ``step`` tokens as the mark of the most frequent kind among them."""
    kinds = lane.tokens.kinds
    chosen = [int(np.bincount(kinds[start : start + step]).argmax()) for start in range(0, kinds.size, step)]
    return "".join(_MARKS.get(kind, str((kind - FIRST_RESPONSE) % 10)) for kind in chosen)
