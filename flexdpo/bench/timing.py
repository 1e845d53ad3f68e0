"""Times of one layer, and of variants in alternation, since a busy machine slows all of them alike; peak memory."""

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
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.attention.row_mask import Impl, row_mask_for
from flexdpo.attention.varlen import plan_for
from flexdpo.bench.variants import Variant, document_bounds, pack_pairs, within_documents
from flexdpo.estimate.costs import StepSeconds
from flexdpo.layout.groups import Group
from flexdpo.layout.row import Row
from flexdpo.training.model_size import ModelSize

Result = TypeVar("Result")
# enough for a median, whatever the time
_FEWEST_ROUNDS = 4
SAT_OUT = StepSeconds(float("nan"), float("nan"))


@dataclass(eq=False)
class Times:
    """All measurements of one variant."""

    steps: list[list[StepSeconds]]  # by batch, then by round
    peak_bytes: int | None = None  # of a step beyond what was there before it; ``None`` where the system cannot tell

    def of(self, phase: str) -> NDArray[np.float64]:
        """Seconds of a property of :class:`StepSeconds`, ``[batches, rounds]``, ``nan`` where there are none."""
        return np.array([[getattr(step, phase) for step in batch] for batch in self.steps])

    def quartiles(self, phase: str) -> dict[str, float]:
        """Seconds for all batches, each at its median round, and at its lower and upper quartile."""
        low, median, high = np.nanquantile(self.of(phase), [0.25, 0.5, 0.75], axis=1).sum(axis=1).tolist()
        return {"median": median, "low": low, "high": high}


def paired_ratio(slow: Times, fast: Times, phase: str) -> dict[str, float]:
    """How many times slower one variant is in the same round: quartiles over them, batches weighted by their time."""
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
        if number >= _FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
        # the slow ones run in two of the fewest, and in every eighth
        slow_too = number == 2 or number % 8 == 0
        for batch in range(batches):
            # forwards and backwards, so that no variant always follows the same one
            for variant in variants[:: -1 if number % 2 else 1]:
                step = run_step(variant, model, batch, device) if slow_too or not variant.slow else SAT_OUT
                times[variant.name].steps[batch].append(step)
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


def kernel_times(
    pairs: Sequence[Group], shape: ModelSize, device: torch.device, dtype: torch.dtype, **packing: Any
) -> list[dict[str, Any]]:
    """Time one layer on the first row of ``pairs``, shared and not; on CUDA in half precision by varlen_attn too.

    ``block_mask_ms`` is the time to make the BlockMask, or the plan of root paths, once per step; ``None`` where there
    is neither.
    """
    with_varlen = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    counts = (shape.heads, shape.key_heads, shape.key_heads)
    found = []
    for layout in ("packed", "shared"):
        row = pack_pairs(pairs, layout == "shared", **packing)[0].to(device)
        # token by token in memory, as a projection leaves them
        made = [torch.randn(1, row.layout.length, n, shape.head_dim, device=device, dtype=dtype) for n in counts]
        heads = [x.transpose(1, 2).requires_grad_() for x in made]
        # the kernel's name, a layer of it, and what makes its mask
        kernels: list[tuple[str, Any, Any]]
        kernels = [("flexdpo", _own_layer(row, "auto"), partial(row_mask_for, kind=CAUSAL))]
        if with_varlen and layout == "packed":
            kernels.insert(0, ("varlen_attn", _documents_layer(row), None))
        elif with_varlen:
            kernels.append(("varlen_attn", _own_layer(row, "varlen"), plan_for))
        for kernel, layer, make_mask in kernels:
            forward, backward = layer_times(layer, heads, device)
            bare = partial(lambda row: (row.layout.without_masks(),), row)
            mask = None if make_mask is None else _milliseconds(make_mask, device, before=bare)
            times = {"forward_ms": forward, "backward_ms": backward, "block_mask_ms": mask}
            found.append({"layout": layout, "kernel": kernel, "tokens": row.num_tokens, **times})
    return found


def _own_layer(row: Row, impl: Impl) -> Callable[..., Tensor]:
    return partial(packed_attention, row_mask=row_mask_for(row.layout, CAUSAL, impl))


def _documents_layer(row: Row) -> Callable[..., Tensor]:
    attend = partial(within_documents, documents=document_bounds(row))
    return lambda *heads: rearrange(attend(*heads), "1 token head size -> 1 head token size")


def layer_times(layer: Callable[..., Tensor], heads: list[Tensor], device: torch.device) -> tuple[float, float]:
    """Milliseconds of a layer's forward pass with gradients on, and of its backward pass."""
    direction = torch.randn_like(layer(*heads))

    def backward(output: Tensor) -> None:
        # once for each forward: a compiled kernel gives its buffers away in the first backward
        torch.autograd.grad(output, heads, direction)

    forward_ms = _milliseconds(partial(layer, *heads), device)
    return forward_ms, _milliseconds(backward, device, before=lambda: (layer(*heads),))


def _milliseconds(
    run: Callable[..., Any], device: torch.device, before: Callable[[], tuple[Any, ...]] = tuple
) -> float:
    """Median time of five calls, after one to warm up; ``before`` makes its arguments and is not timed."""
    run(*before())
    return 1e3 * median(timed(partial(run, *before()), device)[1] for _ in range(5))
