"""Measures the drop-in: K completions per prompt in a padded batch, with shared prefixes and without, side by side."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from flexdpo.bench.timing import timed
from flexdpo.dropin.hooks import PlanKey, plan_batch
from flexdpo.dropin.rules import Positions
from flexdpo.dropin.share import share_prefixes, sharing_stats, unshare
from flexdpo.estimate.model_shapes import build_model, shape_config
from flexdpo.show.table import aligned

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.bench.settings import BenchSettings

_ROUNDS = 9


class SharingTimes(NamedTuple):
    """What was measured; seconds are medians."""

    tokens_in: int  # places of the padded batch, ``N * T``
    tokens_run: int  # that ran through the model with sharing
    padded_seconds: float  # forward and backward
    shared_seconds: float
    speed_up: tuple[float, float, float]  # quartiles of the ratios of measurements made side by side
    plan_seconds: float  # to find the trie and lay out the row, part of ``shared_seconds``
    gradient_error: float  # largest difference of any gradient, relative to the largest entry of that gradient

    def table(self) -> str:
        """The figures as text."""
        low, median, high = self.speed_up
        fewer, share = self.tokens_in / self.tokens_run, self.plan_seconds / self.shared_seconds
        numbers = [
            ["", "padded", "shared"],
            ["tokens through the model", f"{self.tokens_in:,}", f"{self.tokens_run:,}"],
            ["forward and backward, seconds", f"{self.padded_seconds:.3f}", f"{self.shared_seconds:.3f}"],
            ["finding what is shared, ms", "", f"{1e3 * self.plan_seconds:.2f}"],
            ["gradients differ by", "", f"{self.gradient_error:.0e}"],
        ]
        notes = [
            "",
            f"{fewer:.2f} times fewer",
            f"{median:.2f} times faster ({low:.2f} to {high:.2f})",
            f"{share:.2%} of the step",
            "of their largest entry, at most",
        ]
        return "\n".join(map("   ".join, zip(aligned(numbers).splitlines(), notes, strict=True)))


def bench_sharing(
    settings: BenchSettings, *, prompts: int = 2, completions: int = 8, lengths: tuple[int, int] = (512, 128)
) -> SharingTimes:
    """Time the forward and backward of a policy-gradient step on a padded batch, as it is and with prefixes shared.

    Args:
        settings: Of which device, dtype, model, scale, threads and seed count.
        prompts: Prompts per batch.
        completions: Completions of each, K.
        lengths: Tokens of a prompt and of the longest completion, before scaling; the shortest has half of them.
    """
    device, config = torch.device(settings.device), shape_config(settings.model)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    model = build_model(config, device, settings.torch_dtype, seed=settings.seed)
    prompt, completion = (max(1, round(length * settings.scale)) for length in lengths)
    rng = np.random.default_rng(settings.seed)
    batch = _batch(rng, config.vocab_size, (prompts, completions, prompt, completion))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    padded, shared, plans = [], [], []
    # the first round warms the machine and the kernels up, and compares the gradients
    for number in range(_ROUNDS + 1):
        _, alone = timed(partial(_step, model, batch, completion), device)
        want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        share_prefixes(model)
        # each round plans its batch anew, as every step of a training run does
        fresh = {name: tensor.clone() for name, tensor in batch.items()}
        _, together = timed(partial(_step, model, fresh, completion), device)
        stats = sharing_stats(model)
        unshare(model)
        if number == 0:
            got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            error = max(float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want)
            continue
        padded.append(alone)
        shared.append(together)
        key = PlanKey(1.1, 16, Positions.of(model.model), 1)
        plans.append(timed(partial(plan_batch, batch["input_ids"], batch["attention_mask"], None, key), device)[1])
    low, middle, high = np.quantile(np.asarray(padded) / np.asarray(shared), [0.25, 0.5, 0.75]).tolist()
    return SharingTimes(
        stats.tokens_in, stats.tokens_run, median(padded), median(shared), (low, middle, high), median(plans), error
    )


def _batch(rng: np.random.Generator, vocabulary: int, sizes: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Prompts of one length, completions of several, padded on the right."""
    count, completions, prompt_tokens, longest = sizes
    rows = count * completions
    prompts = rng.integers(2, vocabulary, (count, prompt_tokens)).repeat(completions, 0)
    ids = np.concatenate([prompts, rng.integers(2, vocabulary, (rows, longest))], axis=1)
    lengths = prompt_tokens + rng.integers((longest + 1) // 2, longest + 1, rows)
    lengths[0] = ids.shape[1]
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return {
        "input_ids": torch.from_numpy(np.where(mask, ids, 0)),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


def _step(model: Any, batch: dict[str, Tensor], completion_tokens: int) -> None:
    """Forward and backward of the mean log-probability of completions, logits at the completions only."""
    model.zero_grad(set_to_none=True)
    logits = model(**batch, use_cache=False, logits_to_keep=completion_tokens + 1).logits[:, :-1]
    targets = batch["input_ids"][:, -completion_tokens:]
    real = batch["attention_mask"][:, -completion_tokens:]
    logps = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    (-(logps * real).sum() / real.sum()).backward()
