"""Whole optimizer steps timed on a trainer's own model and data, with and without prefix sharing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from tqdm.auto import trange

from flexdpo.bench.timing import timed
from flexdpo.layout.row import Row
from flexdpo.layout.trie import Trie
from flexdpo.training.batch import PackedBatch
from flexdpo.training.step import Runner
from flexdpo.training.trainer import DPOTrainer


@dataclass(frozen=True)
class StepTimes:
    """One optimizer step on the same pairs, packed with and without prefix sharing; seconds are medians."""

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
    """Time steps, shared and unshared in alternation, on the trainer's first batches; its weights stay as they are."""
    data, args = trainer.train_dataset, trainer.args
    size, untimed = args.per_device_train_batch_size, 2  # first calls allocate and compile
    # a learning rate of zero does all the work of a step and changes nothing
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0)
    seconds, gaps = defaultdict[str, list[float]](list), []

    def step(batch: PackedBatch) -> float:
        result = Runner(trainer.model, trainer.objective, trainer.reference_logps, torch.Tensor.backward)(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(result.loss)

    for turn in trange(rounds + untimed, desc="Timing steps, shared and unshared"):
        examples = [data[(turn * size + i) % len(data)] for i in range(size)]
        collated, taken = timed(partial(trainer.data_collator, examples), torch.device("cpu"))
        seconds["laying out"].append(taken)
        batches = {"shared": collated["batch"], "unshared": unshared_batch(collated["batch"], args.row_multiple)}
        losses = {}
        for kind in sorted(batches, reverse=bool(turn % 2)):
            losses[kind], taken = timed(partial(step, batches[kind].to(args.device)), args.device)
            seconds[kind].append(taken)
        gaps.append(abs(losses["shared"] - losses["unshared"]))
    medians = {kind: median(each[untimed:]) for kind, each in seconds.items()}
    return StepTimes(medians["shared"], medians["unshared"], max(gaps), medians["laying out"])
