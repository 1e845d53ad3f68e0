"""One batch of packed rows: forward, loss and backward of the unpacked step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import Row
from flexdpo.objective.batch import Reference, surrogate_loss
from flexdpo.objective.logps import ResponseLogps, response_logps
from flexdpo.objective.objective import Objective
from flexdpo.objective.router import Routed, RouterLoss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flexdpo.training.batch import PackedBatch

ReferenceFn = Callable[["Row"], ResponseLogps]


@dataclass(eq=False)
class BatchLoss:
    """The loss of a batch and what is logged of it.

    Attributes:
        loss: Detached scalar, the unpacked batch's loss.
        metrics: Values of all rows by name, one per pair or response.
        policy_sums: For each row, the policy's log-probability of every response, ``[R]``, detached.
        reference_sums: The same under the reference, where it was run.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    policy_sums: list[Tensor] = field(default_factory=list)
    reference_sums: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Runner:
    """Runs the rows of a batch one after another; losses and gradients add up to the unpacked batch's.

    Attributes:
        model: A prepared causal LM, wrapped or not.
        reference: Gives the reference log-probabilities of a row, without gradients; not called where the batch brings
            precomputed ones.
        backward: Called with each row's share of the loss, so that one row's activations are freed before the next;
            ``None`` computes values only.
        no_sync: Entered around every pass but the last, to keep gradient synchronisation for the end.
        autocast: Entered around the forward passes.
        average: Mean of a scalar over all processes, for losses that compare with a mean over the whole batch.
        router: The load-balancing loss of a mixture of experts, added to the batch's.
        agree: The largest of the numbers that all processes give. Sharded models need it, since all processes gather
            each weight together and so must run equal numbers of passes; losses that couple a batch need it too.
    """

    model: nn.Module
    objective: Objective
    reference: ReferenceFn | None = None
    backward: Callable[[Tensor], None] | None = None
    no_sync: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    average: Callable[[Tensor], Tensor] | None = None
    router: RouterLoss | None = None
    agree: Callable[[int], int] | None = None

    def __call__(self, batch: PackedBatch) -> BatchLoss:
        """Run a batch that is on the model's device."""
        if self.objective.averages_tokens and self.average is not None:
            # gradients become a mean over processes, so each divides by the mean of their tokens
            tokens = batch.rows[0].input_ids.new_full((), float(batch.totals.supervised_tokens), dtype=torch.float64)
            batch = replace(batch, totals=replace(batch.totals, supervised_tokens=self.average(tokens)))
        passes = len(batch.rows)
        if self.agree is not None and batch.idle_row is not None:
            passes = self.agree(passes)
        if self.objective.couples_batch and passes > 1:
            return self._in_two_passes(batch, passes)
        routed: list[Routed] = []
        if self.router is not None and passes > 1:
            # their loss compares all rows, so all logits come first, without gradients
            self._values(batch, passes, routed)
        losses, metrics, policy_sums, reference_sums = [], [], [], []
        for number, row in enumerate(batch.rows):
            with self._sync(number, passes):
                reference = self._reference(batch, number)
                own: list[Routed] = []
                policy = self._policy(row, own)
                result = self.objective.row_loss(policy, reference, row, batch.totals, average=self.average)
                loss = result.loss
                if self.router is not None and passes == 1:
                    routed = own
                    loss = loss + self.router.of_row(own[0])
                elif self.router is not None:
                    loss = loss + self.router.of_batch([*routed[:number], *own, *routed[number + 1 :]], batch.rows)
                self._backward(loss)
            losses.append(result.loss.detach())
            metrics.append(result.metrics)
            policy_sums.append(policy.sums.detach())
            if isinstance(reference, ResponseLogps):
                reference_sums.append(reference.sums.detach())
        for number in range(len(batch.rows), passes):
            with self._sync(number, passes):
                self._reference(batch, number)
                self._idle_policy(batch)
        merged = {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}
        found = BatchLoss(torch.stack(losses).sum(), merged, policy_sums, reference_sums)
        return found if self.router is None else self._with_router_loss(self.router, found, routed, batch)

    def _in_two_passes(self, batch: PackedBatch, passes: int) -> BatchLoss:
        """Where a row's gradient depends on the others: all values first, then every row again with its gradient."""
        # the reference's passes all come first, so that processes gather the same weights at the same time
        references = [self._reference(batch, number) for number in range(passes)][: len(batch.rows)]
        routed: list[Routed] = []
        first = self._values(batch, passes, routed)
        found = self.objective.target_gradients(first, references, batch.rows, batch.totals, average=self.average)
        if self.backward is not None:
            for number, (row, gradient) in enumerate(zip(batch.rows, found.targets, strict=True)):
                with self._sync(number, passes):
                    own: list[Routed] = []
                    share = surrogate_loss(self._policy(row, own), gradient)
                    if self.router is not None:
                        together = [*routed[:number], *own, *routed[number + 1 :]]
                        share = share + self.router.of_batch(together, batch.rows)
                    self._backward(share)
            for number in range(len(batch.rows), passes):
                with self._sync(number, passes):
                    self._idle_policy(batch)
        result = BatchLoss(
            found.loss,
            dict(found.metrics),
            [logps.sums.detach() for logps in first],
            [logps.sums.detach() for logps in references if isinstance(logps, ResponseLogps)],
        )
        return result if self.router is None else self._with_router_loss(self.router, result, routed, batch)

    @torch.no_grad()
    def _values(self, batch: PackedBatch, passes: int, routed: list[Routed]) -> list[ResponseLogps]:
        """The policy's log-probabilities of all rows without gradients; ``routed`` gets each row's router logits."""
        values = [self._policy(row, routed) for row in batch.rows]
        for _ in range(len(batch.rows), passes):
            self._idle_policy(batch)
        return values

    def _policy(self, row: Row, routed: list[Routed] | None = None) -> ResponseLogps:
        listening = contextlib.nullcontext() if self.router is None else self.router.listening()
        with listening as heard, self.autocast():
            logps = response_logps(self.model, row, with_log_sum_squares=self.objective.use_weighting)
        if heard is not None and routed is not None:
            routed.append(heard)
        return logps

    def _idle_policy(self, batch: PackedBatch) -> None:
        """Take part in the others' pass without adding anything to the gradient."""
        if batch.idle_row is None:
            return
        targets = self._policy(batch.idle_row).targets
        if self.backward is not None and torch.is_grad_enabled():
            self.backward(targets.sum() * 0.0)

    def _reference(self, batch: PackedBatch, number: int) -> Reference:
        """The reference's values of a row; with a number beyond the rows, only take part in the others' pass."""
        row = batch.rows[number] if number < len(batch.rows) else batch.idle_row
        if batch.reference is not None:
            return batch.reference[number] if number < len(batch.rows) else None
        if not self.objective.needs_reference or row is None:
            return None
        if self.reference is None:
            raise FlexdpoError(
                f"loss_type {', '.join(self.objective.loss_type)} needs a reference model or precomputed values"
            )
        with torch.no_grad(), self.autocast():
            return self.reference(row)

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

    def _sync(self, number: int, passes: int) -> AbstractContextManager[Any]:
        """Hold gradients back in every pass but the last."""
        last = number == passes - 1
        return contextlib.nullcontext() if last or self.backward is None else self.no_sync()

    def _with_router_loss(
        self, router: RouterLoss, found: BatchLoss, routed: list[Routed], batch: PackedBatch
    ) -> BatchLoss:
        one = len(batch.rows) == 1
        added = (router.of_row(routed[0]) if one else router.of_batch(routed, batch.rows)).detach()
        metrics = {**found.metrics, "aux_loss": (added / router.coefficient)[None]}
        return replace(found, loss=found.loss + added, metrics=metrics)


def run_batch(model: nn.Module, batch: PackedBatch, objective: Objective, **settings: Any) -> BatchLoss:
    """Run one batch; ``settings`` are those of :class:`Runner`."""
    return Runner(model, objective, **settings)(batch)
