"""Preference losses on response log-probabilities, one small function each.

Every loss sees the policy's and the reference's log-probability of each response and the preferences among them.
Shapes: ``E`` preferences (pairs), ``R`` responses. Log-probabilities are sums over a response, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from flexdpo.errors import FlexdpoError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row
    from flexdpo.objective.logps import ResponseLogps


class PairLogps(NamedTuple):
    """Log-probabilities of chosen and rejected responses under the policy and the reference, ``[E]`` each."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


def sigmoid_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: the log-odds that the chosen response wins, under the implicit rewards.

    Args:
        pairs: Log-probabilities, ``[E]`` each.
        beta: Strength of the pull towards the reference.
        label_smoothing: Probability that a preference was labelled the wrong way round (cDPO), in ``[0, 0.5)``.

    Returns:
        ``[E]``; ``ln 2`` where policy and reference agree.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    margin = beta * ((pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def sft_loss(logps: Tensor, total_tokens: int) -> Tensor:
    """Negative log-likelihood of supervised responses, averaged over all tokens of the batch.

    Args:
        logps: Log-probability of each supervised response, any shape.
        total_tokens: Tokens in all supervised responses of the batch, this row's and the others'.

    Returns:
        A scalar: this row's share of the batch mean.
    """
    return -logps.sum() / total_tokens


LOSS_TYPES = ("sigmoid", "sft")
_NEEDS_REFERENCE = frozenset({"sigmoid"})


@dataclass(frozen=True)
class BatchTotals:
    """What a batch of groups holds in all its rows together: the denominators of the losses.

    Attributes:
        pairs: Preferences in the batch.
        supervised_tokens: Tokens of the responses that the ``sft`` loss learns, each counted as often as it is used.
    """

    pairs: int
    supervised_tokens: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> BatchTotals:
        """Count the pairs and the supervised tokens of a batch."""
        tokens = sum(group.response_ids[k].size for group in groups for k in supervised_responses(group))
        return cls(sum(len(group.edges) for group in groups), tokens)


def supervised_responses(group: Group) -> list[int]:
    """The responses that the ``sft`` loss learns: the chosen one of every pair, or all where nothing is preferred."""
    return [chosen for chosen, _ in group.edges] or list(range(len(group.response_ids)))


class RowLoss(NamedTuple):
    """The loss of one row and what is logged of it.

    Attributes:
        loss: The row's share of the batch loss, a scalar.
        metrics: Detached per-pair or per-response values by their logged name.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, with their settings.

    Attributes:
        loss_type: Names of the losses.
        loss_weights: One weight per loss; 1 for each by default.
        beta: Strength of the pull towards the reference.
        label_smoothing: See :func:`sigmoid_loss`.
    """

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not self.loss_type:
            raise FlexdpoError(f"loss_type is empty; choose from {', '.join(LOSS_TYPES)}")
        for name in self.loss_type:
            if name not in LOSS_TYPES:
                raise FlexdpoError(
                    f"unknown loss_type {name!r}{nearest(name, LOSS_TYPES)}; known: {', '.join(LOSS_TYPES)}"
                )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise FlexdpoError(
                f"loss_weights has {len(self.loss_weights)} values for {len(self.loss_type)} losses "
                f"({', '.join(self.loss_type)}); give one weight for each"
            )
        if self.beta <= 0:
            raise FlexdpoError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise FlexdpoError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with a reference model."""
        return any(name in _NEEDS_REFERENCE for name in self.loss_type)

    def row_loss(self, policy: ResponseLogps, reference_sums: Tensor | None, row: Row, totals: BatchTotals) -> RowLoss:
        """Compute one row's share of the batch loss; the shares of a batch's rows add up to its loss.

        Args:
            policy: The policy's log-probabilities.
            reference_sums: The reference's sums per response, ``[R]``; may be ``None`` for losses that need none.
            row: The row.
            totals: Of the whole batch.
        """
        if self.needs_reference and reference_sums is None:
            raise FlexdpoError(f"loss_type {', '.join(self.loss_type)} needs reference log-probabilities, got none")
        if self.needs_reference and totals.pairs == 0:
            raise FlexdpoError(
                f"loss_type {', '.join(self.loss_type)} needs preferences, but the batch has no chosen and rejected "
                "responses; use loss_type='sft' for prompt and completion data"
            )
        pairs = _pair_logps(policy.sums, reference_sums, row.edges)
        terms: dict[str, Callable[[], Tensor]] = {
            "sigmoid": lambda: sigmoid_loss(pairs, self.beta, self.label_smoothing).sum() / totals.pairs,
            "sft": lambda: sft_loss(policy.sums[_supervised_index(row)], totals.supervised_tokens),
        }
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        weighted = [weight * terms[name]() for name, weight in zip(self.loss_type, weights, strict=True)]
        return RowLoss(torch.stack(weighted).sum(), self._metrics(pairs, reference_sums is not None))

    def _metrics(self, pairs: PairLogps, with_reference: bool) -> dict[str, Tensor]:
        logps = {"logps/chosen": pairs.chosen.detach(), "logps/rejected": pairs.rejected.detach()}
        if not with_reference:
            return logps
        chosen = self.beta * (pairs.chosen - pairs.ref_chosen).detach()
        rejected = self.beta * (pairs.rejected - pairs.ref_rejected).detach()
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
            **logps,
        }


def _pair_logps(policy: Tensor, reference: Tensor | None, edges: Tensor) -> PairLogps:
    chosen, rejected = edges.unbind(dim=1)
    if reference is None:
        # only the policy's half is looked at
        reference = torch.zeros_like(policy)
    reference = reference.to(policy.dtype)
    return PairLogps(policy[chosen], policy[rejected], reference[chosen], reference[rejected])


def _supervised_index(row: Row) -> Tensor:
    """Index of every supervised response of a row, ``[N]`` int64."""
    index: list[int] = []
    first = 0
    for group in row.groups:
        index += [first + k for k in supervised_responses(group)]
        first += len(group.response_ids)
    return torch.tensor(index, device=row.edges.device)
