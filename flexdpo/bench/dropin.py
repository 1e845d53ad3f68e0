"""Measures the drop-in: K completions per prompt in a padded batch, with shared prefixes and without, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexdpo.bench.bench import describe_environment
from flexdpo.bench.settings import BenchSettings
from flexdpo.bench.timing import timed
from flexdpo.dropin.plan import PlanKey, plan_batch
from flexdpo.dropin.rules import Positions
from flexdpo.dropin.share import share_prefixes, sharing_stats
from flexdpo.estimate.model_shapes import build_model, shape_config

KIND = "completions timed"
# how many times as long as the longest completion its prompt is, and tokens of that completion: where the padded run
# takes most, it is made shorter
_LENGTHS = ((1, 256), (4, 256), (16, 128))
_ROUNDS = 3


class SharingTimes(NamedTuple):
    """What was measured; seconds are medians, of the clock that :func:`flexdpo.bench.timing.timed` reads."""

    tokens_in: int  # places of the padded batch, ``N * T``
    tokens_run: int  # that ran through the model with sharing
    padded_seconds: float  # forward and backward
    shared_seconds: float
    speed_up: tuple[float, float, float]  # quartiles of the ratios of measurements made side by side
    plan_seconds: float  # to find the trie and lay out the row, part of ``shared_seconds``
    gradient_error: float  # largest difference of any gradient, relative to the largest entry of that gradient


def bench_completions(settings: BenchSettings, *, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Time policy-gradient steps on 8 and 16 completions with prompts 1, 4 and 16 times as long as the longest of them.

    ``report`` gets a line per measurement. Returns what a result file of the kind :data:`KIND` holds.
    """
    columns = ("K", "prompt", "completion", "tokens padded", "shared", "seconds padded", "shared", "speed-up")
    report("  ".join(columns))
    steps = []
    for completions in (8, 16):
        for times, longest in _LENGTHS:
            completion = max(2, round(longest * settings.scale))
            lengths = (times * completion, completion)
            found = bench_sharing(settings, completions=completions, lengths=lengths)
            low, middle, high = found.speed_up
            numbers = [str(completions), *map(str, lengths), f"{found.tokens_in:,}", f"{found.tokens_run:,}"]
            numbers += [f"{found.padded_seconds:.3f}", f"{found.shared_seconds:.3f}"]
            cells = [number.rjust(len(name)) for number, name in zip(numbers, columns, strict=False)]
            report("  ".join([*cells, f"{middle:.2f} ({low:.2f} to {high:.2f})"]))
            steps.append(
                {"completions": completions, "prompt": lengths[0], "completion": completion, **found._asdict()}
            )
    environment = describe_environment(torch.device(settings.device))
    return {
        "kind": KIND, "model": settings.model, "rounds": _ROUNDS, "environment": environment,
        "dtype": str(settings.torch_dtype).removeprefix("torch."), "steps": steps,
    }  # fmt: skip


def bench_sharing(
    settings: BenchSettings, *, completions: int = 8, lengths: tuple[int, int] = (512, 128)
) -> SharingTimes:
    """Time the forward and backward of a policy-gradient step on a padded batch, as it is and with prefixes shared.

    Of the settings device, dtype, model, threads and seed count; ``lengths`` are the tokens of a prompt and of the
    longest completion, the shortest of which has half of them; some rounds follow one that warms up.
    """
    device, config = torch.device(settings.device), shape_config(settings.model)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    model = build_model(config, device, settings.torch_dtype, seed=settings.seed)
    sharing = copy.deepcopy(model)
    share_prefixes(sharing)
    completion = lengths[1]
    batch = _batch(np.random.default_rng(settings.seed), config.vocab_size, completions, lengths, device)
    key = PlanKey(1.1, 16, Positions.of(model.model), 1)
    padded, shared, plans = [], [], []
    for number in range(_ROUNDS + 1):
        alone = timed(partial(_step, model, batch, completion), device)[1]
        # each round plans its batch anew, as every step of a training run does
        fresh = {name: tensor.clone() for name, tensor in batch.items()}
        together = timed(partial(_step, sharing, fresh, completion), device)[1]
        if number == 0:
            # the first round warms the machine and the kernels up, and compares the gradients
            error = _gradient_error(sharing, model)
            stats = sharing_stats(sharing)
            continue
        padded.append(alone)
        shared.append(together)
        plan = partial(plan_batch, batch["input_ids"], batch["attention_mask"], None, key)
        plans.append(timed(plan, device)[1])
    low, middle, high = np.quantile(np.asarray(padded) / np.asarray(shared), [0.25, 0.5, 0.75]).tolist()
    return SharingTimes(
        stats.tokens_in, stats.tokens_run, median(padded), median(shared), (low, middle, high), median(plans), error
    )


def _gradient_error(got: Any, want: Any) -> float:
    wanted = {name: p.grad for name, p in want.named_parameters() if p.grad is not None}
    found = dict(got.named_parameters())
    return max(float((found[name].grad - each).abs().max() / each.abs().max()) for name, each in wanted.items())


def _batch(
    rng: np.random.Generator, vocabulary: int, completions: int, lengths: tuple[int, int], device: torch.device
) -> dict[str, Tensor]:
    """Completions of one prompt, of several lengths, padded on the right."""
    prompt_tokens, longest = lengths
    prompts = rng.integers(2, vocabulary, (1, prompt_tokens)).repeat(completions, 0)
    ids = np.concatenate([prompts, rng.integers(2, vocabulary, (completions, longest))], axis=1)
    stops = prompt_tokens + rng.integers((longest + 1) // 2, longest + 1, completions)
    stops[0] = ids.shape[1]
    mask = np.arange(ids.shape[1]) < stops[:, None]
    values = {"input_ids": np.where(mask, ids, 0), "attention_mask": mask.astype(np.int64)}
    return {name: torch.from_numpy(value).to(device) for name, value in values.items()}


def _step(model: Any, batch: dict[str, Tensor], completion_tokens: int) -> None:
    """Forward and backward of the mean log-probability of completions, logits at the completions only."""
    model.zero_grad(set_to_none=True)
    logits = model(**batch, use_cache=False, logits_to_keep=completion_tokens + 1).logits[:, :-1]
    targets, real = (batch[name][:, -completion_tokens:] for name in ("input_ids", "attention_mask"))
    logps = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    (-(logps * real).sum() / real.sum()).backward()
