"""The trie of a row as a drawing: every run of unbranched tokens a bar, from its first logical position to its last."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.show.mask_image import FIRST_RESPONSE, INK, PADDING, PROMPT, SHARED, token_colours, token_kinds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexdpo.layout.row import Row

# rows up to this many tokens deep carry their index in the row in every cell
_NUMBERED_POSITIONS = 48
_LANE_HEIGHT = 0.27


@dataclass(frozen=True)
class Run:
    """Tokens of a trie that follow each other without a branch and are of one kind.

    Attributes:
        start: Row index of the first.
        stop: Row index past the last.
        position: Logical position of the first.
        kind: See :class:`flexdpo.show.mask_image.TokenKinds`.
        document: Number of the document.
        parent: Number of the run before it, -1 at a root.
        lane: Height at which it is drawn, counted downwards; leaves have whole numbers.
    """

    start: int
    stop: int
    position: int
    kind: int
    document: int
    parent: int
    lane: float = 0.0

    def __len__(self) -> int:
        return self.stop - self.start


def trie_runs(row: Row) -> list[Run]:
    """Cut the real tokens of a row into runs, parents before children, and place them on lanes.

    Args:
        row: One packed row.
    """
    ends = row.subtree_end[0].tolist()[: row.num_tokens]
    positions = row.position_ids[0].tolist()
    kinds, documents, _ = token_kinds(row)
    runs: list[Run] = []
    run_of: dict[int, int] = {}
    open_tokens: list[int] = []
    start = 0
    for index in range(len(ends)):
        # what ended before this token is no ancestor of it
        while open_tokens and ends[open_tokens[-1]] <= index:
            open_tokens.pop()
        parent = open_tokens[-1] if open_tokens else -1
        # a run goes on while each token is the only child of the one before it and looks the same
        goes_on = parent == index - 1 and index > 0 and ends[parent] == ends[index] and kinds[parent] == kinds[index]
        if not goes_on:
            start = index
            run = Run(index, index, positions[index], int(kinds[index]), int(documents[index]), run_of.get(parent, -1))
            runs.append(run)
        run_of[index] = len(runs) - 1
        runs[-1] = replace(runs[-1], stop=index + 1, start=start)
        open_tokens.append(index)
    return _placed(runs)


def _placed(runs: Sequence[Run]) -> list[Run]:
    """Give leaves a lane each, a gap between documents, and every other run the middle of its children."""
    children: dict[int, list[int]] = {}
    for number, run in enumerate(runs):
        children.setdefault(run.parent, []).append(number)
    lanes: dict[int, float] = {}
    lane, document = 0.0, 0
    for number, run in enumerate(runs):
        if number not in children:
            lane += 0.6 if run.document != document else 0.0
            document = run.document
            lanes[number] = lane
            lane += 1.0
    for number in reversed(range(len(runs))):
        if number in children:
            below = [lanes[child] for child in children[number]]
            lanes[number] = (below[0] + below[-1]) / 2
    return [replace(run, lane=lanes[number]) for number, run in enumerate(runs)]


def trie_height(row: Row) -> float:
    """Inches that the trie of a row takes."""
    runs = trie_runs(row)
    return max(0.6, (max(run.lane for run in runs) + 1) * _LANE_HEIGHT)


def draw_trie_panel(figure: Any, place: Any, row: Row) -> None:
    """Draw the trie of a row into a part of a figure: logical position across, one lane for each leaf.

    Args:
        figure: Where to draw.
        place: A ``SubplotSpec``, about :func:`trie_height` inches high.
        row: The packed row.
    """
    axes = figure.add_subplot(place)
    runs = trie_runs(row)
    colours = token_colours(token_kinds(row))
    deepest = max(run.position + len(run) for run in runs)
    numbered = deepest <= _NUMBERED_POSITIONS
    for run in runs:
        if run.parent >= 0:
            _draw_branch(axes, runs[run.parent], run)
    leaves = set(range(len(runs))) - {run.parent for run in runs}
    for number, run in enumerate(runs):
        axes.barh(run.lane, len(run), left=run.position, height=0.62, color=colours[run.start], linewidth=0)
        if numbered:
            _draw_indices(axes, run, colours[run.start])
        elif len(run) >= deepest * 0.055:
            _label_inside(axes, run, colours[run.start])
        if number in leaves:
            _label_leaf(axes, run, deepest)
    _frame(axes, runs, deepest)


def _draw_branch(axes: Any, parent: Run, child: Run) -> None:
    """Join a run to the one before it where they stand on different lanes."""
    axes.plot([child.position] * 2, [parent.lane, child.lane], color=INK, linewidth=1.1, zorder=3)


def _draw_indices(axes: Any, run: Run, colour: Any) -> None:
    ink = "white" if np.mean(colour) < 0.6 else INK
    for offset in range(len(run)):
        axes.text(run.position + offset + 0.5, run.lane, str(run.start + offset), ha="center", va="center_baseline",
                  fontsize=6.5, color=ink)  # fmt: skip
        if offset:
            axes.plot([run.position + offset] * 2, [run.lane - 0.31, run.lane + 0.31], color="white", linewidth=0.7)


def _label_inside(axes: Any, run: Run, colour: Any) -> None:
    ink = "white" if np.mean(colour) < 0.6 else INK
    axes.text(run.position + len(run) / 2, run.lane, str(len(run)), ha="center", va="center_baseline", fontsize=7.5,
              color=ink)  # fmt: skip


def _label_leaf(axes: Any, run: Run, deepest: int) -> None:
    name = {PROMPT: "prompt", SHARED: "shared", PADDING: "padding"}.get(
        run.kind
    ) or f"response {run.kind - FIRST_RESPONSE}"
    axes.text(run.position + len(run) + 0.008 * deepest, run.lane, name, ha="left", va="center_baseline", fontsize=7.5,
              color=INK)  # fmt: skip


def _frame(axes: Any, runs: Sequence[Run], deepest: int) -> None:
    """Name the documents on the left, and count positions below."""
    for document in sorted({run.document for run in runs}):
        lanes = [run.lane for run in runs if run.document == document]
        axes.text(-0.012 * deepest, (min(lanes) + max(lanes)) / 2, str(document), ha="right", va="center_baseline",
                  fontsize=8, color=INK)  # fmt: skip
    axes.set_ylabel("document", fontsize=9, color=INK, labelpad=16)
    axes.set_xlabel("logical position", fontsize=9, color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks([])
    axes.set_xlim(0, deepest * 1.12)
    axes.set_ylim(max(run.lane for run in runs) + 0.6, -0.6)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color="#9ca3af", linewidth=0.8)
