"""One batch of packed rows: forward, loss and backward of the unpacked step, and means of what batches log."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import Row, idle_row
from flexdpo.objective.batch import Reference, RowLoss
from flexdpo.objective.logps import ResponseLogps, response_logps
from flexdpo.objective.objective import Objective
from flexdpo.objective.router import Routed, RouterLoss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import Tensor, nn

    from flexdpo.training.batch import PackedBatch


class BatchLoss(NamedTuple):
    """The loss of a batch and what is logged of it."""

    loss: Tensor  # detached scalar, the unpacked batch's loss
    metrics: dict[str, Tensor]  # values of all rows by name, one per pair or response
    policy_sums: list[Tensor]  # of each row's responses, ``[R]``, detached
    reference_sums: list[Tensor]  # the same under the reference, where it was run


class MeanMetrics:
    """Means of metrics over everything added since the last look, on all processes together."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one value per pair or response, ``[N]`` each, on the device; nothing waits for them here."""
        for name, values in metrics.items():
            if len(values):
                self._sums[name].append(torch.stack([values.sum(), values.new_full((), len(values))]))

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes, each of which must call this, and start anew."""
        # a process without a single pair still takes part, so the names come from all of them
        names = sorted({name for part in gather_object([sorted(self._sums)]) for name in part})
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        totals = accelerator.reduce(torch.stack([sum(self._sums[name], nothing) for name in names]), reduction="sum")
        self._sums.clear()
        return {name: (total / count).item() for name, (total, count) in zip(names, totals, strict=True)}


@dataclass(frozen=True)
class Runner:
    """Runs the rows of a batch one after another; losses and gradients add up to the unpacked batch's."""

    model: nn.Module  # a prepared causal LM, wrapped or not
    objective: Objective
    reference: Callable[[Row], ResponseLogps] | None = None  # without gradients, where none is precomputed
    backward: Callable[[Tensor], None] | None = None  # of each row's share of the loss; none computes values only
    # around every pass of the model but the last, to keep gradient synchronisation for the end
    no_sync: Callable[[nn.Module], AbstractContextManager[Any]] = contextlib.nullcontext
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # around the forward passes
    average: Callable[[Tensor], Tensor] | None = None  # mean of a scalar over all processes
    router: RouterLoss | None = None  # of a mixture of experts, added to the batch's loss
    agree: Callable[[int], int] | None = None  # the largest of all processes' numbers, where passes must be equal

    def __call__(self, batch: PackedBatch) -> BatchLoss:
        """Run a batch that is on the model's device."""
        objective, totals, count = self.objective, batch.totals, len(batch.rows)
        if objective.averages_tokens and self.average is not None:
            # gradients become a mean over processes, so each divides by the mean of their tokens
            tokens = batch.rows[0].input_ids.new_full((), float(totals.supervised_tokens), dtype=torch.float64)
            totals = replace(totals, supervised_tokens=self.average(tokens))
        rows = list(batch.rows)
        if any(row.pieces for row in rows):
            rows += self._behind_pieces(rows, batch.idle_row)
        if self.agree is not None and batch.idle_row is not None:
            # a process that runs out of rows takes part in the others' passes
            rows += [batch.idle_row] * (self.agree(count) - count)
        # the reference's passes all come first, so that processes gather the same weights at the same time
        references = self._references(batch, rows)[:count]
        couples = objective.couples_batch and len(rows) > 1
        first: list[tuple[ResponseLogps, Routed]] = []
        if couples or (self.router is not None and len(rows) > 1):
            # what compares a batch's rows needs the values of all, and then each row again for its gradient
            with torch.no_grad():
                first = [self._policy(row) for row in rows][:count]
        sums, routed = [policy.sums for policy, _ in first], [heard for _, heard in first]
        shares: list[RowLoss] = []
        if couples:
            policies = [policy for policy, _ in first]
            share, gradients = objective.target_gradients(policies, references, batch.rows, totals, self.average)
            shares.append(share)
        for number, row in enumerate(rows if self.backward is not None or not couples else ()):
            last = number == len(rows) - 1
            with contextlib.nullcontext() if last or self.backward is None else self.no_sync(self.model):
                policy, heard = self._policy(row)
                if number >= count:
                    self._backward(policy.targets.sum() * 0.0)  # adds nothing to the gradient
                    continue
                if couples:
                    # its gradient in the model is that of the batch's loss; its value means nothing
                    loss = (policy.targets * gradients[number]).sum()
                else:
                    share = objective.loss([policy], [references[number]], [row], totals, self.average)
                    loss = share.loss
                    shares.append(share._replace(loss=loss.detach()))
                if self.router is not None:
                    together = [*routed[:number], heard, *routed[number + 1 :]]
                    loss = loss + self.router.loss(together, batch.rows)
                self._backward(loss)
            if not first:
                sums.append(policy.sums.detach())
                routed.append(heard)
        loss = torch.stack([share.loss for share in shares]).sum()
        metrics = {name: torch.cat([share.metrics[name] for share in shares]) for name in shares[0].metrics}
        if self.router is not None:
            added = self.router.loss(routed, batch.rows).detach()
            loss, metrics["aux_loss"] = loss + added, (added / self.router.coefficient)[None]
        under_reference = [logps.sums.detach() for logps in references if isinstance(logps, ResponseLogps)]
        return BatchLoss(loss, metrics, sums, under_reference)

    def _behind_pieces(self, rows: Sequence[Row], idle: Row | None) -> list[Row]:
        """What runs after rows in pieces, with many backward passes: one row more if gradients are to be shared."""
        row = next(row for row in rows if row.pieces)
        larger = f"raise max_tokens_per_row to at least {row.num_tokens}, or lower max_length"
        what = f"{row.groups[0].name} has {row.num_tokens} distinct tokens, so its row runs in {len(row.pieces)} pieces"
        if self.agree is not None:
            raise FlexdpoError(
                f"{what}, but processes that share weights (FSDP, DeepSpeed) must run equal numbers of passes; {larger}"
            )
        if self.router is not None:
            raise FlexdpoError(
                f"{what}, but the load-balancing loss needs the routers' logits of all of them together; {larger}, or "
                "set router_aux_loss_coef=0 to train without it"
            )
        if self.backward is None or not rows[-1].pieces or self.no_sync is contextlib.nullcontext:
            return []
        return [idle_row() if idle is None else idle]

    def _policy(self, row: Row) -> tuple[ResponseLogps, Routed]:
        listening = contextlib.nullcontext(Routed()) if self.router is None else self.router.listening()
        with listening as heard, self.autocast():
            return response_logps(self.model, row, with_log_sum_squares=self.objective.use_weighting), heard

    def _references(self, batch: PackedBatch, rows: Sequence[Row]) -> Sequence[Reference]:
        if batch.reference is not None:
            return batch.reference
        if not self.objective.needs_reference:
            return [None] * len(rows)
        if self.reference is None:
            raise FlexdpoError(
                f"loss_type {', '.join(self.objective.loss_type)} needs a reference model or precomputed values"
            )
        with torch.no_grad(), self.autocast():
            return [self.reference(row) for row in rows]

    def _backward(self, loss: Tensor) -> None:
        if self.backward is None:
            return
        if not loss.requires_grad:
            raise FlexdpoError(
                "the loss depends on no trainable weight, so nothing would be learned; an adapter must be active and "
                "not merged (model.set_adapter(name), model.unmerge_adapter()), and checkpointing of an adapter's "
                "model with use_reentrant=True needs model.enable_input_require_grads()"
            )
        self.backward(loss)
