"""A weighted sum of losses on the responses of a batch: row by row, or in two passes where a loss couples pairs.

Most losses are sums over pairs or tokens: each row's share is known from the row and the batch's totals. Some couple
the batch (AOT sorts all margins, KTO subtracts a mean over the batch); with several rows these take a first pass
without gradients over all rows, then :meth:`Objective.target_gradients`, then a second pass in which each row's
:func:`surrogate_loss` has exactly the gradient of the whole batch's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import on_device
from flexdpo.objective import listwise, losses, unpaired
from flexdpo.objective.batch import BatchGradients, BatchTotals, Reference, ReferenceLogps, RowLoss, supervised_index
from flexdpo.objective.logps import ResponseLogps, pair_sums, response_weights, sum_targets
from flexdpo.objective.loss_types import (
    COUPLING,
    LABELLED_LOSSES,
    PAIR_LOSSES,
    PER_BATCH,
    PER_TOKEN,
    REFERENCE_FREE,
    LossSettings,
    check_losses,
    pair_loss,
)

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.layout.row import Row


@dataclass
class Objective(LossSettings):
    """A weighted sum of losses, with their settings."""

    loss_type: tuple[str, ...] = ("sigmoid",)  # names of the losses, out of :data:`LOSS_TYPES`
    loss_weights: tuple[float, ...] | None = None  # one weight per loss; 1 for each by default

    def __post_init__(self) -> None:
        given: Any = self.loss_type
        if isinstance(given, str):
            self.loss_type = (given,)
        check_losses(self.loss_type, self.loss_weights, self)

    # --- what the losses need ----------------------------------------------------------------------------------------

    @cached_property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with a reference model."""
        return any(name not in REFERENCE_FREE for name in self.loss_type)

    @cached_property
    def needs_pairs(self) -> bool:
        """Whether any of the losses compares responses with each other."""
        return self.rpo_alpha is not None or any(name in PAIR_LOSSES for name in self.loss_type)

    @cached_property
    def needs_labels(self) -> bool:
        """Whether any of the losses learns from responses labelled one by one."""
        return any(name in LABELLED_LOSSES for name in self.loss_type)

    @cached_property
    def needs_unrelated_responses(self) -> bool:
        """Whether batches must go through :func:`~flexdpo.objective.unpaired.with_unrelated_responses`."""
        return "kto" in self.loss_type

    @cached_property
    def averages_tokens(self) -> bool:
        """Whether a term is a mean over the tokens of a step, whose batches and processes hold unequal numbers."""
        return "sft" in self.loss_type or ("cpo" in self.loss_type and self.cpo_alpha != 0)

    @cached_property
    def couples_batch(self) -> bool:
        """Whether a row's gradient depends on the batch's other rows, so that several rows take two passes."""
        return any(name in COUPLING for name in self.loss_type)

    @property
    def is_mean_over_pairs(self) -> bool:
        """Whether the loss of several processes is a mean over their pairs, whichever of them runs which pair."""
        normalised_otherwise = self.needs_labels or self.rpo_alpha is not None
        return not (self.couples_batch or normalised_otherwise or PER_BATCH & set(self.loss_type))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def row_loss(
        self,
        policy: ResponseLogps,
        reference: Reference,
        row: Row,
        totals: BatchTotals,
        *,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> RowLoss:
        """Compute one row's share of the batch loss; the shares of a batch's rows add up to its loss.

        ``average`` takes the mean of a scalar over all processes, for KTO's KL; by default this process stands alone.

        Raises:
            FlexdpoError: if something the losses need is missing.
            RuntimeError: if the losses couple the batch and it has more rows than this one.
        """
        if self.couples_batch and row.num_responses != totals.responses:
            raise RuntimeError(
                f"loss_type {self._names} couples the batch's {totals.responses} responses but this row has "
                f"{row.num_responses} of them; use target_gradients over all rows"
            )
        return self.batch_loss([policy], [reference], [row], totals, average=average)

    def batch_loss(
        self,
        policy: Sequence[ResponseLogps],
        reference: Sequence[Reference],
        rows: Sequence[Row],
        totals: BatchTotals,
        *,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> RowLoss:
        """Compute the loss of several rows at once; the arguments are those of :meth:`row_loss`, one per row."""
        self._require(reference, totals)
        pairs, weights = self._pairs(policy, reference, rows)
        labelled = self._labelled(policy, reference, rows, totals, average) if self.needs_labels else None
        terms = []
        loss_weights = self.loss_weights or (1.0,) * len(self.loss_type)
        for name, weight in zip(self.loss_type, loss_weights, strict=True):
            if name in PAIR_LOSSES:
                values = pair_loss(name, pairs, self)
                term = (values if weights is None else values * weights).sum() / totals.pairs
                if name == "cpo" and self.cpo_alpha:
                    term = term + self.cpo_alpha * _supervised(policy, rows, totals)
            elif name == "sft":
                term = _supervised(policy, rows, totals)
            elif name == "plackett_luce":
                ranked = [
                    self.beta * ratios[ranking]
                    for ratios, row in zip(_logratios(policy, reference), rows, strict=True)
                    for ranking in listwise.ranked_responses(row)
                ]
                sums = [listwise.plackett_luce_loss(each).sum() for each in ranked]
                term = sum(sums, policy[0].sums.new_zeros(())) / totals.rankings
            else:
                assert labelled is not None
                settings = self.beta, self.desirable_weight, self.undesirable_weight
                if name == "apo_zero_unpaired":
                    values = unpaired.apo_zero_unpaired_loss(labelled.logratios, labelled.desirable, *settings)
                else:
                    assert labelled.kl is not None
                    values = unpaired.kto_loss(labelled.logratios, labelled.desirable, labelled.kl, *settings)
                term = values.sum() / totals.labelled
            terms.append(weight * term)
        if self.rpo_alpha is not None:
            means = torch.cat([logps.means[row.edges[:, 0]] for logps, row in zip(policy, rows, strict=True)])
            terms.append(self.rpo_alpha * losses.rpo_loss(means).sum() / totals.pairs)
        return RowLoss(torch.stack(terms).sum(), self._metrics(pairs, labelled, reference[0] is not None))

    def target_gradients(
        self,
        policy: Sequence[ResponseLogps],
        reference: Sequence[Reference],
        rows: Sequence[Row],
        totals: BatchTotals,
        *,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> BatchGradients:
        """Compute the batch's loss and its gradient in every target, from log-probabilities without gradients.

        Needs the log-probabilities alone, so the rows' activations may be gone: a first pass over all rows without
        gradients feeds it, and a second pass runs :func:`surrogate_loss` backwards for each row.
        """
        with torch.enable_grad():
            leaves = [logps.targets.detach().requires_grad_() for logps in policy]
            again = [
                sum_targets(leaf, row, logps.log_sum_squares)
                for leaf, row, logps in zip(leaves, rows, policy, strict=True)
            ]
            result = self.batch_loss(again, reference, rows, totals, average=average)
            gradients = torch.autograd.grad(result.loss, leaves)
        return BatchGradients(result.loss.detach(), list(gradients), result.metrics)

    # --- from rows to what the losses take ---------------------------------------------------------------------------

    def _require(self, reference: Sequence[Reference], totals: BatchTotals) -> None:
        if self.needs_reference and any(values is None for values in reference):
            raise FlexdpoError(
                f"loss_type {self._names} needs reference log-probabilities, got none; give a reference model, "
                "precompute them, or use a reference-free loss (simpo, orpo, cpo, sft)"
            )
        missing = "use loss_type='sft' for prompt and completion data"
        if (self.needs_pairs or "plackett_luce" in self.loss_type) and totals.pairs == 0:
            raise FlexdpoError(
                f"loss_type {self._names} needs preferences, but the batch has no chosen and rejected responses; "
                f"{missing}"
            )
        if self.needs_labels and totals.labelled == 0:
            raise FlexdpoError(
                f"loss_type {self._names} needs labelled responses, but the batch has no labels and no preferences; "
                f"{missing}"
            )

    def _pairs(
        self, policy: Sequence[ResponseLogps], reference: Sequence[Reference], rows: Sequence[Row]
    ) -> tuple[losses.Pairs, Tensor | None]:
        """The pairs of all rows, and WPO's weight for each, ``[E]``."""
        own = torch.cat([pair_sums(logps, row, self.ld_alpha) for logps, row in zip(policy, rows, strict=True)])
        lengths = torch.cat([logps.lengths[row.edges] for logps, row in zip(policy, rows, strict=True)])
        others = torch.cat(
            [self._reference_pairs(values, row, own) for values, row in zip(reference, rows, strict=True)]
        )
        pairs = losses.Pairs(
            chosen_logps=own[:, 0],
            rejected_logps=own[:, 1],
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
            ref_chosen_logps=others[:, 0],
            ref_rejected_logps=others[:, 1],
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
        )
        if not self.use_weighting:
            return pairs, None
        weights = torch.cat(
            [response_weights(p, row)[row.edges].prod(dim=1) for p, row in zip(policy, rows, strict=True)]
        )
        return pairs, weights

    def _reference_pairs(self, reference: Reference, row: Row, like: Tensor) -> Tensor:
        if reference is None:
            # only the policy's half is looked at
            return like.new_zeros(len(row.edges), 2)
        if isinstance(reference, ResponseLogps):
            return pair_sums(reference, row, self.ld_alpha).to(like).detach()
        if self.ld_alpha is None:
            return _sums(reference).to(like)[row.edges]
        if not isinstance(reference, ReferenceLogps) or reference.pair_sums is None:
            raise FlexdpoError(
                "ld_alpha weighs the tokens of each pair, so reference sums per response are not enough; compute them "
                "again with this ld_alpha"
            )
        return reference.pair_sums.to(like)

    def _labelled(
        self,
        policy: Sequence[ResponseLogps],
        reference: Sequence[Reference],
        rows: Sequence[Row],
        totals: BatchTotals,
        average: Callable[[Tensor], Tensor] | None,
    ) -> _Labelled:
        found = [unpaired.labelled_responses(row) for row in rows]
        logratios = _logratios(policy, reference)
        kl = None
        if self.needs_unrelated_responses:
            unrelated = torch.cat([ratios[each.unrelated] for ratios, each in zip(logratios, found, strict=True)])
            if len(unrelated) == 0:
                raise FlexdpoError(
                    f"loss_type 'kto' estimates the KL from responses to other prompts, but none of the batch's "
                    f"{totals.responses} responses is one; pass the groups through with_unrelated_responses, or use "
                    "loss_type 'apo_zero_unpaired'"
                )
            kl = unpaired.kto_kl(unrelated)
            kl = (kl if average is None else average(kl)).clamp(min=0)
        labels = [label for row in rows for group in row.groups for _, label in unpaired.labels_of(group)]
        chosen, rejected = (
            on_device([n for n, label in enumerate(labels) if label == wanted], torch.int64, rows[0].edges.device)
            for wanted in (True, False)
        )
        return _Labelled(
            torch.cat([own.sums.detach()[each.responses] for own, each in zip(policy, found, strict=True)]),
            torch.cat([ratios[each.responses] for ratios, each in zip(logratios, found, strict=True)]),
            torch.cat([each.desirable for each in found]),
            chosen,
            rejected,
            kl,
        )

    # --- what is logged ----------------------------------------------------------------------------------------------

    def _metrics(self, pairs: losses.Pairs, labelled: _Labelled | None, with_reference: bool) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        if labelled is not None and labelled.kl is not None:
            metrics["kl"] = labelled.kl.detach()[None]
        if labelled is not None and not self.needs_pairs:
            rewards = self.beta * labelled.logratios.detach()
            for name, kept in (("chosen", labelled.chosen), ("rejected", labelled.rejected)):
                metrics |= {f"rewards/{name}": rewards[kept], f"logps/{name}": labelled.logps[kept]}
            return metrics
        own: tuple[Tensor, Tensor] | None = None
        if with_reference:
            own = pairs.chosen_logratios, pairs.rejected_logratios
        elif any(name in PER_TOKEN for name in self.loss_type):
            own = pairs.chosen_means, pairs.rejected_means
        elif "cpo" in self.loss_type:
            own = pairs.chosen_logps, pairs.rejected_logps
        if own is not None:
            chosen, rejected = (self.beta * each.detach() for each in own)
            metrics |= {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
                "rewards/margins": chosen - rejected,
            }
        return metrics | {
            "logps/chosen": pairs.chosen_logps.detach(),
            "logps/rejected": pairs.rejected_logps.detach(),
        }

    @property
    def _names(self) -> str:
        return ", ".join(self.loss_type)


class _Labelled(NamedTuple):
    """Labelled responses of a batch, ``[N]`` each, which of them are which, and the estimated KL where it is needed."""

    logps: Tensor
    logratios: Tensor
    desirable: Tensor
    chosen: Tensor
    rejected: Tensor
    kl: Tensor | None


def _sums(reference: Reference) -> Tensor:
    """Reference sums per response, ``[R]``, without gradient."""
    assert reference is not None
    return (reference if isinstance(reference, torch.Tensor) else reference.sums).detach()


def _logratios(policy: Sequence[ResponseLogps], reference: Sequence[Reference]) -> list[Tensor]:
    """Policy minus reference for every response of each row, ``[R]``."""
    return [own.sums - _sums(other).to(own.sums) for own, other in zip(policy, reference, strict=True)]


def _supervised(policy: Sequence[ResponseLogps], rows: Sequence[Row], totals: BatchTotals) -> Tensor:
    logps = [logps.sums[supervised_index(row)] for logps, row in zip(policy, rows, strict=True)]
    return losses.sft_loss(torch.cat(logps), totals.supervised_tokens)
