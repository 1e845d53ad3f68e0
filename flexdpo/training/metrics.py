"""What a run logs: means over pairs on all processes, tokens, and the file that keeps every line."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import Tensor
    from transformers import TrainingArguments


class MeanMetrics:
    """Means of metrics over everything added since the last look, on all processes together."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one value per pair or response, ``[N]`` each, on the device; nothing waits for them here."""
        for name, values in metrics.items():
            if len(values):
                self._sums[name].append(torch.stack([values.sum(), values.new_full((), len(values))]))

    def clear(self) -> None:
        """Forget what was added."""
        self._sums.clear()

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes, each of which must call this, and start anew."""
        # a process without a single pair still takes part, so the names come from all of them
        names = sorted({name for part in gather_object([sorted(self._sums)]) for name in part})
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        totals = torch.stack([sum(self._sums[name], nothing) for name in names])
        self.clear()
        totals = accelerator.reduce(totals, reduction="sum")
        return {name: (total / count).item() for name, (total, count) in zip(names, totals, strict=True)}


def distinct_examples(example_rows: Tensor, args: TrainingArguments, accelerator: Accelerator) -> list[int]:
    """Which examples of an evaluation batch count: all but repeats that fill up the last batch of some ranks."""
    state, count = accelerator.gradient_state, len(example_rows)
    if (example_rows < 0).any():
        # a stream marks its repeats itself, for nobody knows its length
        return [number for number, row in enumerate(example_rows.tolist()) if row >= 0]
    if args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
        count = min(count, max(0, state.remainder - args.process_index * args.eval_batch_size))
    return list(range(count))


class MetricsFile(TrainerCallback):
    """Appends every logged line to a JSONL file, one object per line."""

    def __init__(self, path: Path | str, **extra: Any) -> None:
        self.path = Path(path)
        self.extra = extra

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        """Write one line, on the main process only."""
        if logs is None or not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **self.extra, **logs}) + "\n")
