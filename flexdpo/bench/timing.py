"""Times and peak memory of the arms of a benchmark, in alternation, so that a busy machine slows all of them alike."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from flexdpo.bench.variants import Arm


# enough for a median, whatever the time
FEWEST_ROUNDS = 4
# rounds of the slow arms: two among the fewest, and every eighth
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
    """All measurements of one arm.

    Attributes:
        steps: By batch, then by round; ``None`` where the arm sat a round out.
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
    """How many times slower one arm is than another.

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
    arms: Sequence[Arm],
    model: nn.Module,
    batches: int,
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    slow: Sequence[str] = (),
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """Run every arm on every batch, round after round.

    Args:
        arms: What to compare.
        model: The weights they share.
        batches: How many batches each arm holds.
        device: Where everything runs.
        rounds: Most rounds.
        seconds: No round but the first four begins after this long, warming up included.
        slow: Names of arms that sit most rounds out, being far behind.
        progress: Called after every round.

    Returns:
        The measurements by the arms' names.
    """
    times = {arm.name: Times([[] for _ in range(batches)]) for arm in arms}
    began = time.perf_counter()
    for arm in arms:
        # on a GPU every length may bring a kernel of its own; on a CPU the step below is the one that warms up
        for batch in range(batches if device.type == "cuda" else 0):
            run_step(arm, model, batch, device)
        times[arm.name].peak_bytes = _peak_of(arm, model, device)
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
        # forwards and backwards, so that no arm always follows the same one
        order = list(arms) if number % 2 == 0 else list(arms)[::-1]
        for batch in range(batches):
            for arm in order:
                out = arm.name in slow and number not in SLOW_ROUNDS
                times[arm.name].steps[batch].append(None if out else run_step(arm, model, batch, device))
        progress()
    return times


def run_step(arm: Arm, model: nn.Module, batch: int, device: torch.device) -> Seconds:
    """Time one step of one arm."""
    arm.enter()
    model.zero_grad(set_to_none=True)
    model.eval()
    start = _now(device)
    reference = arm.reference(batch)
    middle = _now(device)
    model.train()
    restart = _now(device)
    arm.policy(batch, reference)
    return Seconds(middle - start, _now(device) - restart)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_of(arm: Arm, model: nn.Module, device: torch.device) -> int | None:
    """How much memory a step takes beyond what is there, once the arm is warm."""
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_step(arm, model, 0, device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_resident_peak():
        return None
    before_bytes = _status_bytes("VmRSS")
    run_step(arm, model, 0, device)
    return max(0, _status_bytes("VmHWM") - before_bytes)


def _reset_resident_peak() -> bool:
    """Forget the largest resident size so far, and what freed tensors still hold; Linux only."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found.group(1)) * 1024
