"""The trie of a row as a drawing: every run of unbranched tokens a bar, from its first logical position to its last."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexdpo.layout.row import Row
from flexdpo.layout.segments import Segments
from flexdpo.show.mask_image import kind_name, token_colours, token_kinds
from flexdpo.show.plots import INK, ink_on, style_axes

# rows up to this many tokens deep carry their index in the row in every cell
_NUMBERED_POSITIONS = 48
_LANE_HEIGHT = 0.27


@dataclass(frozen=True)
class Run:
    """Tokens of a trie that follow each other without a branch and are of one kind."""

    start: int  # row index of the first
    stop: int  # row index past the last
    position: int  # logical position of the first
    kind: int  # of its tokens
    document: int  # its number
    parent: int  # number of the run before it, -1 at a root
    lane: float  # height at which it is drawn, counted downwards; leaves of the first document have whole numbers

    def __len__(self) -> int:
        return self.stop - self.start


def trie_runs(row: Row) -> list[Run]:
    """Cut the real tokens of a row into runs, parents before children, and place them on lanes."""
    segments, positions = Segments.of(row.layout), row.position_ids[0].tolist()
    kinds, documents = token_kinds(row)
    starts = np.union1d(segments.starts, np.flatnonzero(np.diff(kinds[: row.num_tokens])) + 1)
    parents = (np.searchsorted(starts, segments.parent_tokens()[starts], side="right") - 1).tolist()
    # a lane for each leaf, a gap between documents, and every other run in the middle of its children
    leaf, lanes = len(parents) - len({*parents} - {-1}), [0.0] * len(parents)
    below: dict[int, list[float]] = defaultdict(list)
    for number in reversed(range(len(parents))):
        if number in below:
            lanes[number] = (below[number][0] + below[number][-1]) / 2
        else:
            leaf -= 1
            lanes[number] = leaf + 0.6 * (documents[starts[number]] - documents[0])
        below[parents[number]].append(lanes[number])
    stops = [*starts[1:].tolist(), row.num_tokens]
    return [
        Run(start, stop, positions[start], int(kinds[start]), int(documents[start]), parent, lane)
        for start, stop, parent, lane in zip(starts.tolist(), stops, parents, lanes, strict=True)
    ]


def trie_height(row: Row) -> float:
    """Inches that the trie of a row takes."""
    return max(0.6, (max(run.lane for run in trie_runs(row)) + 1) * _LANE_HEIGHT)


def draw_trie_panel(figure: Any, place: Any, row: Row) -> None:
    """Draw the trie of a row, logical position across, a lane for each leaf, :func:`trie_height` inches high."""
    axes = figure.add_subplot(place)
    runs = trie_runs(row)
    colours = token_colours(token_kinds(row))
    deepest = max(run.position + len(run) for run in runs)
    inner = {run.parent for run in runs}
    lanes: dict[int, list[float]] = defaultdict(list)
    for number, run in enumerate(runs):
        lanes[run.document].append(run.lane)
        if run.parent >= 0:
            # joins them where they stand on different lanes
            axes.plot([run.position] * 2, [runs[run.parent].lane, run.lane], color=INK, linewidth=1.1, zorder=3)
        axes.barh(run.lane, len(run), left=run.position, height=0.62, color=colours[run.start], linewidth=0)
        centred: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": ink_on(colours[run.start])}
        if deepest <= _NUMBERED_POSITIONS:
            for x, index in enumerate(range(run.start, run.stop), run.position):
                axes.text(x + 0.5, run.lane, str(index), fontsize=6.5, **centred)
                if index > run.start:
                    axes.plot([x, x], [run.lane - 0.31, run.lane + 0.31], color="white", linewidth=0.7)
        elif len(run) >= deepest * 0.055:
            axes.text(run.position + len(run) / 2, run.lane, str(len(run)), fontsize=7.5, **centred)
        if number not in inner:
            end = run.position + len(run) + 0.008 * deepest
            axes.text(end, run.lane, kind_name(run.kind), va="center_baseline", fontsize=7.5, color=INK)
    for document, of in lanes.items():
        middle = (min(of) + max(of)) / 2
        axes.text(-0.012 * deepest, middle, str(document), ha="right", va="center_baseline", fontsize=8, color=INK)
    axes.set_ylabel("document", fontsize=9, color=INK, labelpad=16)
    axes.set(xlim=(0, deepest * 1.12), ylim=(max(run.lane for run in runs) + 0.6, -0.6))
    style_axes(axes, "logical position", lanes=True)
