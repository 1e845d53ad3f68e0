"""What each feature contributes: a sample of batches is laid out one feature after another, and its work counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexdpo.data.tokenize import group_from_row
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.costs import Load, Work, find_machine, padded_load, padded_work, row_load, row_work, step_seconds
from flexdpo.estimate.lengths import RowTokens, classes_of
from flexdpo.estimate.settings import EstimateSettings
from flexdpo.layout.groups import Group, PromptImage
from flexdpo.layout.packing import MIN_SHARED, best_fit_decreasing, pack
from flexdpo.training.model_size import ModelSize

if TYPE_CHECKING:
    from datasets import Dataset

_LABELS = {
    "padded": "padded batches, full logits",
    "packing": "packing: no padding",
    "targets": "log-probabilities at the targets only",
    "sharing": "prefix sharing within a group",
    "regrouping": "equal prompts regrouped",
    "across": "sharing across the examples of a batch",
}


@dataclass(frozen=True)
class Feature:
    """An epoch with one more feature than the one before it; ``regrouping`` and ``across`` stand on ``sharing``."""

    name: str  # ``"padded"``, ``"packing"``, ``"targets"``, ``"sharing"``, ``"regrouping"`` or ``"across"``
    label: str  # the same in words
    tokens: int  # that go through the layers in an epoch
    flops: float  # of an epoch, policy and reference
    # of an epoch on one such device; ratios of it are what is meant: it assumes a device that does nothing else
    seconds: float
    speedup: float  # over what it stands on; 1 for the first


class LongestRow(NamedTuple):
    """The longest forward call of an epoch: its tokens, padding included, and its targets."""

    tokens: int
    targets: int


@dataclass(frozen=True, eq=False)
class Layouts:
    """One epoch in a random order."""

    order: NDArray[np.int64]  # rows of the dataset in the order in which they come, ``[N]``
    padded_tokens: int  # of all padded batches
    longest_padded: int  # tokens of the largest padded batch
    longest_packed: LongestRow  # without sharing
    longest_shared: LongestRow  # with sharing within groups
    rows_per_batch: float  # on average
    sampled: tuple[tuple[Group, ...], ...]  # groups of some batches

    @classmethod
    def of(cls, dataset: Dataset, counted: RowTokens, settings: EstimateSettings, *, in_pieces: bool) -> Layouts:
        """Draw the order, and lay it out in batches of ``settings.per_device_train_batch_size``."""
        size, budget = settings.per_device_train_batch_size, settings.max_tokens_per_row
        if budget is not None:
            # an example that runs in pieces needs room for its longest sequence
            needed = counted.longest if in_pieces else counted.distinct
            room, index = budget // settings.row_multiple * settings.row_multiple, int(needed.argmax())
            if needed[index] > room:
                what = "tokens in its longest sequence" if in_pieces else "distinct tokens"
                raise FlexdpoError(
                    f"usable row {index} (counted from 0) has {needed[index]} {what} but max_tokens_per_row={budget} "
                    f"leaves room for {room}; raise max_tokens_per_row or lower max_length"
                )
        order = np.random.default_rng(settings.seed).permutation(counted.prompts.size)
        starts = np.arange(0, order.size, size)

        def sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.asarray(np.add.reduceat(values[order], starts))

        padded = np.maximum.reduceat(counted.longest[order], starts) * sums(counted.responses)
        response_tokens = counted.unshared - counted.prompts * counted.responses
        rows = first_rows(counted.distinct[order], size, budget)
        # enough that a ratio of sums is steady; more would take longer than it tells
        groups = _groups_at(dataset, order[: size * max(4, min(settings.batches, 1024 // size))])
        return cls(
            order=order,
            padded_tokens=int(padded.sum()),
            longest_padded=int(padded.max()),
            longest_packed=_longest(sums(counted.unshared), sums(response_tokens), settings),
            longest_shared=_longest(sums(counted.distinct), sums(counted.targets), settings),
            rows_per_batch=sum(map(len, rows)) / len(rows),
            sampled=tuple(tuple(groups[start : start + size]) for start in range(0, len(groups), size)),
        )


def _longest(tokens: NDArray[np.int64], targets: NDArray[np.int64], settings: EstimateSettings) -> LongestRow:
    index = int(tokens.argmax())
    length, multiple, bound = int(tokens[index]), settings.row_multiple, settings.max_tokens_per_row
    if bound is not None and length > bound:
        # rows are filled nearly to the bound, each with its part of the targets
        return LongestRow(bound, int(targets[index] * bound / length))
    return LongestRow(-(-length // multiple) * multiple, int(targets[index]))


def first_rows(distinct: NDArray[np.int64], size: int, budget: int | None) -> list[list[int]]:
    """Lengths of the shared rows of the first 512 batches of ``size`` groups each; one row without a ``budget``."""
    found = []
    for start in range(0, min(distinct.size, 512 * size), size):
        batch = distinct[start : start + size]
        bins = [list(range(batch.size))] if budget is None else best_fit_decreasing(batch.tolist(), budget)
        found.append([int(batch[members].sum()) for members in bins])
    return found


def _groups_at(dataset: Dataset, indices: NDArray[np.int64]) -> list[Group]:
    """The groups of some rows, in the order of ``indices``; read in the order of the file, which is quicker."""
    places, found = np.sort(indices).tolist(), {}
    for place, row in zip(places, dataset.select(places), strict=True):
        group = group_from_row(row)
        # what they look like changes no count, and reading them takes long
        unread = tuple(PromptImage(image.digest, image.tokens, {}) for image in group.images)
        found[place] = replace(group, images=unread) if unread else group
    return [found[place] for place in indices.tolist()]


class _Sample(NamedTuple):
    """What the sampled batches ask for under one feature."""

    work: Work
    loads: list[Load]
    head_passes: int = 4

    @classmethod
    def packed(
        cls, batches: Iterable[Sequence[Group]], *, size: ModelSize, settings: EstimateSettings, **options: Any
    ) -> _Sample:
        """Of batches as packed rows; ``options`` are those of :func:`flexdpo.pack`."""
        multiple, rows = settings.row_multiple, []
        for groups in batches:
            budget = settings.max_tokens_per_row
            if budget is not None:
                # groups merged for the comparison may be longer than the rows that were asked for
                longest = max(group.unshared_tokens for group in groups)
                budget = max(budget, -(-longest // multiple) * multiple)
            rows += pack(groups, budget, pad_to_multiple_of=multiple, limits=settings.limits, **options)
        loads = [row_load(row, size, find_machine(settings.device)) for row in rows]
        return cls(sum(map(row_work, rows), Work()), loads)

    def per_token(self, size: ModelSize, settings: EstimateSettings) -> tuple[float, float]:
        """Seconds and floating-point operations for each of its tokens, policy and reference."""
        reference = settings.reference
        again = {"checkpointing": settings.gradient_checkpointing, "keep_attention": settings.keep_attention}
        seconds = step_seconds(self.loads, size, find_machine(settings.device), reference=reference, **again)
        flops = self.work.training_flops(size, head_passes=self.head_passes, **again)
        flops += self.work.forward_flops(size) if reference else 0.0
        return seconds.total / self.work.tokens, flops / self.work.tokens


def features_of(
    dataset: Dataset, counted: RowTokens, layouts: Layouts, size: ModelSize, settings: EstimateSettings, regrouped: int
) -> tuple[Feature, ...]:
    """Predict an epoch under each feature; ``regrouped`` are its tokens once rows with equal prompts are merged."""
    packed = partial(_Sample.packed, size=size, settings=settings)

    def feature(name: str, sample: _Sample, tokens: int, before: Feature | None = None) -> Feature:
        """An epoch of so many tokens, for all of which the sample stands."""
        seconds, flops = (value * tokens for value in sample.per_token(size, settings))
        return Feature(name, _LABELS[name], tokens, flops, seconds, before.seconds / seconds if before else 1.0)

    batches, unshared, shared = layouts.sampled, int(counted.unshared.sum()), int(counted.distinct.sum())
    rows = _Sample(sum(map(padded_work, batches), Work()), list(map(padded_load, batches)), head_passes=3)
    padded = feature("padded", rows, layouts.padded_tokens)
    rows = packed(
        [replace(group, response_ids=(ids,), edges=()) for group in batch for ids in group.response_ids]
        for batch in batches
    )
    # the same rows with logits at every position, kept for the backward pass
    loads = [load._replace(targets=load.tokens, kept_logits=True) for load in rows.loads]
    logits = _Sample(replace(rows.work, targets=rows.work.tokens), loads, head_passes=3)
    packing = feature("packing", logits, unshared, padded)
    targets = feature("targets", rows, unshared, packing)
    rows = packed(batches)
    sharing = feature("sharing", rows, shared, targets)
    # without a beginning that two rows have in common, sharing across examples changes nothing
    keys = counted.prefix_keys[counted.prompts >= MIN_SHARED]
    merged = packed(batches, sharing="step") if np.unique(keys).size < keys.size else rows
    across = feature("across", merged, round(shared * merged.work.tokens / rows.work.tokens), sharing)
    seconds, flops = sharing.seconds * regrouped / shared, sharing.flops * regrouped / shared
    if regrouped < shared:
        # a token costs more or less when rows are merged, since its prompt is longer
        (alone_s, alone_flops), (merged_s, merged_flops) = (
            packed(each).per_token(size, settings) for each in _equal_prompts(dataset, counted, settings)
        )
        seconds, flops = seconds * merged_s / alone_s, flops * merged_flops / alone_flops
    gain = sharing.seconds / seconds
    regrouping = Feature("regrouping", _LABELS["regrouping"], regrouped, flops, seconds, gain)
    return padded, packing, targets, sharing, regrouping, across


def _equal_prompts(
    dataset: Dataset, counted: RowTokens, settings: EstimateSettings
) -> tuple[list[list[Group]], list[list[Group]]]:
    """Batches of all rows of some prompts that occur more than once: row by row, and merged into a group each."""
    numbers, counts = classes_of(counted.prompt_keys)
    repeated = np.random.default_rng(settings.seed).permutation(np.flatnonzero(counts > 1))[:128]
    separate: list[list[Group]] = []
    merged: list[list[Group]] = []
    for place, number in enumerate(repeated.tolist()):
        if place % settings.per_device_train_batch_size == 0:
            separate.append([])
            merged.append([])
        # one prompt may have thousands of rows; its first ones tell what merging them gains
        groups = list(map(group_from_row, dataset.select(np.flatnonzero(numbers == number)[:64].tolist())))
        separate[-1] += groups
        distinct = {ids.tobytes(): ids for group in groups for ids in group.response_ids}
        merged[-1].append(replace(groups[0], response_ids=tuple(distinct.values()), edges=()))
    return separate, merged
