"""Looks at an optimizer step before it is taken: what is not finite reaches neither the weights nor a checkpoint.

The gradient's norm is computed for clipping anyway, and every process has the same one. It is looked at together with
the step's losses, so the device is waited for once per optimizer step. Only when something is not finite are the step's
groups run again, one by one, to name the one at fault: a forward and a backward pass for each.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback

from flexdpo.errors import FlexdpoError
from flexdpo.objective.logps import require_finite
from flexdpo.training.batch import PackedBatch, PackingCollator
from flexdpo.training.distribution import largest, local, runs_in_step
from flexdpo.training.step import BatchLoss, Runner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from torch import Tensor, nn

_WAY_OUT = "a smaller beta, a lower learning rate, or bf16 in place of fp16 keeps it finite"
# under GradScaler a step that overflows is skipped and tried again with a smaller scale, down to this one
_SMALLEST_SCALE = 1.0


class Ran(NamedTuple):
    """A batch of the step in progress: what ran it, and what came out."""

    runner: Runner
    batch: PackedBatch
    result: BatchLoss


@dataclass(eq=False)
class StepGuard(TrainerCallback):
    """Keeps an optimizer from a step that is not finite."""

    model: nn.Module
    accelerator: Accelerator | None = None
    # the batches of the step in progress, whose gradients were added to the step's
    ran: list[Ran] = field(default_factory=list)

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Whatever is raised within, the gradients that the step has added up so far go."""
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Drop the step in progress, gradients included."""
        self.ran.clear()
        self.model.zero_grad(set_to_none=True)

    def require_finite(self, norm: Tensor | float | None, *, where: str = "") -> None:
        """Stop before the optimizer steps if a loss or the gradient is not finite; all processes stop together.

        Where a gradient scaler is at work, a gradient that overflows is its business, as long as its scale can shrink.

        Args:
            norm: Of the gradient, before clipping; ``None`` where the engine that clips does not tell.
            where: For instance ``"step 12"``.

        Raises:
            FlexdpoError: naming the example, or that another process found something.
        """
        ran, self.ran = self.ran, []
        with self.all_or_nothing():
            device = next(self.model.parameters()).device
            losses = torch.stack([each.result.loss.detach().to(device) for each in ran]) if ran else torch.zeros(1)
            total = torch.zeros(()) if norm is None else torch.as_tensor(norm, device=device).detach()
            # a sharded gradient's norm is sharded too
            total = total.full_tensor() if hasattr(total, "full_tensor") else total
            bad = torch.stack([~torch.isfinite(losses.to(device)).all(), ~torch.isfinite(total.to(device))]).int()
            if self.accelerator is not None and self.accelerator.num_processes > 1:
                torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
            loss, gradient = (bool(each) for each in bad.tolist())
            scaler = None if self.accelerator is None else self.accelerator.scaler
            if gradient and scaler is not None and scaler.is_enabled():
                gradient = scaler.get_scale() < _SMALLEST_SCALE
            if loss or gradient:
                self._stop(ran, f"{where}: " if where else "")

    def _stop(self, ran: list[Ran], place: str) -> None:
        # sharded weights are gathered by all processes together, which may have unequal numbers of groups
        if self.accelerator is None or not runs_in_step(self.accelerator):
            for each in ran:
                self._require_finite_one_by_one(each, place)
        for each in ran:
            _require_finite_values(each, place)
        groups = ", ".join(group.name for each in ran for row in each.batch.rows for group in row.groups)
        several = self.accelerator is not None and self.accelerator.num_processes > 1
        elsewhere = ", or it comes from another process, whose message says more" if several else ""
        # what the batch has together: a loss that compares its pairs, a sum that overflows
        raise FlexdpoError(
            f"{place}the gradient or the loss is not finite in the batch of {groups}, though none of them is at fault "
            f"alone{elsewhere}; {_WAY_OUT}"
        )

    def _require_finite_one_by_one(self, ran: Ran, place: str) -> None:
        """Run each group in a row of its own, with the weight that it has in the whole batch."""
        # in a shared row the NaN of one example spreads to the others, behind a mask that gives it the weight 0
        runner = Runner(self.model, ran.runner.objective, ran.runner.reference, torch.Tensor.backward)
        runner = replace(runner, autocast=ran.runner.autocast, router=ran.runner.router)
        for number, group in enumerate(ran.batch.examples[0] or ()):
            batch = PackingCollator().packed(*ran.batch.only([number])).to(ran.batch.rows[0].input_ids.device)
            # one that is longer than memory has a row of its own already
            batch.rows = [row for row in ran.batch.rows if row.pieces and row.numbers == (number,)] or batch.rows
            # a loss that couples its pairs is that of the group's own pairs
            if not runner.objective.couples_batch:
                batch.totals = ran.batch.totals
            elif not (group.edges or batch.totals.labelled):
                continue
            self.model.zero_grad(set_to_none=True)
            result = runner(batch)
            _require_finite_values(Ran(runner, batch, result), place)
            if not bool(torch.isfinite(result.loss)):
                raise FlexdpoError(
                    f"{place}the loss is not finite though every log-probability is, at {group.name}; {_WAY_OUT}"
                )
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
                name = next(not_finite(self.model, gradients=True), None)
                at_fault = "the gradient's norm" if name is None else f"the gradient of {name}"
                raise FlexdpoError(f"{place}{at_fault} is not finite though the loss is, at {group.name}; {_WAY_OUT}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Hold ``Trainer`` to its word that it asks for the gradient's norm before the optimizer steps."""
        if self.ran:
            raise RuntimeError(
                "transformers' Trainer did not ask for the gradient's norm before the optimizer's step, so it was not "
                "looked at; this version of transformers is not supported"
            )


def _require_finite_values(ran: Ran, place: str) -> None:
    """Stop at a log-probability that is not finite, of the policy or of its reference."""
    batch, result, where = ran.batch, ran.result, place.removesuffix(": ")
    for sums, row in zip(result.policy_sums, batch.rows, strict=True):
        require_finite(sums, row, where=where)
    for sums, row in zip(result.reference_sums, batch.rows, strict=False):
        require_finite(sums, row, model="the reference", where=where)
    for given, row in zip(batch.reference or (), batch.rows, strict=False):
        require_finite(given.sums, row, model="the precomputed reference", where=where)


def not_finite(model: nn.Module, *, gradients: bool = False) -> Iterator[str]:
    """Names of the trained parameters, or of those whose gradients, hold a NaN or an infinity; waits for the device."""
    for name, parameter in model.named_parameters():
        values = parameter.grad if gradients else parameter
        if values is None or not parameter.requires_grad:
            continue
        if not bool(torch.isfinite(local(values.detach())).all()):
            yield name


def not_finite_states(model: nn.Module, optimizer: Any) -> Iterator[str]:
    """What the optimizer keeps of trained parameters and would bring into them at its next step."""
    states = getattr(optimizer, "state", None) or {}
    for name, parameter in model.named_parameters():
        for key, value in states.get(parameter, {}).items():
            known = isinstance(value, torch.Tensor) and value.is_floating_point()
            if known and not bool(torch.isfinite(local(value)).all()):
                yield f"the optimizer's {key} of {name}"


def require_finite_weights(model: nn.Module, accelerator: Accelerator, what: str, optimizer: Any = None) -> None:
    """Refuse to write weights that are not finite, as a step with a learning rate beyond all bounds leaves them.

    Raises:
        FlexdpoError: naming the first parameter at fault, or what the ``optimizer`` keeps of it.
    """
    name = next(chain(not_finite(model), not_finite_states(model, optimizer)), None)
    bad = int(name is not None)
    if runs_in_step(accelerator):
        bad = largest(accelerator.device, bad)
    if bad:
        raise FlexdpoError(
            f"{what} is not written, since {name or 'a weight of another process'} holds values that are not finite; "
            "go on from the checkpoint before it with a lower learning rate"
        )
