"""A batch laid out three ways on one scale: padded, packed, and packed with shared prompts. Area is work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.layout.packing import best_fit_decreasing, pack
from flexdpo.show.mask_image import FIRST_RESPONSE, INK, PADDING, PROMPT, TokenKinds, token_colours, token_kinds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexdpo.layout.groups import Group

_LANE_HEIGHT = 0.16
_GAP = 1.9


@dataclass(frozen=True, eq=False)
class Lane:
    """One sequence or row of a layout.

    Attributes:
        tokens: What stands in it, padding included.
        num_tokens: Its tokens, padding not counted.
    """

    tokens: TokenKinds
    num_tokens: int

    def __len__(self) -> int:
        return int(self.tokens.kinds.size)


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """A batch laid out one way.

    Attributes:
        name: ``"padded"``, ``"packed"`` or ``"shared"``.
        lanes: Its sequences or rows.
    """

    name: str
    lanes: tuple[Lane, ...]

    @property
    def slots(self) -> int:
        """Tokens that are run, padding included."""
        return sum(map(len, self.lanes))

    @property
    def num_tokens(self) -> int:
        """Tokens that are run, padding not counted."""
        return sum(lane.num_tokens for lane in self.lanes)

    def title(self) -> str:
        """What it is and how many tokens it runs."""
        count = len(self.lanes)
        what = {
            "padded": f"padded: {count} sequences",
            "packed": f"packed: {count} row{'s' * (count > 1)}",
            "shared": f"packed and shared: {count} row{'s' * (count > 1)}",
        }[self.name]
        padding = 1 - self.num_tokens / self.slots
        return f"{what}, {self.slots:,} tokens run" + (f", {padding:.0%} of them padding" if padding >= 0.005 else "")


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
    budget = default_budget(groups) if max_tokens_per_row is None else max_tokens_per_row
    sequences = [
        _sequence(number, k, group.prompt_ids.size, ids.size)
        for number, group in enumerate(groups)
        for k, ids in enumerate(group.response_ids)
    ]
    longest = max(map(len, sequences))
    # the unshared responses of a group may be too long together, so each finds its own place
    bins = best_fit_decreasing([len(lane) for lane in sequences], max(budget, longest))
    most = max(len(group.response_ids) for group in groups)
    packed = pack(groups, budget, sharing=sharing)
    return (
        BatchLayout("padded", tuple(_padded(lane, longest) for lane in sequences)),
        BatchLayout("packed", tuple(_joined([sequences[i] for i in members]) for members in bins)),
        BatchLayout(
            "shared",
            tuple(
                Lane(
                    token_kinds(row)._replace(num_responses=most, documents=_renumbered(row)),
                    row.num_tokens,
                )
                for row in packed
            ),
        ),
    )


def default_budget(groups: Sequence[Group]) -> int:
    """Row length for a picture: about four rows without sharing, and none too short for a group."""
    total = sum(group.unshared_tokens for group in groups)
    return max(-(-total // 4), *(group.unshared_tokens for group in groups))


def _renumbered(row: Any) -> Any:
    """The documents of a row by the batch's numbers, so that tints agree between the layouts."""
    documents = np.full(row.subtree_end.shape[-1], -1, dtype=np.int64)
    if len(row.groups) != len(row.documents):
        return token_kinds(row).documents  # groups that share a trie are one document
    for number, (start, stop) in zip(row.numbers, row.documents, strict=True):
        documents[start:stop] = number
    return documents


def _sequence(document: int, k: int, prompt: int, response: int) -> Lane:
    kinds = np.concatenate([np.full(prompt, PROMPT), np.full(response, FIRST_RESPONSE + k)])
    return Lane(TokenKinds(kinds, np.full(kinds.size, document), k + 1), int(kinds.size))


def _padded(lane: Lane, length: int) -> Lane:
    missing = length - len(lane)
    kinds = np.concatenate([lane.tokens.kinds, np.full(missing, PADDING)])
    documents = np.concatenate([lane.tokens.documents, np.full(missing, -1)])
    return Lane(TokenKinds(kinds, documents, lane.tokens.num_responses), lane.num_tokens)


def _joined(lanes: Sequence[Lane]) -> Lane:
    return Lane(
        TokenKinds(
            np.concatenate([lane.tokens.kinds for lane in lanes]),
            np.concatenate([lane.tokens.documents for lane in lanes]),
            max(lane.tokens.num_responses for lane in lanes),
        ),
        sum(lane.num_tokens for lane in lanes),
    )


PACKING_TITLE = "A batch, laid out three ways (area is work)"


def packing_height(layouts: Sequence[BatchLayout]) -> float:
    """Inches that three layouts take."""
    return sum(len(layout.lanes) + _GAP for layout in layouts) * _LANE_HEIGHT


def draw_packing_panel(figure: Any, place: Any, layouts: Sequence[BatchLayout]) -> None:
    """Draw layouts of one batch below each other on one scale of tokens.

    Args:
        figure: Where to draw.
        place: A ``SubplotSpec``, about :func:`packing_height` inches high.
        layouts: What :func:`batch_layouts` gives.
    """
    axes = figure.add_subplot(place)
    width = max(len(lane) for layout in layouts for lane in layout.lanes)
    most = max(lane.tokens.num_responses for layout in layouts for lane in layout.lanes)
    y = 0.0
    for layout in layouts:
        axes.text(0, y + 0.9, layout.title(), fontsize=8.5, color=INK, ha="left", va="center_baseline")
        y += _GAP - 0.35
        for lane in layout.lanes:
            _draw_lane(axes, lane, y, most)
            y += 1.0
        y += 0.35
    axes.set_xlim(0, width)
    axes.set_ylim(y, 0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks([])
    axes.set_xlabel("tokens", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color="#9ca3af", linewidth=0.8)


def _draw_lane(axes: Any, lane: Lane, y: float, most: int) -> None:
    """Draw the tokens of a lane as bars, one for each stretch of one kind in one document."""
    kinds, documents = lane.tokens.kinds, lane.tokens.documents
    colours = token_colours(lane.tokens._replace(num_responses=most))
    breaks = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(documents) != 0)) + 1
    starts = np.concatenate(([0], breaks))
    stops = np.concatenate((breaks, [kinds.size]))
    faces = [colours[start] if kinds[start] != PADDING else (0.92, 0.93, 0.95) for start in starts.tolist()]
    spans = list(zip(starts.tolist(), (stops - starts).tolist(), strict=True))
    axes.broken_barh(spans, (y, 0.8), facecolors=faces, linewidth=0)
    borders = starts[1:][documents[starts[1:]] != documents[starts[1:] - 1]]
    axes.vlines(borders, y, y + 0.8, color="white", linewidth=1.2)
