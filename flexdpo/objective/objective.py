"""A weighted sum of losses on the responses of a batch: row by row, or in two passes where a loss couples pairs.

Most losses are sums over pairs or tokens: each row's share is known from the row and the batch's totals. Some couple
the batch (AOT sorts all margins, KTO subtracts a mean over the batch); with several rows these take a first pass
without gradients over all rows, then :meth:`Objective.target_gradients`, then a second pass in which each row's targets
get exactly their gradients in the whole batch's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import numbered
from flexdpo.layout.row import on_device
from flexdpo.objective import listwise, loss_types, losses, unpaired
from flexdpo.objective.batch import BatchTotals, Reference, RowLoss, supervised_responses
from flexdpo.objective.logps import ResponseLogps, pair_sums, response_weights, sum_targets
from flexdpo.objective.loss_types import LABELLED_LOSSES, PAIR_LOSSES, LossSettings

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row

    Average = Callable[[Tensor], Tensor]


@dataclass
class Objective(LossSettings):
    """A weighted sum of losses, with their settings."""

    loss_type: tuple[str, ...] = ("sigmoid",)  # names of the losses, out of :data:`LOSS_TYPES`
    loss_weights: tuple[float, ...] | None = None  # one weight per loss; 1 for each by default

    def __post_init__(self) -> None:
        given: Any = self.loss_type
        if isinstance(given, str):
            self.loss_type = (given,)
        loss_types.check_losses(self.loss_type, self.loss_weights, self)

    @cached_property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with a reference model."""
        return any(name not in loss_types.REFERENCE_FREE for name in self.loss_type)

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
        return any(name in loss_types.COUPLING for name in self.loss_type)

    @property
    def is_mean_over_pairs(self) -> bool:
        """Whether the loss of several processes is a mean over their pairs, whichever of them runs which pair."""
        otherwise = self.couples_batch or self.needs_labels or self.rpo_alpha is not None
        return not (otherwise or loss_types.PER_BATCH & set(self.loss_type))

    def loss(
        self,
        policy: Sequence[ResponseLogps],
        reference: Sequence[Reference],
        rows: Sequence[Row],
        totals: BatchTotals,
        average: Average | None = None,
    ) -> RowLoss:
        """Compute the share that some rows have in the batch loss; the shares of all of a batch's rows add up to it.

        ``average`` takes the mean of a scalar over all processes, for KTO's KL; by default this process stands alone.

        Raises ``FlexdpoError`` if something the losses need is missing.
        """
        groups = [group for row in rows for group in row.groups]
        sums = torch.cat([logps.sums for logps in policy])
        if self.couples_batch and len(sums) != totals.responses:
            raise RuntimeError(
                f"loss_type {self._names} couples the batch's {totals.responses} responses but this row has "
                f"{len(sums)} of them; use target_gradients over all rows"
            )
        self._require(reference, totals)
        pairs, pair_weights = self._pairs(policy, reference, rows)
        others = [each.sums.detach().to(sums) for each in reference if each is not None]
        ratios = sums - torch.cat(others) if others else None
        of_labels, metrics = self._labelled(sums, ratios, groups, totals, average) if self.needs_labels else ({}, {})
        if not self.needs_labels or self.needs_pairs:
            metrics |= self._pair_metrics(pairs, ratios is not None)
        terms = []
        for name, weight in zip(self.loss_type, self.loss_weights or (1.0,) * len(self.loss_type), strict=True):
            if name in PAIR_LOSSES:
                term = (loss_types.pair_loss(name, pairs, self) * pair_weights).sum() / totals.pairs
                if name == "cpo" and self.cpo_alpha:
                    term = term + self.cpo_alpha * _supervised(sums, groups, totals)
            elif name == "sft":
                term = _supervised(sums, groups, totals)
            elif name == "plackett_luce":
                assert ratios is not None
                rewards, rankings = self.beta * ratios, listwise.ranked_responses(groups, sums.device)
                values = [listwise.plackett_luce_loss(rewards[ranking]).sum() for ranking in rankings]
                term = sum(values, sums.new_zeros(())) / totals.rankings
            else:
                term = of_labels[name]
            terms.append(weight * term)
        if self.rpo_alpha is not None:
            # Pang et al. 2024 (Iterative RPO), arXiv:2404.19733, Eq. 1, second term
            means = torch.cat([logps.means[row.edges[:, 0]] for logps, row in zip(policy, rows, strict=True)])
            terms.append(self.rpo_alpha * -means.sum() / totals.pairs)
        return RowLoss(torch.stack(terms).sum(), metrics)

    def target_gradients(
        self,
        policy: Sequence[ResponseLogps],
        reference: Sequence[Reference],
        rows: Sequence[Row],
        totals: BatchTotals,
        average: Average | None = None,
    ) -> tuple[RowLoss, tuple[Tensor, ...]]:
        """Compute the batch's loss and its gradient in every row's targets, ``[T]`` each, from log-probabilities alone.

        The rows' activations may be gone: a first pass over all rows without gradients feeds it, and in a second pass
        ``(targets * gradient).sum()`` runs backwards for each row.
        """
        with torch.enable_grad():
            leaves = [logps.targets.detach().requires_grad_() for logps in policy]
            parts = zip(leaves, rows, policy, strict=True)
            again = [sum_targets(leaf, row, logps.log_sum_squares) for leaf, row, logps in parts]
            result = self.loss(again, reference, rows, totals, average)
            gradients = torch.autograd.grad(result.loss, leaves)
        return result._replace(loss=result.loss.detach()), gradients

    def _require(self, reference: Sequence[Reference], totals: BatchTotals) -> None:
        if self.needs_reference and any(values is None for values in reference):
            raise FlexdpoError(
                f"loss_type {self._names} needs reference log-probabilities, got none; give a reference model, "
                "precompute them, or use a reference-free loss (simpo, orpo, cpo, sft)"
            )
        missing = ""
        if (self.needs_pairs or "plackett_luce" in self.loss_type) and totals.pairs == 0:
            missing = "preferences, but the batch has no chosen and rejected responses"
        elif self.needs_labels and totals.labelled == 0:
            missing = "labelled responses, but the batch has no labels and no preferences"
        if missing:
            raise FlexdpoError(
                f"loss_type {self._names} needs {missing}; use loss_type='sft' for prompt and completion data"
            )

    def _pairs(
        self, policy: Sequence[ResponseLogps], reference: Sequence[Reference], rows: Sequence[Row]
    ) -> tuple[losses.Pairs, Tensor | float]:
        """The pairs of all rows, and WPO's weight for each, ``[E]``."""
        parts = list(zip(policy, reference, rows, strict=True))
        logps = torch.cat([pair_sums(own, row, self.ld_alpha) for own, _, row in parts])
        others = torch.cat([self._reference_pairs(other, row, logps) for _, other, row in parts])
        lengths = torch.cat([own.lengths[row.edges] for own, _, row in parts])
        pairs = losses.Pairs(logps.T, others.T, lengths.T, self.f_divergence_type, self.f_alpha_divergence_coef)
        if not self.use_weighting:
            return pairs, 1.0
        return pairs, torch.cat([response_weights(own, row)[row.edges].prod(dim=1) for own, _, row in parts])

    def _reference_pairs(self, reference: Reference, row: Row, like: Tensor) -> Tensor:
        if reference is None:
            # only the policy's half is looked at
            return like.new_zeros(len(row.edges), 2)
        if isinstance(reference, ResponseLogps):
            return pair_sums(reference, row, self.ld_alpha).to(like).detach()
        if self.ld_alpha is None:
            return reference.sums.to(like)[row.edges]
        if reference.pair_sums is None:
            raise FlexdpoError(
                "ld_alpha weighs the tokens of each pair, so reference sums per response are not enough; compute them "
                "again with this ld_alpha"
            )
        return reference.pair_sums.to(like)

    def _labelled(
        self, sums: Tensor, ratios: Tensor | None, groups: Sequence[Group], totals: BatchTotals, average: Average | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the losses of labels, by name, and what is logged of them."""
        assert ratios is not None
        terms, metrics = {}, {}
        found = unpaired.labelled_responses(groups, sums.device)
        for name in set(LABELLED_LOSSES).intersection(self.loss_type):
            kl: Tensor | float = 0.0
            if name == "kto":
                if len(found.unrelated) == 0:
                    raise FlexdpoError(
                        f"loss_type 'kto' estimates the KL from responses to other prompts, but none of the batch's "
                        f"{totals.responses} responses is one; pass the groups through with_unrelated_responses, or "
                        "use loss_type 'apo_zero_unpaired'"
                    )
                estimate = unpaired.kto_kl(ratios[found.unrelated])
                kl = (estimate if average is None else average(estimate)).clamp(min=0)
                metrics["kl"] = kl.detach()[None]
            weights = self.desirable_weight, self.undesirable_weight
            values = unpaired.kto_loss(ratios[found.responses], found.desirable, kl, self.beta, weights)
            terms[name] = values.sum() / totals.labelled
        if not self.needs_pairs:
            rewards, logps = self.beta * ratios.detach(), sums.detach()
            for name, kept in (("chosen", found.chosen), ("rejected", found.rejected)):
                metrics |= {f"rewards/{name}": rewards[kept], f"logps/{name}": logps[kept]}
        return terms, metrics

    def _pair_metrics(self, pairs: losses.Pairs, with_reference: bool) -> dict[str, Tensor]:
        own: Tensor | None = None
        if with_reference:
            own = pairs.logratios
        elif any(name in loss_types.PER_TOKEN for name in self.loss_type):
            own = pairs.means
        elif "cpo" in self.loss_type:
            own = pairs.logps
        metrics: dict[str, Tensor] = {}
        if own is not None:
            chosen, rejected = self.beta * own.detach()
            metrics = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
                "rewards/margins": chosen - rejected,
            }
        return metrics | dict(zip(("logps/chosen", "logps/rejected"), pairs.logps.detach(), strict=True))

    @property
    def _names(self) -> str:
        return ", ".join(self.loss_type)


def _supervised(sums: Tensor, groups: Sequence[Group], totals: BatchTotals) -> Tensor:
    """Negative log-likelihood of supervised responses, as a share of the mean over all tokens of the batch."""
    index = [first + k for group, first in numbered(groups) for k in supervised_responses(group)]
    return -sums[on_device(index, torch.int64, sums.device)].sum() / totals.supervised_tokens
