"""Times and peak memory of the variants of a benchmark, in alternation: a busy machine slows all of them alike."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flexdpo.bench.variants import Variant
from flexdpo.estimate.costs import StepSeconds

Result = TypeVar("Result")
# enough for a median, whatever the time
FEWEST_ROUNDS = 4
# rounds of the slow variants: two among the fewest, and every eighth
SLOW_ROUNDS = frozenset({0, 2, *range(8, 10_000, 8)})
SAT_OUT = StepSeconds(float("nan"), float("nan"))


@dataclass(eq=False)
class Times:
    """All measurements of one variant: its steps by batch, then by round.

    ``peak_bytes`` is the memory of a step beyond what was there before it, ``None`` where the system cannot tell.
    """

    steps: list[list[StepSeconds]]
    peak_bytes: int | None = None

    def of(self, phase: str) -> NDArray[np.float64]:
        """Seconds of a property of :class:`StepSeconds`, ``[batches, rounds]``, ``nan`` where there are none."""
        return np.array([[getattr(step, phase) for step in batch] for batch in self.steps])

    def quartiles(self, phase: str) -> dict[str, float]:
        """Seconds for all batches, each at its median round, and at its lower and upper quartile."""
        low, median, high = np.nanquantile(self.of(phase), [0.25, 0.5, 0.75], axis=1).sum(axis=1).tolist()
        return {"median": median, "low": low, "high": high}


def paired_ratio(slow: Times, fast: Times, phase: str) -> dict[str, float]:
    """How many times slower one variant is: quartiles of the ratios of measurements made side by side.

    The same batch in the same round is compared, and batches are weighted by their time.
    """
    below = fast.of(phase)
    weights = np.nanmedian(below, axis=1)
    low, median, high = np.nanquantile(slow.of(phase) / below, [0.25, 0.5, 0.75], axis=1) @ (weights / weights.sum())
    return {"median": float(median), "low": float(low), "high": float(high)}


def measure(
    variants: Sequence[Variant],
    model: nn.Module,
    batches: int,
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """Run every variant on each of its batches, round after round; the slow ones sit most rounds out.

    No round but the first four begins after so many ``seconds``, warming up included; ``progress`` is told of each.
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
                runs = number in SLOW_ROUNDS or not variant.slow
                times[variant.name].steps[batch].append(run_step(variant, model, batch, device) if runs else SAT_OUT)
        progress()
    return times


def run_step(variant: Variant, model: nn.Module, batch: int, device: torch.device) -> StepSeconds:
    """Time one step of one variant."""
    variant.enter()
    model.zero_grad(set_to_none=True)
    model.eval()
    reference, seconds = timed(lambda: variant.reference(batch), device)
    model.train()
    return StepSeconds(seconds, timed(lambda: variant.policy(batch, reference), device)[1])


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call returns, and its seconds, what it left running on a GPU included.

    On one thread of a CPU those of this process alone, whatever else the machine does.
    """
    clock = time.process_time if of_process(device) else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, clock() - start


def of_process(device: torch.device) -> bool:
    """Whether times are seconds of this process and not of the clock."""
    return device.type == "cpu" and torch.get_num_threads() == 1


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
