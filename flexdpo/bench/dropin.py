"""Measures the drop-in: K completions per prompt in a padded batch, with shared prefixes and without, side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexdpo.dropin.hooks import PlanKey, plan_batch
from flexdpo.dropin.rules import Positions
from flexdpo.dropin.share import share_prefixes, sharing_stats, unshare
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.model_shapes import find_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# the first rounds warm the machine and the kernels up
_WARM_UP = 1


@dataclass(frozen=True)
class SharingBenchSettings:
    """What to measure.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of weights and activations; by default float32 on a CPU and bfloat16 on CUDA.
        model: Name of a shape.
        prompts: Prompts per batch.
        completions: Completions of each, K.
        prompt_tokens: Tokens of a prompt.
        completion_tokens: Longest completion in tokens; the shortest has half of them.
        rounds: Measurements of each way.
        threads: Threads of a CPU.
        seed: Of lengths, tokens and weights.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    model: str = "tiny"
    prompts: int = 2
    completions: int = 8
    prompt_tokens: int = 512
    completion_tokens: int = 128
    rounds: int = 9
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "completions", "prompt_tokens", "completion_tokens", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise FlexdpoError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise FlexdpoError("device 'cuda': torch sees no CUDA device; use 'cpu', or install a CUDA build")


@dataclass(frozen=True)
class SharingBenchResult:
    """What was measured.

    Attributes:
        tokens_in: Places of the padded batch, ``N * T``.
        tokens_run: Tokens that ran through the model with sharing.
        padded_seconds: Median forward and backward without sharing.
        shared_seconds: The same with sharing.
        speed_up: Median of the ratios of measurements made side by side, with their quartiles.
        plan_seconds: Median time to find the trie and lay out the row, part of ``shared_seconds``.
        gradient_error: Largest difference of any gradient, relative to the largest entry of that gradient.
    """

    tokens_in: int
    tokens_run: int
    padded_seconds: float
    shared_seconds: float
    speed_up: tuple[float, float, float]
    plan_seconds: float
    gradient_error: float

    def table(self) -> str:
        """The figures as text."""
        low, median, high = self.speed_up
        fewer, share = self.tokens_in / self.tokens_run, self.plan_seconds / self.shared_seconds
        lines = (
            ("", "padded", "shared", ""),
            ("tokens through the model", f"{self.tokens_in:,}", f"{self.tokens_run:,}", f"{fewer:.2f} times fewer"),
            (
                "forward and backward, seconds",
                f"{self.padded_seconds:.3f}",
                f"{self.shared_seconds:.3f}",
                f"{median:.2f} times faster ({low:.2f} to {high:.2f})",
            ),
            ("finding what is shared, ms", "", f"{1e3 * self.plan_seconds:.2f}", f"{share:.2%} of the step"),
            ("gradients differ by", "", f"{self.gradient_error:.0e}", "of their largest entry, at most"),
        )
        return "\n".join(
            f"{name:<30}{padded:>10}{shared:>10}   {note}".rstrip() for name, padded, shared, note in lines
        )


def bench_sharing(settings: SharingBenchSettings) -> SharingBenchResult:
    """Time the forward and backward of a policy-gradient step on a padded batch, as it is and with prefixes shared."""
    device = torch.device(settings.device)
    dtype = settings.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        shape = find_shape(settings.model)
        model = shape.build(device, dtype, seed=settings.seed)
        batch = _batch(settings, shape.vocabulary, device)
        return _measure(settings, model, batch, device)
    finally:
        torch.set_num_threads(threads)


def _batch(settings: SharingBenchSettings, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Prompts of one length, completions of several, padded on the right."""
    rng = np.random.default_rng(settings.seed)
    rows, longest = settings.prompts * settings.completions, settings.completion_tokens
    prompts = rng.integers(2, vocabulary, (settings.prompts, settings.prompt_tokens)).repeat(settings.completions, 0)
    ids = np.concatenate([prompts, rng.integers(2, vocabulary, (rows, longest))], axis=1)
    lengths = settings.prompt_tokens + rng.integers((longest + 1) // 2, longest + 1, rows)
    lengths[0] = ids.shape[1]
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return {
        "input_ids": torch.from_numpy(np.where(mask, ids, 0)).to(device),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
    }


def _step(model: Any, batch: dict[str, Tensor], completion_tokens: int) -> None:
    """Forward and backward of the mean log-probability of completions, logits at the completions only."""
    model.zero_grad(set_to_none=True)
    logits = model(**batch, use_cache=False, logits_to_keep=completion_tokens + 1).logits[:, :-1]
    targets = batch["input_ids"][:, -completion_tokens:]
    real = batch["attention_mask"][:, -completion_tokens:]
    logps = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    (-(logps * real).sum() / real.sum()).backward()


def _measure(
    settings: SharingBenchSettings, model: Any, batch: dict[str, Tensor], device: torch.device
) -> SharingBenchResult:
    def step() -> None:
        _step(model, batch, settings.completion_tokens)

    padded, shared, plans = [], [], []
    want: dict[str, Tensor] = {}
    for number in range(settings.rounds + _WARM_UP):
        alone = _timed(step, device)
        if number == 0:
            want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        share_prefixes(model)
        # each round plans its batch anew, as every step of a training run does
        fresh = {name: tensor.clone() for name, tensor in batch.items()}
        together = _timed(lambda: _step(model, fresh, settings.completion_tokens), device)  # noqa: B023
        stats = sharing_stats(model)
        unshare(model)
        if number == 0:
            error = _gradient_error(model, want)
        if number >= _WARM_UP:
            padded.append(alone)
            shared.append(together)
            plans.append(_timed(lambda: _plan(model, batch), device))
    low, median, high = np.quantile(np.asarray(padded) / np.asarray(shared), [0.25, 0.5, 0.75]).tolist()
    return SharingBenchResult(
        stats.tokens_in,
        stats.tokens_run,
        float(np.median(padded)),
        float(np.median(shared)),
        (low, median, high),
        float(np.median(plans)),
        error,
    )


def _plan(model: Any, batch: dict[str, Tensor]) -> None:
    plan_batch(batch["input_ids"], batch["attention_mask"], PlanKey(1.1, 16, Positions.of(model.model), 1))


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _gradient_error(model: Any, want: dict[str, Tensor]) -> float:
    errors = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            errors.append(float((parameter.grad - want[name]).abs().max() / want[name].abs().max()))
    return max(errors)
