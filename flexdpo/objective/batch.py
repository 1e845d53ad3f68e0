"""What the losses take from a batch and give back: its totals, the reference's values, and a loss with its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from flexdpo.objective import unpaired
from flexdpo.objective.logps import ResponseLogps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flexdpo.layout.groups import Group


@dataclass(frozen=True)
class BatchTotals:
    """What a batch of groups holds in all its rows together: the denominators of the losses."""

    pairs: int  # preferences in the batch
    # tokens of the responses that the ``sft`` loss learns, each counted as often as it is used; a mean over the batches
    # and processes of a step where it has several (see :attr:`averages_tokens`)
    supervised_tokens: int | Tensor
    labelled: int = 0  # labels, by themselves or by edges, that ``kto`` learns from
    rankings: int = 0  # groups with preferences, for ``plackett_luce``
    responses: int = 0  # responses in the batch

    @classmethod
    def of(cls, groups: Sequence[Group]) -> BatchTotals:
        """Count what the losses divide by."""
        return cls(
            pairs=sum(len(group.edges) for group in groups),
            supervised_tokens=sum(group.response_ids[k].size for group in groups for k in supervised_responses(group)),
            labelled=sum(len(unpaired.labels_of(group)) for group in groups),
            rankings=sum(bool(group.edges) for group in groups),
            responses=sum(len(group.response_ids) for group in groups),
        )


def supervised_responses(group: Group) -> list[int]:
    """The responses that ``sft`` learns: the chosen of every pair, or the desirable ones, or all if there are none."""
    labels = unpaired.labels_of(group)
    return [k for k, desirable in labels if desirable] if labels else list(range(len(group.response_ids)))


class ReferenceLogps(NamedTuple):
    """The reference's log-probabilities of a row, as a cache stores them."""

    sums: Tensor  # per response, ``[R]``
    # per preference, chosen and rejected, ``[E, 2]``; only under ``ld_alpha``, where a response counts differently
    # against a shorter one
    pair_sums: Tensor | None = None


Reference: TypeAlias = "ResponseLogps | ReferenceLogps | None"


class RowLoss(NamedTuple):
    """The loss of one row, or of all rows of a batch, and what is logged of it."""

    loss: Tensor  # the share of the batch loss, a scalar
    metrics: dict[str, Tensor]  # detached per-pair or per-response values by their logged name
