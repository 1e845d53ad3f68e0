"""A batch laid out three ways on one scale: padded, packed, and packed with shared prompts. Area is work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flexdpo.layout.groups import Group
from flexdpo.layout.packing import best_fit_decreasing, pack
from flexdpo.layout.row import Row
from flexdpo.show.mask_image import FIRST_RESPONSE, IMAGE, PADDING, PROMPT, TokenKinds, token_colours, token_kinds
from flexdpo.show.plots import INK, style_axes

_LANE_HEIGHT, _GAP = 0.16, 1.9


class BatchLayout(NamedTuple):
    """A batch laid out one way: its sequences or rows, padding included."""

    name: str  # ``"padded"``, ``"packed"`` or ``"packed and shared"``
    lanes: list[TokenKinds]

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
) -> list[BatchLayout]:
    """Lay a batch out padded, packed without sharing, and as training does: as :func:`flexdpo.pack` with ``sharing``.

    By default a row holds a quarter of the batch's tokens, at least its longest group.
    """
    unshared = [group.unshared_tokens for group in groups]
    budget = max(-(-sum(unshared) // 4), *unshared) if max_tokens_per_row is None else max_tokens_per_row
    sequences = []
    for number, group in enumerate(groups):
        for k, ids in enumerate(group.response_ids):
            kinds = np.repeat([PROMPT, FIRST_RESPONSE + k], [group.prompt_ids.size, ids.size])
            if group.images:
                kinds[: group.prompt_ids.size][group.prompt_ids == group.image_token_id] = IMAGE
            sequences.append(TokenKinds(kinds, np.full(kinds.size, number)))
    lengths = [lane.kinds.size for lane in sequences]
    longest = max(lengths)
    # the unshared responses of a group may be too long together, so each finds its own place
    bins = best_fit_decreasing(lengths, max(budget, longest))
    return [
        BatchLayout("padded", [_joined([lane], longest) for lane in sequences]),
        BatchLayout("packed", [_joined([sequences[i] for i in members]) for members in bins]),
        BatchLayout("packed and shared", [_numbered_as_in_batch(row) for row in pack(groups, budget, sharing=sharing)]),
    ]


def _joined(lanes: Sequence[TokenKinds], length: int = 0) -> TokenKinds:
    """Lanes one behind the other, and padding up to ``length`` tokens."""
    padding = np.full((2, max(0, length - sum(lane.kinds.size for lane in lanes))), [[PADDING], [-1]])
    return TokenKinds(*np.concatenate([*lanes, padding], axis=1))


def _numbered_as_in_batch(row: Row) -> TokenKinds:
    """The kinds of a row with its documents by the batch's numbers, so that tints agree between the layouts."""
    found = token_kinds(row)
    if len(row.groups) != len(row.documents):
        return found  # groups that share a trie are one document
    # padding, -1, stays what it is
    return found._replace(documents=np.array([*row.numbers, -1])[found.documents])


def packing_height(layouts: Sequence[BatchLayout]) -> float:
    """Inches that three layouts take."""
    return sum(len(layout.lanes) + _GAP for layout in layouts) * _LANE_HEIGHT


def draw_packing_panel(figure: Any, place: Any, layouts: Sequence[BatchLayout]) -> None:
    """Draw layouts of one batch below each other on one scale of tokens, :func:`packing_height` inches high.

    Tokens are bars, one for each stretch of one kind in one document.
    """
    axes, top = figure.add_subplot(place), 0.0
    lanes = [lane for layout in layouts for lane in layout.lanes]
    last = max(int(lane.kinds.max()) for lane in lanes)
    for layout in layouts:
        axes.text(0, top + 0.9, layout.title(), fontsize=8.5, color=INK, ha="left", va="center_baseline")
        for number, lane in enumerate(layout.lanes):
            (kinds, documents), y = lane, top + _GAP - 0.35 + number
            breaks = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(documents) != 0)) + 1
            starts = np.array([0, *breaks])
            faces = np.where(kinds[starts, None] == PADDING, (0.92, 0.93, 0.95), token_colours(lane, last)[starts])
            spans = np.stack([starts, np.diff(starts, append=kinds.size)], axis=1)
            axes.broken_barh(spans, (y, 0.8), facecolors=faces, linewidth=0)
            borders = breaks[documents[breaks] != documents[breaks - 1]]
            axes.vlines(borders, y, y + 0.8, color="white", linewidth=1.2)
        top += _GAP + len(layout.lanes)
    axes.set(xlim=(0, max(lane.kinds.size for lane in lanes)), ylim=(top, 0))
    style_axes(axes, "tokens", lanes=True)
