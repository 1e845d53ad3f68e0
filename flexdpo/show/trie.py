"""The trie of a row as a drawing: every run of unbranched tokens a bar, from its first logical position to its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.show.mask_image import kind_name, token_colours, token_kinds
from flexdpo.show.plots import INK, ink_on, style_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexdpo.layout.row import Row

# rows up to this many tokens deep carry their index in the row in every cell
_NUMBERED_POSITIONS = 48
_LANE_HEIGHT = 0.27


@dataclass(frozen=True)
class Run:
    """Tokens of a trie that follow each other without a branch and are of one kind."""

    start: int  # row index of the first
    stop: int  # row index past the last
    position: int  # logical position of the first
    kind: int  # see :class:`flexdpo.show.mask_image.TokenKinds`
    document: int  # its number
    parent: int  # number of the run before it, -1 at a root
    lane: float  # height at which it is drawn, counted downwards; leaves of the first document have whole numbers

    def __len__(self) -> int:
        return self.stop - self.start


def trie_runs(row: Row) -> list[Run]:
    """Cut the real tokens of a row into runs, parents before children, and place them on lanes."""
    ends = row.subtree_end[0].tolist()[: row.num_tokens]
    positions = row.position_ids[0].tolist()
    kinds, documents, _ = token_kinds(row)
    before: list[int] = []
    open_tokens: list[int] = []
    for index in range(len(ends)):
        # what ended before this token is no ancestor of it
        while open_tokens and ends[open_tokens[-1]] <= index:
            open_tokens.pop()
        before.append(open_tokens[-1] if open_tokens else -1)
        open_tokens.append(index)
    # a run goes on while each token is the only child of the one before it and looks the same
    starts = [
        index
        for index, parent in enumerate(before)
        if not (parent == index - 1 >= 0 and ends[parent] == ends[index] and kinds[parent] == kinds[index])
    ]
    stops = [*starts[1:], len(ends)]
    parents = (np.searchsorted(starts, [before[start] for start in starts], side="right") - 1).tolist()
    lanes = _lanes(parents, documents[starts].tolist())
    return [
        Run(start, stop, positions[start], int(kinds[start]), int(documents[start]), parent, lane)
        for start, stop, parent, lane in zip(starts, stops, parents, lanes, strict=True)
    ]


def _lanes(parents: Sequence[int], documents: Sequence[int]) -> list[float]:
    """Give leaves a lane each, a gap between documents, and every other run the middle of its children."""
    children: dict[int, list[int]] = {}
    for number, parent in enumerate(parents):
        children.setdefault(parent, []).append(number)
    lanes = [0.0] * len(parents)
    leaves = [number for number in range(len(parents)) if number not in children]
    for place, number in enumerate(leaves):
        lanes[number] = place + 0.6 * (documents[number] - documents[0])
    for number in reversed(range(len(parents))):
        if number in children:
            lanes[number] = (lanes[children[number][0]] + lanes[children[number][-1]]) / 2
    return lanes


def trie_height(row: Row) -> float:
    """Inches that the trie of a row takes."""
    return max(0.6, (max(run.lane for run in trie_runs(row)) + 1) * _LANE_HEIGHT)


def draw_trie_panel(figure: Any, place: Any, row: Row) -> None:
    """Draw the trie of a row, logical position across, a lane for each leaf, :func:`trie_height` inches high."""
    axes = figure.add_subplot(place)
    runs = trie_runs(row)
    colours = token_colours(token_kinds(row))
    deepest = max(run.position + len(run) for run in runs)
    parents = {run.parent for run in runs}
    for number, run in enumerate(runs):
        if run.parent >= 0:
            # joins them where they stand on different lanes
            axes.plot([run.position] * 2, [runs[run.parent].lane, run.lane], color=INK, linewidth=1.1, zorder=3)
        axes.barh(run.lane, len(run), left=run.position, height=0.62, color=colours[run.start], linewidth=0)
        centred: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": ink_on(colours[run.start])}
        if deepest <= _NUMBERED_POSITIONS:
            for offset in range(len(run)):
                x = run.position + offset
                axes.text(x + 0.5, run.lane, str(run.start + offset), fontsize=6.5, **centred)
                if offset:
                    axes.plot([x, x], [run.lane - 0.31, run.lane + 0.31], color="white", linewidth=0.7)
        elif len(run) >= deepest * 0.055:
            axes.text(run.position + len(run) / 2, run.lane, str(len(run)), fontsize=7.5, **centred)
        if number not in parents:
            end = run.position + len(run) + 0.008 * deepest
            axes.text(end, run.lane, kind_name(run.kind), va="center_baseline", fontsize=7.5, color=INK)
    for document in sorted({run.document for run in runs}):
        lanes = [run.lane for run in runs if run.document == document]
        middle = (min(lanes) + max(lanes)) / 2
        axes.text(-0.012 * deepest, middle, str(document), ha="right", va="center_baseline", fontsize=8, color=INK)
    axes.set_ylabel("document", fontsize=9, color=INK, labelpad=16)
    axes.set_xlim(0, deepest * 1.12)
    axes.set_ylim(max(run.lane for run in runs) + 0.6, -0.6)
    style_axes(axes, "logical position", lanes=True)
