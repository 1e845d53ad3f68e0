"""One batch of packed rows: forward, loss and backward of the unpacked step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import Row, idle_row
from flexdpo.objective.batch import Reference, RowLoss
from flexdpo.objective.logps import ResponseLogps, response_logps
from flexdpo.objective.objective import Objective
from flexdpo.objective.router import Routed, RouterLoss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flexdpo.training.batch import PackedBatch

ReferenceFn = Callable[["Row"], ResponseLogps]


@dataclass(eq=False)
class BatchLoss:
    """The loss of a batch and what is logged of it."""

    loss: Tensor  # detached scalar, the unpacked batch's loss
    metrics: dict[str, Tensor] = field(default_factory=dict)  # values of all rows by name, one per pair or response
    policy_sums: list[Tensor] = field(default_factory=list)  # of each row's responses, ``[R]``, detached
    reference_sums: list[Tensor] = field(default_factory=list)  # the same under the reference, where it was run


@dataclass(frozen=True)
class Runner:
    """Runs the rows of a batch one after another; losses and gradients add up to the unpacked batch's.

    Attributes:
        model: A prepared causal LM, wrapped or not.
        reference: Gives the reference log-probabilities of a row, without gradients; not called where the batch brings
            precomputed ones.
        backward: Called with each row's share of the loss, so that one row's activations are freed before the next;
            ``None`` computes values only.
        no_sync: Entered around every pass of the model but the last, to keep gradient synchronisation for the end.
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
    no_sync: Callable[[nn.Module], AbstractContextManager[Any]] = contextlib.nullcontext
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    average: Callable[[Tensor], Tensor] | None = None
    router: RouterLoss | None = None
    agree: Callable[[int], int] | None = None

    def __call__(self, batch: PackedBatch) -> BatchLoss:
        """Run a batch that is on the model's device."""
        objective, totals, count = self.objective, batch.totals, len(batch.rows)
        couples = objective.couples_batch
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
        couples = couples and len(rows) > 1
        first: list[tuple[ResponseLogps, Routed]] = []
        if couples or (self.router is not None and len(rows) > 1):
            # what compares a batch's rows needs the values of all, and then each row again for its gradient
            with torch.no_grad():
                first = [self._policy(row) for row in rows][:count]
        policies, routed = [policy for policy, _ in first], [heard for _, heard in first]
        sums = [policy.sums for policy in policies]
        shares: list[RowLoss] = []
        if couples:
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
        """What runs after rows in pieces, whose backward passes are many: one row more, if gradients are to be shared.

        Raises ``FlexdpoError`` if this step cannot run pieces.
        """
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


def run_batch(model: nn.Module, batch: PackedBatch, objective: Objective, **settings: Any) -> BatchLoss:
    """Run one batch; ``settings`` are those of :class:`Runner`."""
    return Runner(model, objective, **settings)(batch)
