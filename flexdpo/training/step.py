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
from flexdpo.objective.logps import ResponseLogps, response_logps
from flexdpo.objective.objective import Objective, Reference, surrogate_loss
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
        objective: The losses.
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
        routed = self._routed(batch, passes)
        losses, metrics, policy_sums, reference_sums = [], [], [], []
        for number, row in enumerate(batch.rows):
            with self._sync(number, passes):
                reference = self._reference(batch, number)
                with self._listening() as own:
                    policy = self._policy(row)
                result = self.objective.row_loss(policy, reference, row, batch.totals, average=self.average)
                loss = self._with_router_loss(result.loss, number, own, routed, batch)
                if self.backward is not None:
                    _require_gradient(loss)
                    self.backward(loss)
            losses.append(result.loss.detach())
            metrics.append(result.metrics)
            policy_sums += _sums(policy)
            reference_sums += _sums(reference)
        for number in range(len(batch.rows), passes):
            with self._sync(number, passes):
                self._idle_reference(batch)
                self._idle_policy(batch)
        merged = {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}
        total = torch.stack(losses).sum()
        return self._total(total, merged, routed, batch, policy_sums, reference_sums)

    def _in_two_passes(self, batch: PackedBatch, passes: int) -> BatchLoss:
        """Where a row's gradient depends on the others: all values first, then every row again with its gradient."""
        idle = range(len(batch.rows), passes)
        # the reference's passes all come first, so that processes gather the same weights at the same time
        references = [self._reference(batch, number) for number in range(len(batch.rows))]
        for _ in idle:
            self._idle_reference(batch)
        first, routed = [], []
        with torch.no_grad():
            for row in batch.rows:
                with self._listening() as own:
                    first.append(self._policy(row))
                routed.append(own)
            for _ in idle:
                self._idle_policy(batch)
        found = self.objective.target_gradients(first, references, batch.rows, batch.totals, average=self.average)
        if self.backward is not None:
            for number, (row, gradient) in enumerate(zip(batch.rows, found.targets, strict=True)):
                with self._sync(number, passes):
                    with self._listening() as own:
                        policy = self._policy(row)
                    share = self._with_router_loss(surrogate_loss(policy, gradient), number, own, routed, batch)
                    _require_gradient(share)
                    self.backward(share)
            for number in idle:
                with self._sync(number, passes):
                    self._idle_policy(batch)
        sums = [values for logps in first for values in _sums(logps)]
        of_reference = [values for logps in references for values in _sums(logps)]
        return self._total(found.loss, dict(found.metrics), routed, batch, sums, of_reference)

    # --- the routers of a mixture of experts -------------------------------------------------------------------------

    def _listening(self) -> AbstractContextManager[Routed]:
        return contextlib.nullcontext(Routed()) if self.router is None else self.router.listening()

    def _routed(self, batch: PackedBatch, passes: int) -> list[Routed]:
        """The routers' logits of all rows without gradients, where a batch of several rows needs them."""
        routed: list[Routed] = []
        if self.router is None:
            return routed
        if passes > 1:
            with torch.no_grad():
                for row in batch.rows:
                    with self._listening() as own:
                        self._policy(row)
                    routed.append(own)
                for _ in range(len(batch.rows), passes):
                    self._idle_policy(batch)
        return routed

    def _with_router_loss(
        self, loss: Tensor, number: int, own: Routed, routed: list[Routed], batch: PackedBatch
    ) -> Tensor:
        """A row's loss plus the whole batch's router loss, in which only this row's routers have a gradient."""
        if self.router is None:
            return loss
        if not routed:
            routed.append(own)
            return loss + self.router.of_row(own)
        added = self.router.of_batch([*routed[:number], own, *routed[number + 1 :]], batch.rows)
        return loss + added

    def _total(
        self,
        loss: Tensor,
        metrics: dict[str, Tensor],
        routed: list[Routed],
        batch: PackedBatch,
        policy_sums: list[Tensor],
        reference_sums: list[Tensor],
    ) -> BatchLoss:
        if self.router is not None:
            one = len(batch.rows) == 1
            added = self.router.of_row(routed[0]) if one else self.router.of_batch(routed, batch.rows)
            metrics = {**metrics, "aux_loss": (added.detach() / self.router.coefficient)[None]}
            loss = loss + added.detach()
        return BatchLoss(loss, metrics, policy_sums, reference_sums)

    def _idle_reference(self, batch: PackedBatch) -> None:
        """Take part in the others' reference pass."""
        if batch.idle_row is not None and batch.reference is None:
            self._run_reference(batch.idle_row)

    def _idle_policy(self, batch: PackedBatch) -> None:
        """Take part in the others' pass without adding anything to the gradient."""
        if batch.idle_row is None:
            return
        targets = self._policy(batch.idle_row).targets
        if self.backward is not None and torch.is_grad_enabled():
            self.backward(targets.sum() * 0.0)

    def _policy(self, row: Row) -> ResponseLogps:
        with self.autocast():
            return response_logps(self.model, row, with_log_sum_squares=self.objective.needs_log_sum_squares)

    def _reference(self, batch: PackedBatch, number: int) -> Reference:
        if batch.reference is not None:
            return batch.reference[number]
        if not self.objective.needs_reference:
            return None
        if self.reference is None:
            raise FlexdpoError(
                f"loss_type {', '.join(self.objective.loss_type)} needs a reference model or precomputed values"
            )
        return self._run_reference(batch.rows[number])

    def _run_reference(self, row: Row) -> ResponseLogps | None:
        if not self.objective.needs_reference or self.reference is None:
            return None
        with torch.no_grad(), self.autocast():
            return self.reference(row)

    def _sync(self, number: int, passes: int) -> AbstractContextManager[Any]:
        last = number == passes - 1
        return contextlib.nullcontext() if last or self.backward is None else self.no_sync()


def _require_gradient(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise FlexdpoError(
            "the loss depends on no trainable weight, so nothing would be learned; an adapter must be active and not "
            "merged (model.set_adapter(name), model.unmerge_adapter()), and checkpointing of an adapter's model with "
            "use_reentrant=True needs model.enable_input_require_grads()"
        )


def _sums(logps: Reference) -> list[Tensor]:
    return [logps.sums.detach()] if isinstance(logps, ResponseLogps) else []


def run_batch(model: nn.Module, batch: PackedBatch, objective: Objective, **settings: Any) -> BatchLoss:
    """Run one batch; ``settings`` are those of :class:`Runner`."""
    return Runner(model, objective, **settings)(batch)
