"""A batch laid out three ways on one scale: padded, packed, and packed with shared prompts. Area is work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flexdpo.layout.packing import best_fit_decreasing, pack
from flexdpo.show.mask_image import FIRST_RESPONSE, IMAGE, PADDING, PROMPT, TokenKinds, token_colours, token_kinds
from flexdpo.show.plots import INK, style_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row

PACKING_TITLE = "A batch, laid out three ways (area is work)"
_LANE_HEIGHT = 0.16
_GAP = 1.9


class BatchLayout(NamedTuple):
    """A batch laid out one way: its sequences or rows, padding included."""

    name: str  # ``"padded"``, ``"packed"`` or ``"packed and shared"``
    lanes: tuple[TokenKinds, ...]

    @property
    def slots(self) -> int:
        """Tokens that are run, padding included."""
        return sum(lane.kinds.size for lane in self.lanes)

    @property
    def num_tokens(self) -> int:
        """Tokens that are run, padding not counted."""
        return sum(int((lane.kinds != PADDING).sum()) for lane in self.lanes)

    def title(self) -> str:
        """What it is and how many tokens it runs."""
        count, padding = len(self.lanes), 1 - self.num_tokens / self.slots
        lanes = "sequences" if self.name == "padded" else f"row{'s' * (count > 1)}"
        title = f"{self.name}: {count} {lanes}, {self.slots:,} tokens run"
        return title + (f", {padding:.0%} of them padding" if padding >= 0.005 else "")


def batch_layouts(
    groups: Sequence[Group], max_tokens_per_row: int | None = None, *, sharing: str = "group"
) -> tuple[BatchLayout, BatchLayout, BatchLayout]:
    """Lay a batch out padded, packed without sharing, and as training does.

    Args:
        groups: The batch.
        max_tokens_per_row: Longest row; by default a quarter of the batch's tokens, at least its longest group.
        sharing: See :func:`flexdpo.pack`.

    Raises:
        FlexdpoError: if a group is longer than the rows.
    """
    budget = max_tokens_per_row
    if budget is None:
        unshared = [group.unshared_tokens for group in groups]
        budget = max(-(-sum(unshared) // 4), *unshared)
    most = max(len(group.response_ids) for group in groups)
    sequences = []
    for number, group in enumerate(groups):
        for k, ids in enumerate(group.response_ids):
            kinds = np.repeat([PROMPT, FIRST_RESPONSE + k], [group.prompt_ids.size, ids.size])
            if group.images:
                kinds[: group.prompt_ids.size][group.prompt_ids == group.image_token_id] = IMAGE
            sequences.append(TokenKinds(kinds, np.full(kinds.size, number), most))
    lengths = [lane.kinds.size for lane in sequences]
    longest = max(lengths)
    padding = [TokenKinds(np.full(longest - n, PADDING), np.full(longest - n, -1), most) for n in lengths]
    # the unshared responses of a group may be too long together, so each finds its own place
    bins = best_fit_decreasing(lengths, max(budget, longest))
    shared = pack(groups, budget, sharing=sharing)
    return (
        BatchLayout("padded", tuple(map(_joined, zip(sequences, padding, strict=True)))),
        BatchLayout("packed", tuple(_joined([sequences[i] for i in members]) for members in bins)),
        BatchLayout("packed and shared", tuple(_kinds_in_batch(row, most) for row in shared)),
    )


def _joined(lanes: Sequence[TokenKinds]) -> TokenKinds:
    kinds, documents, most = zip(*lanes, strict=True)
    return TokenKinds(np.concatenate(kinds), np.concatenate(documents), max(most))


def _kinds_in_batch(row: Row, most: int) -> TokenKinds:
    """The kinds of a row with its documents by the batch's numbers, so that tints agree between the layouts."""
    found = token_kinds(row)._replace(num_responses=most)
    if len(row.groups) != len(row.documents):
        return found  # groups that share a trie are one document
    # padding, -1, stays what it is
    return found._replace(documents=np.array([*row.numbers, -1])[found.documents])


def packing_height(layouts: Sequence[BatchLayout]) -> float:
    """Inches that three layouts take."""
    return sum(len(layout.lanes) + _GAP for layout in layouts) * _LANE_HEIGHT


def draw_packing_panel(figure: Any, place: Any, layouts: Sequence[BatchLayout]) -> None:
    """Draw layouts of one batch below each other on one scale of tokens, :func:`packing_height` inches high."""
    axes = figure.add_subplot(place)
    y = 0.0
    for layout in layouts:
        axes.text(0, y + 0.9, layout.title(), fontsize=8.5, color=INK, ha="left", va="center_baseline")
        y += _GAP - 0.35
        for lane in layout.lanes:
            _draw_lane(axes, lane, y)
            y += 1.0
        y += 0.35
    axes.set_xlim(0, max(lane.kinds.size for layout in layouts for lane in layout.lanes))
    axes.set_ylim(y, 0)
    style_axes(axes, "tokens", lanes=True)


def _draw_lane(axes: Any, lane: TokenKinds, y: float) -> None:
    """Draw the tokens of a lane as bars, one for each stretch of one kind in one document."""
    kinds, documents, _ = lane
    colours = token_colours(lane)
    breaks = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(documents) != 0)) + 1
    starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), kinds.size]
    faces = [colours[start] if kinds[start] != PADDING else (0.92, 0.93, 0.95) for start in starts]
    spans = [(start, stop - start) for start, stop in zip(starts, stops, strict=True)]
    axes.broken_barh(spans, (y, 0.8), facecolors=faces, linewidth=0)
    borders = breaks[documents[breaks] != documents[breaks - 1]]
    axes.vlines(borders, y, y + 0.8, color="white", linewidth=1.2)
