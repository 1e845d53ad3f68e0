"""What each feature contributes: a sample of batches is laid out one feature after another, and its work counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flexdpo.data.tokenize import group_from_row
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.costs import Load, find_machine, padded_load, row_load, step_seconds
from flexdpo.estimate.flops import Work, padded_work, row_work
from flexdpo.estimate.lengths import classes_of
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import MIN_SHARED, best_fit_decreasing, pack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from datasets import Dataset
    from numpy.typing import NDArray

    from flexdpo.estimate.lengths import RowTokens
    from flexdpo.estimate.settings import EstimateSettings
    from flexdpo.layout.row import Row
    from flexdpo.training.memory import ModelSize

_LABELS = {
    "padded": "padded batches, full logits",
    "packing": "packing: no padding",
    "targets": "log-probabilities at the targets only",
    "sharing": "prefix sharing within a group",
    "regrouping": "equal prompts regrouped",
    "across": "sharing across the examples of a batch",
}
# enough that a ratio of sums is steady; more would take longer than it tells
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

    Attributes:
        name: ``"padded"``, ``"packing"``, ``"targets"``, ``"sharing"``, ``"regrouping"`` or ``"across"``.
        label: The same in words.
        tokens: That go through the layers in an epoch.
        flops: Floating-point operations of an epoch, policy and reference.
        seconds: Predicted time of an epoch on one such device. Ratios of it are what is meant; by itself it assumes a
            device that does nothing else.
        speedup: Over what it stands on; 1 for the first.
    """

    name: str
    label: str
    tokens: int
    flops: float
    seconds: float
    speedup: float


class LongestRow(NamedTuple):
    """The longest forward call of an epoch: its tokens, padding included, and its targets."""

    tokens: int
    targets: int


@dataclass(frozen=True, eq=False)
class Layouts:
    """One epoch in a random order.

    Attributes:
        order: Rows of the dataset in the order in which they come, ``[N]`` int64.
        padded_tokens: Tokens of all padded batches.
        longest_padded: Tokens of the largest padded batch.
        longest_packed: The longest row without sharing.
        longest_shared: The longest row with sharing within groups.
        rows_per_batch: Rows that a batch takes, on average.
        sampled: Groups of some batches.
    """

    order: NDArray[np.int64]
    padded_tokens: int
    longest_padded: int
    longest_packed: LongestRow
    longest_shared: LongestRow
    rows_per_batch: float
    sampled: tuple[tuple[Group, ...], ...]

    @classmethod
    def of(cls, dataset: Dataset, counted: RowTokens, settings: EstimateSettings) -> Layouts:
        """Draw the order, and lay it out in batches of ``settings.per_device_train_batch_size``."""
        size, budget = settings.per_device_train_batch_size, settings.max_tokens_per_row
        _require_room(counted, budget, settings.row_multiple)
        order = np.random.default_rng(settings.seed).permutation(len(counted))
        starts = np.arange(0, order.size, size)
        padded = np.maximum.reduceat(counted.longest[order], starts) * np.add.reduceat(counted.responses[order], starts)
        sums = {
            name: np.add.reduceat(values[order], starts)
            for name, values in (
                ("unshared", counted.unshared),
                ("distinct", counted.distinct),
                ("response_tokens", counted.unshared - counted.prompts * counted.responses),
                ("targets", counted.targets),
            )
        }
        rows = first_rows(counted.distinct[order], size, budget)
        return cls(
            order=order,
            padded_tokens=int(padded.sum()),
            longest_padded=int(padded.max()),
            longest_packed=_longest(sums["unshared"], sums["response_tokens"], settings),
            longest_shared=_longest(sums["distinct"], sums["targets"], settings),
            rows_per_batch=sum(map(len, rows)) / len(rows),
            sampled=_sampled(dataset, order, settings),
        )


def _require_room(counted: RowTokens, budget: int | None, multiple: int) -> None:
    if budget is None:
        return
    room = budget // multiple * multiple
    index = int(counted.distinct.argmax())
    if counted.distinct[index] > room:
        raise FlexdpoError(
            f"usable row {index} (counted from 0) has {counted.distinct[index]} distinct tokens but "
            f"max_tokens_per_row={budget} leaves room for {room}; raise max_tokens_per_row or lower max_length"
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

    Args:
        distinct: Tokens of each group, in order, ``[N]`` int64.
        size: Groups of a batch.
        budget: Longest row; ``None`` puts a batch into one row.
    """
    found = []
    for start in range(0, min(distinct.size, _LAID_OUT_BATCHES * size), size):
        batch = distinct[start : start + size]
        bins = [list(range(batch.size))] if budget is None else best_fit_decreasing(batch.tolist(), budget)
        found.append([int(batch[members].sum()) for members in bins])
    return found


def _sampled(dataset: Dataset, order: NDArray[np.int64], settings: EstimateSettings) -> tuple[tuple[Group, ...], ...]:
    size = settings.per_device_train_batch_size
    count = max(_FEWEST_BATCHES, min(settings.batches, _MOST_SAMPLED_GROUPS // size))
    chosen = order[: count * size]
    groups = _groups_at(dataset, chosen)
    return tuple(tuple(groups[start : start + size]) for start in range(0, len(groups), size))


def _groups_at(dataset: Dataset, indices: NDArray[np.int64]) -> list[Group]:
    """The groups of some rows, in the order of ``indices``; read in the order of the file, which is quicker."""
    ranked = np.argsort(indices, kind="stable")
    found: list[Any] = [None] * len(indices)
    for place, row in zip(ranked.tolist(), dataset.select(indices[ranked].tolist()), strict=True):
        found[place] = group_from_row(row)
    return found


# --- one feature after another ---------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """What the sampled batches ask for under one feature."""

    tokens: int
    work: Work
    loads: list[Load]
    head_passes: int = 4


class EpochCost(NamedTuple):
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
        return _Sample(sum(row.num_tokens for row in rows), work, [row_load(row, self.size, machine) for row in rows])

    def of_sample(self, sample: _Sample) -> tuple[float, float]:
        """Seconds and floating-point operations of a sample, policy and reference."""
        settings, machine = self.settings, find_machine(self.settings.device)
        checkpointing = settings.gradient_checkpointing
        seconds = step_seconds(
            sample.loads, self.size, machine, checkpointing=checkpointing, reference=settings.reference
        ).total
        flops = sample.work.training_flops(self.size, checkpointing=checkpointing, head_passes=sample.head_passes)
        return seconds, flops + (sample.work.forward_flops(self.size) if settings.reference else 0.0)


def features_of(
    dataset: Dataset, counted: RowTokens, layouts: Layouts, cost: EpochCost, *, regrouped: int
) -> tuple[Feature, ...]:
    """Predict an epoch of a tokenised dataset under each feature.

    ``regrouped`` are its exact tokens once rows with equal prompts are merged.
    """
    batches = layouts.sampled
    unshared, shared = int(counted.unshared.sum()), int(counted.distinct.sum())
    padded_work_all = sum((padded_work(batch) for batch in batches), Work(0, 0, 0))
    padded = _Sample(padded_work_all.tokens, padded_work_all, [padded_load(batch) for batch in batches], head_passes=3)
    apart = cost.of_rows([_apart(batch) for batch in batches])
    sharing = cost.of_rows(batches)
    # without a beginning that two rows have in common, sharing across examples changes nothing
    across = cost.of_rows(batches, sharing="step") if _has_shared_prefixes(counted) else sharing
    samples = {
        "padded": (padded, layouts.padded_tokens),
        "packing": (_with_all_logits(apart), unshared),
        "targets": (apart, unshared),
        "sharing": (sharing, shared),
        "across": (across, round(shared * across.tokens / sharing.tokens)),
    }
    features: dict[str, Feature] = {}
    before: float | None = None
    for name, (sample, tokens) in samples.items():
        # the sample stands for all tokens of the epoch
        seconds, flops = (value * tokens / sample.tokens for value in cost.of_sample(sample))
        features[name] = Feature(
            name, _LABELS[name], tokens, flops, seconds, 1.0 if before is None else before / seconds
        )
        before = seconds
    seconds, flops = features["sharing"].seconds * regrouped / shared, features["sharing"].flops * regrouped / shared
    if regrouped < shared:
        # a token costs more or less when rows are merged, since its prompt is longer
        alone, merged = (cost.of_rows(each) for each in _equal_prompts(dataset, counted, cost.settings))
        (alone_s, alone_flops), (merged_s, merged_flops) = cost.of_sample(alone), cost.of_sample(merged)
        seconds *= merged_s / merged.tokens / (alone_s / alone.tokens)
        flops *= merged_flops / merged.tokens / (alone_flops / alone.tokens)
    gain = features["sharing"].seconds / seconds
    regrouping = Feature("regrouping", _LABELS["regrouping"], regrouped, flops, seconds, gain)
    return (*(features[name] for name in ("padded", "packing", "targets", "sharing")), regrouping, features["across"])


def _with_all_logits(sample: _Sample) -> _Sample:
    """The same rows with logits at every position, kept for the backward pass."""
    loads = [load._replace(targets=load.tokens, kept_logits=True) for load in sample.loads]
    return _Sample(
        sample.tokens, Work(sample.work.tokens, sample.work.scores, sample.work.tokens), loads, head_passes=3
    )


def _apart(groups: Sequence[Group]) -> list[Group]:
    return [Group(group.prompt_ids, (ids,), (), group.name) for group in groups for ids in group.response_ids]


def _has_shared_prefixes(counted: RowTokens) -> bool:
    keys = counted.prefix_keys[counted.prompts >= MIN_SHARED]
    return bool(np.unique(keys).size < keys.size)


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
    return Group(groups[0].prompt_ids, tuple(responses.values()), (), groups[0].name)
