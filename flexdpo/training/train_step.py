"""A training step for loops of one's own: groups in, one optimizer step of the unpacked run, figures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.attention.row_mask import Impl
from flexdpo.errors import FlexdpoError, found, nearest
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.randomness import disable_dropout
from flexdpo.hf.row_dependence import limits_of
from flexdpo.hf.unwrap import unwrap_model
from flexdpo.layout.groups import Group, require_groups
from flexdpo.layout.row import tile_multiple
from flexdpo.objective.logps import response_logps
from flexdpo.objective.objective import Objective
from flexdpo.objective.unpaired import with_unrelated_responses
from flexdpo.training import adapters, distribution, model_loading
from flexdpo.training.batch import PackingCollator
from flexdpo.training.context_parallel import ContextParallel
from flexdpo.training.finite import Ran, StepGuard
from flexdpo.training.step import Runner

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

    from flexdpo.layout.row import Row
    from flexdpo.objective.logps import ResponseLogps


@dataclass(frozen=True)
class StepResult:
    """What one step came to."""

    loss: Tensor  # detached scalar
    grad_norm: Tensor  # before clipping, a scalar
    metrics: dict[str, Tensor]  # means over the batch's pairs or labels, under TRL's names
    tokens_run: int  # distinct tokens that went through the model
    tokens_unshared: int  # tokens that an ordinary step would have run


def make_train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    ref_model: nn.Module | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    max_tokens_per_row: int | None = None,
    pad_to_multiple_of: int | None = None,
    sharing: str = "group",
    max_grad_norm: float | None = 1.0,
    accelerator: Accelerator | None = None,
    impl: Impl = "auto",
    context_parallel: int | DeviceMesh | None = None,
    **loss_settings: Any,
) -> Callable[[Sequence[Group]], StepResult]:
    """Return a function that takes a batch of groups and runs one exact optimizer step on packed rows.

    The model, with or without a PEFT adapter, is prepared here if it was not, and every rate of dropout and noise set
    to 0; one that draws random numbers all the same is refused. With ``accelerator``, prepare it first with
    :func:`flexdpo.prepare_model`, and give what ``accelerator.prepare`` returned. ``ref_model`` is by default the
    policy as it is now (a copy; with an adapter, of what is trained). Losses and their settings are those of
    :class:`~flexdpo.objective.objective.Objective`, rows those of :func:`flexdpo.pack`, where a group that is longer
    than ``max_tokens_per_row`` runs in pieces; padding is by default to 128 tokens on a GPU, where tiles count.

    With ``context_parallel``, so many neighbouring processes, or those of a mesh's dimension, run each row together:
    each a share of its tokens, with keys and values gathered layer by layer. All must be given the same groups.

    A loss or a gradient that is not finite is an error that names the example; a step that raised left no gradients.
    """
    _require_known(loss_settings)
    losses: Any = loss_type if isinstance(loss_type, str | None) else tuple(loss_type)
    objective = Objective(losses, **loss_settings)
    inner = accelerator.unwrap_model(model) if accelerator is not None else model
    in_step = accelerator is not None and distribution.runs_in_step(accelerator)
    adapters.require_moving(optimizer, model, sharded=in_step)
    # below 0 the model would climb, at 0 stand still, and NaN would be its weights
    if max_grad_norm is not None and (not isinstance(max_grad_norm, int | float) or not max_grad_norm > 0):
        raise FlexdpoError(f"max_grad_norm must be a number above 0, got {found(max_grad_norm)}; None clips nothing")
    parts = {"model": inner} if ref_model is None else {"model": inner, "reference model": ref_model}
    vocabularies = {name: model_loading.vocabulary(unwrap_model(part)) for name, part in parts.items()}
    prepare_model(inner, impl=impl)
    disable_dropout(inner)
    adapters.require_trainable(inner)
    reference = _reference(inner, ref_model, objective, impl, sharded=in_step)
    multiple, limits = pad_to_multiple_of, limits_of(inner).limits
    if multiple is None:
        multiple = tile_multiple(next(model.parameters()).device)
    collator = PackingCollator(max_tokens_per_row, multiple, sharing=sharing, with_idle_row=in_step, limits=limits)
    parallel = {"backward": torch.Tensor.backward} if accelerator is None else distribution.hooks_of(accelerator)
    runner = Runner(model, objective, reference=reference, **parallel)
    step = _Step(optimizer, collator, runner, StepGuard(inner, accelerator), vocabularies, max_grad_norm)
    if context_parallel is not None:
        return step.with_context(ContextParallel.of(context_parallel, model, ref_model, accelerator))
    return step


@dataclass(frozen=True)
class _Step:
    optimizer: torch.optim.Optimizer
    collator: PackingCollator
    runner: Runner
    guard: StepGuard
    vocabularies: dict[str, int]
    max_grad_norm: float | None
    context: ContextParallel | None = None

    def with_context(self, context: ContextParallel) -> _Step:
        """The same step, whose rows several processes run together."""
        assert self.runner.backward is not None
        # a group longer than the budget would run in pieces on one process
        collator = replace(self.collator, in_pieces=False)
        runner = replace(self.runner, backward=context.backward(self.runner.backward))
        return replace(self, context=context, collator=collator, runner=runner)

    def __call__(self, groups: Sequence[Group]) -> StepResult:
        require_groups(groups)
        if not groups:
            raise FlexdpoError("a step takes one group at least, got an empty list; leave such a step out")
        model = self.runner.model
        model.train()
        if self.runner.objective.needs_unrelated_responses:
            groups = with_unrelated_responses(groups)
        for name, rows in self.vocabularies.items():
            _require_ids(groups, name, rows)
        batch = self.collator.packed(groups)
        device = next(model.parameters()).device
        if self.context is not None:
            batch = self.context.sharded(batch, groups, device)
        if device.type == "cuda":
            # a copy from memory that may be paged out waits for the step before
            batch = batch.pin_memory()
        batch = batch.to(device, non_blocking=True)
        with self.guard.all_or_nothing():
            result = self.runner(batch)
            if self.context is not None:
                self.context.add_up(model)
            self.guard.ran.append(Ran(self.runner, batch, result))
            limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
            clip = self.guard.accelerator or torch.nn.utils
            norm = torch.as_tensor(clip.clip_grad_norm_(model.parameters(), limit), device=device)
            self.guard.require_finite(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = {name: values.mean() for name, values in result.metrics.items() if len(values)}
        return StepResult(result.loss, norm, metrics, batch.tokens_run, batch.tokens_unshared)


def _require_known(loss_settings: dict[str, Any]) -> None:
    known = [each.name for each in fields(Objective)]
    for name in loss_settings.keys() - known:
        raise FlexdpoError(
            f"make_train_step takes no {name}={loss_settings[name]!r}{nearest(name, known)}; known settings of losses: "
            f"{', '.join(known)}"
        )


def _require_ids(groups: Sequence[Group], name: str, rows: int) -> None:
    for group in groups:
        highest = max(int(ids.max()) for ids in (group.prompt_ids, *group.response_ids))
        if highest >= rows:
            raise FlexdpoError(
                f"{group.name} has token {highest} but the {name} embeds {rows} tokens; tokenise with the tokenizer "
                "that it was made with"
            )


def _reference(
    model: nn.Module, ref_model: nn.Module | None, objective: Objective, impl: Impl, *, sharded: bool
) -> Callable[[Row], ResponseLogps] | None:
    if not objective.needs_reference:
        return None
    if ref_model is None and adapters.is_peft_model(model):
        at_start = adapters.at_start_of(model, fresh=False)

        def first_policy(row: Row) -> ResponseLogps:
            with at_start():
                return response_logps(model, row)

        return first_policy
    if ref_model is None and sharded:
        raise FlexdpoError("a sharded model cannot be copied as its own reference; give ref_model, sharded like it")
    reference = model_loading.frozen_copy(model) if ref_model is None else ref_model.requires_grad_(False).eval()
    prepare_model(reference, impl=impl)
    disable_dropout(unwrap_model(reference))
    return lambda row: response_logps(reference, row)
