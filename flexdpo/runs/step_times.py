"""Whole optimizer steps timed on a trainer's own model and data, with and without prefix sharing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from tqdm.auto import trange

from flexdpo.bench.timing import timed
from flexdpo.layout.row import Row
from flexdpo.layout.trie import Trie
from flexdpo.training.batch import PackedBatch
from flexdpo.training.step import run_batch
from flexdpo.training.trainer import DPOTrainer


@dataclass(frozen=True)
class StepTimes:
    """One optimizer step on the same pairs, with and without prefix sharing.

    Unshared means every response behind its own copy of the prompt and otherwise the same: packed without padding,
    log-probabilities at the targets only. Seconds are medians.
    """

    shared: float
    unshared: float
    loss_gap: float  # largest difference between the two losses, which are equal but for rounding
    laying_out: float  # to make a batch's packed rows of its examples, before a step


def unshared_batch(batch: PackedBatch, pad_to_multiple_of: int = 1) -> PackedBatch:
    """Lay the same groups out without prefix sharing: every response stands behind its own copy of the prompt."""
    rows = []
    for row in batch.rows:
        forests = [Trie.from_sequences(group.sequences, share=False) for group in row.groups]
        rows.append(Row.from_tries(row.groups, forests, pad_to_multiple_of=pad_to_multiple_of))
    return PackedBatch(rows, batch.totals)


def measure_step_times(trainer: DPOTrainer, rounds: int) -> StepTimes:
    """Time whole optimizer steps, shared and unshared in alternation, on the trainer's model and first batches.

    The weights stay as they are.
    """
    data, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    # a learning rate of zero does all the work of a step and changes nothing
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0)
    seconds: dict[str, list[float]] = {"shared": [], "unshared": []}
    gaps, laying_out = [], []
    untimed = 2  # first calls allocate and compile
    for turn in trange(rounds + untimed, desc="Timing steps, shared and unshared"):
        examples = [data[(turn * size + i) % len(data)] for i in range(size)]
        collated, taken = timed(partial(trainer.data_collator, examples), torch.device("cpu"))
        shared = collated["batch"]
        laying_out.append(taken)
        batches = {"shared": shared, "unshared": unshared_batch(shared, trainer.args.row_multiple)}
        losses = {}
        for kind in sorted(batches, reverse=bool(turn % 2)):
            batch = batches[kind].to(trainer.args.device)
            losses[kind], taken = timed(partial(_step, trainer, optimizer, batch), trainer.args.device)
            if turn >= untimed:
                seconds[kind].append(taken)
        gaps.append(abs(losses["shared"] - losses["unshared"]))
    return StepTimes(median(seconds["shared"]), median(seconds["unshared"]), max(gaps), median(laying_out[untimed:]))


def _step(trainer: DPOTrainer, optimizer: torch.optim.Optimizer, batch: PackedBatch) -> float:
    """Run one step and return its loss."""
    result = run_batch(
        trainer.model, batch, trainer.objective, reference=trainer.reference_logps, backward=torch.Tensor.backward
    )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(result.loss)
