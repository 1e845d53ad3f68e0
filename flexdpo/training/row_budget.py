"""The longest row that fits into the memory that is free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import tile_multiple
from flexdpo.training.memory import MemoryPrediction, TrainingSetup, gigabytes, predict_memory
from flexdpo.training.model_size import ModelSize

if TYPE_CHECKING:
    from collections.abc import Collection

# what is left free: the allocator's fragments, other processes on the device, and what the count does not see
MARGIN = 0.12
# a row longer than this gains nothing: kernels are long since busy, and tile tables grow with its square
LONGEST_ROW = 1 << 18


def free_memory(device: torch.device | str) -> int:
    """Bytes that a process can still allocate on a device.

    On CUDA what the driver calls free and what torch's allocator holds unused; elsewhere what the system calls
    available, and no more than what is left of the container's limit.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(unused)
    import psutil

    available = int(psutil.virtual_memory().available)
    limit = _left_of_container()
    return available if limit is None else min(available, limit)


def _left_of_container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left of a Linux container's memory limit; ``None`` where there is none."""
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, taken = (root / most).read_text(encoding="ascii").strip(), (root / used).read_text(encoding="ascii")
        except OSError:
            continue
        # the old interface writes an absurdly large number for "no limit"
        if limit != "max" and int(limit) < 1 << 60:
            return max(0, int(limit) - int(taken))
    return None


def auto_row_budget(
    model_or_config: Any,
    setup: TrainingSetup | None = None,
    *,
    device: torch.device | str,
    free: int | None = None,
    resident: Collection[str] = (),
    multiple: int | None = None,
    longest: int = 0,
    longest_sequence: int | None = None,
) -> int:
    """The largest ``max_tokens_per_row``, at most 262,144, whose step fits into a device's free memory.

    Args:
        model_or_config: See :meth:`ModelSize.of`.
        setup: How it is trained; by default in float32 with AdamW and a frozen reference.
        device: Where it will run.
        free: Bytes that can be used; by default :func:`free_memory` of the device now.
        resident: Which parts are in memory already, and so no longer part of what is free: names of the fields of
            :class:`MemoryPrediction`, for instance ``("weights", "reference")`` once the models have been moved.
        multiple: The budget is a multiple of this many tokens; by default 128 on CUDA and 1 elsewhere.
        longest: Distinct tokens of the longest example, which must fit.
        longest_sequence: Tokens of the longest sequence, where it is enough that this fits and longer examples run in
            pieces.

    Raises:
        FlexdpoError: if not even ``longest`` tokens, or one ``multiple``, fit; the message says what takes the memory.
    """
    setup = setup or TrainingSetup(device_type=torch.device(device).type)
    size = ModelSize.of(model_or_config)
    unit = multiple or tile_multiple(device)
    free = free_memory(device) if free is None else free
    usable = int(free * (1 - MARGIN))

    def needed(tokens: int, setup: TrainingSetup) -> int:
        predicted = predict_memory(size, tokens, setup)
        return predicted.total - sum(int(getattr(predicted, part)) for part in resident)

    cases = [(max(longest, unit), setup)]
    if longest_sequence is not None:
        cases.append((max(longest_sequence, unit), replace(setup, in_pieces=True)))
    for tokens, setup in cases:
        low, high = 0, max(1, LONGEST_ROW // unit)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle * unit, setup) <= usable else (low, middle - 1)
        if low * unit >= tokens:
            return low * unit
    raise FlexdpoError(
        f"no row fits: {tokens} tokens of {size.name} need about {gigabytes(needed(tokens, setup))} more "
        f"({_parts_of(predict_memory(size, tokens, setup))}), and {gigabytes(usable)} of {gigabytes(free)} free memory "
        f"can be used; {', or '.join(_ways_to_save(size, setup))}"
    )


def _parts_of(predicted: MemoryPrediction) -> str:
    return ", ".join(
        f"{name} {gigabytes(getattr(predicted, name))}"
        for name in ("weights", "gradients", "optimizer", "reference", "activations", "working")
    )


def _ways_to_save(size: ModelSize, setup: TrainingSetup) -> list[str]:
    ways = ["lower max_length"]
    if not setup.gradient_checkpointing:
        ways.append("set activation_checkpointing=True")
    if setup.reference:
        ways.append("set precompute_ref_log_probs=True, which keeps no reference in memory")
    if setup.trainable is None or setup.trainable == size.parameters:
        ways.append("train an adapter (peft_config)")
    return ways
