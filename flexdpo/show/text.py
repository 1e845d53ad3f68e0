"""The same for a terminal: tries as trees, the mask or its tiles, and the packing of a batch, in characters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from flexdpo.layout.row import Row
from flexdpo.show.mask_image import (
    FIRST_RESPONSE,
    kind_name,
    mask_categories,
    picture_block_size,
    row_title,
    tile_kinds,
)
from flexdpo.show.packing import BatchLayout
from flexdpo.show.trie import trie_runs

# by the numbers of kinds of tokens and of tiles
_MARKS, _TILES = " ·█▓▚", "·▒█"
_LEGEND = "█ prompt  ▓ image  0 1 ... response  ▚ shared by responses  · padding"


def overview_text(row: Row, layouts: Sequence[BatchLayout], *, width: int = 120, block_size: int | None = None) -> str:
    """Render a row and its batch's layouts, at most ``width`` characters wide.

    A longer row's mask is shown by its tiles of ``block_size`` tokens to a side, and nothing where these are too many.
    """
    parts, length = [row_title(row), _trie_text(row)], row.layout.length
    block_size = block_size or picture_block_size(length)
    if length <= width:
        parts.append(mask_text(row))
    elif -(-length // block_size) <= width:
        tiles = tile_kinds(row, block_size)
        empty, partial, full = np.bincount(tiles.flat, minlength=3)
        legend = f"tiles of {block_size} x {block_size}: █ {full} full  ▒ {partial} partial  · {empty} empty"
        parts.append("\n".join([*("".join(_TILES[kind] for kind in line) for line in tiles), "", legend]))
    return "\n\n".join([*parts, _packing_text(layouts, width)])


def _trie_text(row: Row) -> str:
    """The tries of a row as trees, one line for each run: what it is, its tokens and where they stand."""
    runs = trie_runs(row)
    children = defaultdict(list)
    for number, run in enumerate(runs):
        children[run.parent].append(number)
    lines: list[str] = []

    # documents are shallow: a trie of K responses is at most K deep
    def write(number: int, branch: str, below: str) -> None:
        run = runs[number]
        count = f"{len(run)} token{'s' * (len(run) != 1)}"
        where = f"row {run.start} to {run.stop - 1}" if len(run) > 1 else f"row {run.start}"
        lines.append(f"{branch}{kind_name(run.kind)}, {count} ({where}, from position {run.position})")
        for child in children[number]:
            last = child == children[number][-1]
            write(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))

    for root in children[-1]:
        write(root, f"document {runs[root].document}: ", "   ")
    return "\n".join(lines)


def mask_text(row: Row) -> str:
    """The mask of a small row, one line per query and one character per key."""
    return "\n".join([*(_marked(line).rstrip() for line in mask_categories(row)), "", _LEGEND])


def _marked(kinds: Iterable[int]) -> str:
    return "".join(_MARKS[kind] if kind < FIRST_RESPONSE else str((kind - FIRST_RESPONSE) % 10) for kind in kinds)


def _packing_text(layouts: Sequence[BatchLayout], width: int) -> str:
    """Layouts of one batch on one scale, a line for each sequence or row."""
    step = max(1, -(-max(lane.kinds.size for layout in layouts for lane in layout.lanes) // width))
    lines = []
    for layout in layouts:
        lines.append(layout.title())
        for kinds, _ in layout.lanes:
            # of several tokens the most frequent kind
            parts = [kinds[start : start + step] for start in range(0, kinds.size, step)]
            lines.append(_marked(int(np.bincount(part).argmax()) for part in parts))
        lines.append("")
    return "\n".join([*lines, _LEGEND + (f"  (a character is {step} tokens)" if step > 1 else "")])
