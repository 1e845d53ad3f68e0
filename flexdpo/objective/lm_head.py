"""Finds a model's language-model head and what the model does to the head's output, so that logits need never exist.

The model runs through its own forward, wrappers and hooks included. For the duration of one call, and in the calling
thread only, the head's ``forward`` is replaced: it receives the hidden states of the whole row, keeps those at the
predicting positions and returns their log-probabilities. Since the head is called once, FSDP and ZeRO-3 gather its
weight once. What the model does after the head (softcap, scale) cannot be read off its class, so it is measured with
made-up logits, again whenever the config or an attribute of the model has another value, and every call holds what the
model did to the log-probabilities against it.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flexdpo.errors import FlexdpoError, found
from flexdpo.hf.unwrap import base_model
from flexdpo.objective.linear_logps import IDENTITY, LogitTransform, TargetLogps, linear_logps, module_logps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


@dataclass(frozen=True)
class HeadPlan:
    """How to get log-probabilities out of a model."""

    vocabulary: int = 0  # words the head scores, ``V``
    transform: LogitTransform = IDENTITY  # what the model does to the head's output
    obstacle: str | None = None  # why the head cannot be used directly; ``None`` where it can


# each with what it was measured under
_plans: WeakKeyDictionary[nn.Module, tuple[Any, HeadPlan]] = WeakKeyDictionary()

# made-up logits reach beyond every softcap in use (Gemma's is 30), so that bending shows
_RAMP_HEIGHT = 40.0


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the module that maps hidden states to logits, adapters included; ``None`` where the model names none."""
    base = base_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def head_plan(model: nn.Module, device: torch.device | None = None) -> HeadPlan:
    """Return how to use a model's head, measured at the first call and whenever the model has other settings.

    ``device`` is that of the inputs; by default that of the first weight in memory.
    """
    base = base_model(model)
    settings = _settings(base)
    known = _plans.get(base)
    if known is None or known[0] != settings:
        if device is None:
            devices = (parameter.device for parameter in base.parameters())
            device = next((d for d in devices if d.type != "meta"), torch.device("cpu"))
        known = settings, _measure(model, device)
        _plans[base] = known
    return known[1]


def _settings(base: Any) -> Any:
    """All plain values of a model and its config, and the code that runs: what may decide on what follows the head."""
    plain = (bool, int, float, str, type(None), list, tuple, dict)
    values = [
        repr(value)
        for holder in (*_configs(base.config), base)
        for name, value in vars(holder).items()
        # a policy that is its own reference goes to and fro between its modes, and bookkeeping says nothing of logits
        if isinstance(value, plain) and name != "training" and not name.startswith("_")
    ]
    # our own hooks come and go with a pass and leave logits alone
    foreign = (
        key for key, hook in base._forward_hooks.items() if not getattr(hook, "__module__", "").startswith("flexdpo.")
    )
    return values, type(base).forward, id(vars(base).get("forward")), tuple(foreign)


def head_logps(
    model: nn.Module,
    inputs: dict[str, Any],
    predictors: Tensor,
    labels: Tensor,
    plan: HeadPlan,
    *,
    with_log_sum_squares: bool = False,
) -> TargetLogps:
    """Run a model whose head computes log-probabilities of ``labels``, ``[T]``, instead of logits.

    ``predictors``, ``[T]`` int64, are the positions that predict them, counted through all rows.
    """
    head = head_of(model)
    assert head is not None
    found: list[TargetLogps] = []
    settings: dict[str, Any] = {"transform": plan.transform, "with_log_sum_squares": with_log_sum_squares}

    def forward(original: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        # a model spread over devices has its head on another one than its inputs
        states, wanted = hidden.flatten(0, 1)[predictors.to(hidden.device)], labels.to(hidden.device)
        # tensor-parallel weights and offloading are more than a matrix and a bias
        plain_weight = type(getattr(head, "weight", None)) in (nn.Parameter, torch.Tensor)
        if type(head) is nn.Linear and getattr(original, "__func__", None) is nn.Linear.forward and plain_weight:
            values = linear_logps(states, head.weight, head.bias, wanted, **settings)
        else:
            values = module_logps(original, states, wanted, vocabulary=plan.vocabulary, **settings)
        found.append(values)
        return values.logps[None, :, None]

    with replaced_forward(head, forward):
        output = model(**inputs).logits
    (values,) = found
    logps = _held_against(plan.transform, values.logps, output, model)
    return TargetLogps(_Anchored.apply(logps, output), values.log_sum_squares)


def _held_against(transform: LogitTransform, logps: Tensor, output: Tensor, model: nn.Module) -> Tensor:
    """Return log-probabilities only if the model did to them what it was expected to do to logits.

    A GPU is not waited for: there they become NaN, which no loss accepts.
    """
    seen, expected = output.detach().reshape(-1).to(logps), transform(logps.detach())
    same = torch.isclose(seen, expected, rtol=1e-4, atol=1e-5, equal_nan=True).all()
    if logps.device.type != "cpu":
        return torch.where(same, logps, torch.nan)
    if not same:
        raise FlexdpoError(
            f"{type(base_model(model)).__name__} does something else to its logits than when it was measured "
            f"({transform}), and neither its config nor its attributes tell; keep what follows the head fixed while "
            "training, or put it into the config"
        )
    return logps


class _Anchored(torch.autograd.Function):
    """Its first argument as a function of the model's output too, where wrappers (FSDP) prepare the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.anchor = anchor.shape, anchor.dtype, anchor.device
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.anchor
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


@dataclass(eq=False)
class _Replacement:
    """What stands in for a module's ``forward`` while some thread has replaced it."""

    original: Callable[..., Tensor]  # the forward that all other threads go on running
    own: Callable[..., Tensor] | None  # the module's instance attribute of that name, if it had one
    # the replacements of each thread, innermost last
    by_thread: dict[int, list[Callable[..., Tensor]]] = field(default_factory=dict)

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        mine = self.by_thread.get(threading.get_ident())
        return mine[-1](self.original, *args, **kwargs) if mine else self.original(*args, **kwargs)


_replacements: WeakKeyDictionary[nn.Module, _Replacement] = WeakKeyDictionary()
_replacing = threading.Lock()


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let ``module(...)`` in this thread call ``forward(original, ...)``, with the module's hooks around it as ever."""
    thread = threading.get_ident()
    with _replacing:
        replacement = _replacements.get(module)
        if replacement is None:
            replacement = _Replacement(module.forward, vars(module).get("forward"))
            _replacements[module] = replacement
            module.forward = torch.compiler.disable(replacement.run)
        replacement.by_thread.setdefault(thread, []).append(forward)
    try:
        yield
    finally:
        with _replacing:
            replacement.by_thread[thread].pop()
            if not replacement.by_thread[thread]:
                del replacement.by_thread[thread]
            if not replacement.by_thread:
                del _replacements[module]
                if replacement.own is None:
                    del module.forward
                else:
                    module.forward = replacement.own


@torch.inference_mode(False)  # where no weight would show by its gradient
def _measure(model: nn.Module, device: torch.device) -> HeadPlan:
    head = head_of(model)
    if head is None:
        return HeadPlan(obstacle="it names no output embeddings")
    seen: list[tuple[int, Tensor]] = []

    def forward(original: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        vocabulary = original(hidden, *args, **kwargs).shape[-1]
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64
        ramp = torch.linspace(-_RAMP_HEIGHT, _RAMP_HEIGHT, vocabulary, dtype=wide, device=hidden.device)
        seen.append((hidden.shape[-2], ramp))
        # until the end of the model's forward: a weight that takes part in what follows shows by its gradient
        torch.set_grad_enabled(True)
        return ramp.expand(*hidden.shape[:-1], vocabulary)

    if isinstance(model, nn.parallel.DistributedDataParallel):
        # which would make ready for a backward pass, and broadcast buffers in one process more often than in another
        model = model.module
    base = base_model(model)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    # compiled layers run as they are here: they would be compiled for these two tokens alone
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager, replaced_forward(head, forward):
        output = logits_of(model, input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    if len(seen) != 1:
        return HeadPlan(obstacle=f"it calls its output embeddings {len(seen)} times per forward pass")
    ((positions, ramp),) = seen
    if positions != 2 or output.shape[-2:] != (2, len(ramp)):
        return HeadPlan(obstacle="it changes the shape of what goes into or comes out of its head")
    if output.requires_grad:
        return HeadPlan(obstacle="a trained weight takes part in what it does to its logits")
    transform = recognise_transform(ramp, output[0, -1], base.config)
    if transform is None:
        return HeadPlan(obstacle="it changes its logits in a way that is neither a scale nor a softcap")
    return HeadPlan(len(ramp), transform)


def logits_of(model: nn.Module, **inputs: Any) -> Tensor:
    """Run a model to its logits, ``[B, S, V]``; a ``FlexdpoError`` if it returns anything else."""
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        raise FlexdpoError(
            f"{type(base_model(model)).__name__} returns {found(output)} without logits [rows, tokens, vocabulary]; "
            "load a causal LM, or let its forward return an output with such logits"
        )
    return logits


def recognise_transform(logits: Tensor, transformed: Tensor, config: Any) -> LogitTransform | None:
    """Recognise what turned ``logits`` into ``transformed``, if it is a scale or a softcap.

    Names of settings differ and are not relied on; the exact constants, or their reciprocals, stand in the config.
    """
    transformed = transformed.to(logits.dtype)
    if torch.allclose(transformed, logits, rtol=1e-5, atol=1e-6):
        return IDENTITY
    values = {name: value for part in _configs(config) for name, value in vars(part).items()}
    numbers = {name: float(v) for name, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    factors = [v for name, v in numbers.items() if ("scal" in name or "mult" in name) and v != 0]
    smallest = int(torch.where(logits == 0, torch.inf, logits.abs()).argmin())
    for softcap in (None, *(v for name, v in numbers.items() if "cap" in name and v > 0)):
        bent = transformed[smallest]
        linear = bent if softcap is None else softcap * torch.atanh(bent / softcap)
        scale = float(linear / logits[smallest])
        near = [v for v in (1.0, *factors, *(1 / v for v in factors)) if abs(v - scale) <= 1e-5 * abs(scale)]
        transform = LogitTransform(near[0] if near else scale, softcap)
        if torch.allclose(transform(logits), transformed, rtol=1e-4, atol=1e-5):
            return transform
    return None


def _configs(config: Any) -> list[Any]:
    return [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
