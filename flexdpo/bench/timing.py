"""Times and peak memory of the variants of a benchmark, in alternation: a busy machine slows all of them alike."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from flexdpo.bench.variants import Variant


Result = TypeVar("Result")
# enough for a median, whatever the time
FEWEST_ROUNDS = 4
# rounds of the slow variants: two among the fewest, and every eighth
SLOW_ROUNDS = frozenset({0, 2, *range(8, 10_000, 8)})


class Seconds(NamedTuple):
    """Time of one step's phases."""

    reference: float
    policy: float

    @property
    def total(self) -> float:
        """Both phases."""
        return self.reference + self.policy


@dataclass(eq=False)
class Times:
    """All measurements of one variant.

    Attributes:
        steps: By batch, then by round; ``None`` where the variant sat a round out.
        peak_bytes: Memory of the largest step beyond what was there before it; ``None`` where the system cannot tell.
    """

    steps: list[list[Seconds | None]] = field(default_factory=list)
    peak_bytes: int | None = None

    def of(self, phase: str) -> list[list[float]]:
        """Seconds by batch and round, ``nan`` where there are none; ``phase`` is a property of :class:`Seconds`."""
        return [[float("nan") if step is None else getattr(step, phase) for step in batch] for batch in self.steps]

    def median(self, phase: str) -> float:
        """Seconds for all batches, each at its median round."""
        return float(np.nansum(np.nanmedian(self.of(phase), axis=1)))

    def quartiles(self, phase: str) -> tuple[float, float]:
        """Lower and upper quartile, summed over batches."""
        low, high = np.nanquantile(self.of(phase), [0.25, 0.75], axis=1)
        return float(low.sum()), float(high.sum())


class Ratio(NamedTuple):
    """How many times slower one variant is than another.

    Attributes:
        median: Of the ratios of measurements made side by side.
        low: Their lower quartile.
        high: Their upper quartile.
    """

    median: float
    low: float
    high: float


def paired_ratio(slow: Times, fast: Times, phase: str) -> Ratio:
    """Compare measurements of the same batch in the same round, batches weighted by their time."""
    above, below = np.asarray(slow.of(phase)), np.asarray(fast.of(phase))
    weights = np.nanmedian(below, axis=1)
    low, median, high = np.nanquantile(above / below, [0.25, 0.5, 0.75], axis=1) @ (weights / weights.sum())
    return Ratio(float(median), float(low), float(high))


def measure(
    variants: Sequence[Variant],
    model: nn.Module,
    batches: int,
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    slow: Sequence[str] = (),
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """Run every variant on every batch, round after round.

    Args:
        variants: What to compare.
        model: The weights they share.
        batches: How many batches each variant holds.
        device: Where everything runs.
        rounds: Most rounds.
        seconds: No round but the first four begins after this long, warming up included.
        slow: Names of variants that sit most rounds out, being far behind.
        progress: Called after every round.
    """
    times = {variant.name: Times([[] for _ in range(batches)]) for variant in variants}
    began = time.perf_counter()
    for variant in variants:
        # on a GPU every length may bring a kernel of its own; on a CPU the step below is the one that warms up
        for batch in range(batches if device.type == "cuda" else 0):
            run_step(variant, model, batch, device)
        model.zero_grad(set_to_none=True)
        times[variant.name].peak_bytes = peak_bytes(partial(run_step, variant, model, 0, device), device)
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
        # forwards and backwards, so that no variant always follows the same one
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for batch in range(batches):
            for variant in order:
                out = variant.name in slow and number not in SLOW_ROUNDS
                times[variant.name].steps[batch].append(None if out else run_step(variant, model, batch, device))
        progress()
    return times


def run_step(variant: Variant, model: nn.Module, batch: int, device: torch.device) -> Seconds:
    """Time one step of one variant."""
    variant.enter()
    model.zero_grad(set_to_none=True)
    model.eval()
    reference, seconds = timed(lambda: variant.reference(batch), device)
    model.train()
    return Seconds(seconds, timed(lambda: variant.policy(batch, reference), device)[1])


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call returns, and its seconds, what it left running on a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """How much memory a call takes beyond what is there; ``None`` where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    # freed tensors are given back, and the largest resident size so far is forgotten
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found.group(1)) * 1024
