"""What each feature contributes: a sample of batches is laid out one feature after another, and its work counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flexdpo.data.tokenize import group_from_row
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.costs import Load, find_machine, padded_load, row_load, step_seconds
from flexdpo.estimate.flops import Work, padded_work, row_work
from flexdpo.estimate.lengths import classes_of
from flexdpo.layout.groups import Group
from flexdpo.layout.images import PromptImage
from flexdpo.layout.packing import MIN_SHARED, best_fit_decreasing, pack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from datasets import Dataset
    from numpy.typing import NDArray

    from flexdpo.estimate.lengths import RowTokens
    from flexdpo.estimate.settings import EstimateSettings
    from flexdpo.layout.row import Row
    from flexdpo.training.model_size import ModelSize

_LABELS = {
    "padded": "padded batches, full logits",
    "packing": "packing: no padding",
    "targets": "log-probabilities at the targets only",
    "sharing": "prefix sharing within a group",
    "regrouping": "equal prompts regrouped",
    "across": "sharing across the examples of a batch",
}
_MOST_SAMPLED_GROUPS = 1024
_FEWEST_BATCHES = 4
_LAID_OUT_BATCHES = 512
# one prompt may have thousands of rows; its first ones tell what merging them gains
_MOST_ROWS_OF_A_PROMPT = 64
_SAMPLED_PROMPTS = 128


@dataclass(frozen=True)
class Feature:
    """An epoch with one more feature than the one before it.

    ``regrouping`` and ``across`` both stand on ``sharing``; they are not added up.
    """

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
    def of(cls, dataset: Dataset, counted: RowTokens, settings: EstimateSettings) -> Layouts:
        """Draw the order, and lay it out in batches of ``settings.per_device_train_batch_size``."""
        size, budget = settings.per_device_train_batch_size, settings.max_tokens_per_row
        if budget is not None:
            room, index = budget // settings.row_multiple * settings.row_multiple, int(counted.distinct.argmax())
            if counted.distinct[index] > room:
                raise FlexdpoError(
                    f"usable row {index} (counted from 0) has {counted.distinct[index]} distinct tokens but "
                    f"max_tokens_per_row={budget} leaves room for {room}; raise max_tokens_per_row or lower max_length"
                )
        order = np.random.default_rng(settings.seed).permutation(len(counted))
        starts = np.arange(0, order.size, size)

        def sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.asarray(np.add.reduceat(values[order], starts))

        padded = np.maximum.reduceat(counted.longest[order], starts) * sums(counted.responses)
        response_tokens = counted.unshared - counted.prompts * counted.responses
        rows = first_rows(counted.distinct[order], size, budget)
        # enough that a ratio of sums is steady; more would take longer than it tells
        sampled = max(_FEWEST_BATCHES, min(settings.batches, _MOST_SAMPLED_GROUPS // size))
        groups = _groups_at(dataset, order[: sampled * size])
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
    length, multiple = int(tokens[index]), settings.row_multiple
    bound = settings.max_tokens_per_row
    if bound is not None and length > bound:
        # rows are filled nearly to the bound, each with its part of the targets
        return LongestRow(bound, int(targets[index] * bound / length))
    return LongestRow(-(-length // multiple) * multiple, int(targets[index]))


def first_rows(distinct: NDArray[np.int64], size: int, budget: int | None) -> list[list[int]]:
    """Lengths of the shared rows of each of the first 512 batches, padding not counted.

    ``distinct`` are the tokens of each group in order, ``size`` of which are a batch; without a ``budget`` that is one
    row.
    """
    found = []
    for start in range(0, min(distinct.size, _LAID_OUT_BATCHES * size), size):
        batch = distinct[start : start + size]
        bins = [list(range(batch.size))] if budget is None else best_fit_decreasing(batch.tolist(), budget)
        found.append([int(batch[members].sum()) for members in bins])
    return found


def _groups_at(dataset: Dataset, indices: NDArray[np.int64]) -> list[Group]:
    """The groups of some rows, in the order of ``indices``; read in the order of the file, which is quicker."""
    ranked = np.argsort(indices, kind="stable")
    found: list[Any] = [None] * len(indices)
    for place, row in zip(ranked.tolist(), dataset.select(indices[ranked].tolist()), strict=True):
        group = group_from_row(row)
        # what they look like changes no count, and reading them takes long
        unread = tuple(PromptImage(image.digest, image.tokens, {}) for image in group.images)
        found[place] = replace(group, images=unread) if unread else group
    return found


# --- one feature after another ---------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """What the sampled batches ask for under one feature."""

    work: Work
    loads: list[Load]
    head_passes: int = 4


class _EpochCost(NamedTuple):
    """The model and the settings that work is counted for."""

    size: ModelSize
    settings: EstimateSettings

    def of_rows(self, batches: Iterable[Sequence[Group]], **options: Any) -> _Sample:
        """What batches ask for as packed rows; ``options`` are those of :func:`flexdpo.pack`."""
        machine, multiple = find_machine(self.settings.device), self.settings.row_multiple
        rows: list[Row] = []
        for groups in batches:
            budget = self.settings.max_tokens_per_row
            if budget is not None:
                # groups merged for the comparison may be longer than the rows that were asked for
                longest = max(group.unshared_tokens for group in groups)
                budget = max(budget, -(-longest // multiple) * multiple)
            rows += pack(groups, budget, pad_to_multiple_of=multiple, limits=self.settings.limits, **options)
        work = sum((row_work(row) for row in rows), Work(0, 0, 0))
        return _Sample(work, [row_load(row, self.size, machine) for row in rows])

    def per_token(self, sample: _Sample) -> tuple[float, float]:
        """Seconds and floating-point operations of a sample for each of its tokens, policy and reference."""
        settings, work = self.settings, sample.work
        reference = settings.reference
        again = {"checkpointing": settings.gradient_checkpointing, "keep_attention": settings.keep_attention}
        seconds = step_seconds(sample.loads, self.size, find_machine(settings.device), reference=reference, **again)
        flops = work.training_flops(self.size, head_passes=sample.head_passes, **again)
        flops += work.forward_flops(self.size) if reference else 0.0
        return seconds.total / work.tokens, flops / work.tokens

    def feature(self, name: str, sample: _Sample, tokens: int, before: Feature | None) -> Feature:
        """An epoch of so many tokens, for all of which the sample stands."""
        seconds, flops = (value * tokens for value in self.per_token(sample))
        return Feature(name, _LABELS[name], tokens, flops, seconds, before.seconds / seconds if before else 1.0)


def features_of(
    dataset: Dataset,
    counted: RowTokens,
    layouts: Layouts,
    size: ModelSize,
    settings: EstimateSettings,
    *,
    regrouped: int,
) -> tuple[Feature, ...]:
    """Predict an epoch of a tokenised dataset under each feature.

    ``regrouped`` are its exact tokens once rows with equal prompts are merged.
    """
    cost, batches = _EpochCost(size, settings), layouts.sampled
    unshared, shared = int(counted.unshared.sum()), int(counted.distinct.sum())
    work = sum((padded_work(batch) for batch in batches), Work(0, 0, 0))
    padded_batches = _Sample(work, [padded_load(batch) for batch in batches], head_passes=3)
    padded = cost.feature("padded", padded_batches, layouts.padded_tokens, None)
    rows = cost.of_rows([[_with(group, (ids,)) for group in batch for ids in group.response_ids] for batch in batches])
    packing = cost.feature("packing", _with_all_logits(rows), unshared, padded)
    targets = cost.feature("targets", rows, unshared, packing)
    rows = cost.of_rows(batches)
    sharing = cost.feature("sharing", rows, shared, targets)
    # without a beginning that two rows have in common, sharing across examples changes nothing
    keys = counted.prefix_keys[counted.prompts >= MIN_SHARED]
    merged = cost.of_rows(batches, sharing="step") if np.unique(keys).size < keys.size else rows
    across = cost.feature("across", merged, round(shared * merged.work.tokens / rows.work.tokens), sharing)
    seconds, flops = sharing.seconds * regrouped / shared, sharing.flops * regrouped / shared
    if regrouped < shared:
        # a token costs more or less when rows are merged, since its prompt is longer
        (alone_s, alone_flops), (merged_s, merged_flops) = (
            cost.per_token(cost.of_rows(each)) for each in _equal_prompts(dataset, counted, settings)
        )
        seconds, flops = seconds * merged_s / alone_s, flops * merged_flops / alone_flops
    gain = sharing.seconds / seconds
    regrouping = Feature("regrouping", _LABELS["regrouping"], regrouped, flops, seconds, gain)
    return padded, packing, targets, sharing, regrouping, across


def _with_all_logits(sample: _Sample) -> _Sample:
    """The same rows with logits at every position, kept for the backward pass."""
    loads = [load._replace(targets=load.tokens, kept_logits=True) for load in sample.loads]
    return _Sample(Work(sample.work.tokens, sample.work.scores, sample.work.tokens), loads, head_passes=3)


def _equal_prompts(
    dataset: Dataset, counted: RowTokens, settings: EstimateSettings
) -> tuple[list[list[Group]], list[list[Group]]]:
    """Batches of all rows of some prompts that occur more than once: row by row, and merged into a group each."""
    numbers, counts = classes_of(counted.prompt_keys)
    repeated = np.random.default_rng(settings.seed).permutation(np.flatnonzero(counts > 1))[:_SAMPLED_PROMPTS]
    by_prompt: list[list[Group]] = []
    for number in repeated.tolist():
        members = np.flatnonzero(numbers == number)[:_MOST_ROWS_OF_A_PROMPT]
        by_prompt.append([group_from_row(row) for row in dataset.select(members.tolist())])
    size = settings.per_device_train_batch_size
    batches = [by_prompt[start : start + size] for start in range(0, len(by_prompt), size)]
    separate = [[group for groups in batch for group in groups] for batch in batches]
    return separate, [[_merged(groups) for groups in batch] for batch in batches]


def _merged(groups: Sequence[Group]) -> Group:
    """One group of all distinct responses to a prompt."""
    responses = {ids.tobytes(): ids for group in groups for ids in group.response_ids}
    return _with(groups[0], tuple(responses.values()))


def _with(group: Group, responses: tuple[NDArray[np.int64], ...]) -> Group:
    """The prompt of a group with other responses, of which none is preferred."""
    images, token_id = group.images, group.image_token_id
    return Group(group.prompt_ids, responses, (), group.name, images=images, image_token_id=token_id)
