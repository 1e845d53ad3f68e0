"""What an estimate says, as values and as aligned lines."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexdpo.data.report import DataReport
from flexdpo.estimate.costs import find_machine
from flexdpo.estimate.features import Feature
from flexdpo.estimate.images import ImageCounts
from flexdpo.estimate.lengths import RowTokens, SharedPrefixes, classes_of
from flexdpo.estimate.settings import EstimateSettings
from flexdpo.estimate.stragglers import Straggler
from flexdpo.estimate.suggest import Suggestion
from flexdpo.show.table import aligned
from flexdpo.training.memory import MemoryPrediction, gigabytes
from flexdpo.training.model_size import ModelSize

_WIDTH = 112


@dataclass(frozen=True)
class Spread:
    """How a number is distributed over rows or responses."""

    mean: float
    median: int
    p90: int
    p99: int
    most: int

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> Spread:
        """The spread of at least one value."""
        median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99], method="higher").tolist()
        return cls(float(values.mean()), int(median), int(p90), int(p99), int(values.max()))


@dataclass(frozen=True)
class Lengths:
    """Tokens of the used rows, and how many rows have ``K`` responses."""

    prompt: Spread
    response: Spread
    longest: Spread  # a prompt with its longest response
    unshared: Spread  # a row as an ordinary trainer runs it, its prompt once for each response
    distinct: Spread  # its trie
    responses: dict[int, int]

    @classmethod
    def of(cls, counted: RowTokens) -> Lengths:
        """The lengths of counted rows."""
        columns = (counted.prompts, counted.response_tokens, counted.longest, counted.unshared, counted.distinct)
        numbers, counts = np.unique(counted.responses, return_counts=True)
        prompt, response, longest, unshared, distinct = map(Spread.of, columns)
        responses = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        return cls(prompt, response, longest, unshared, distinct, responses)


@dataclass(frozen=True)
class EpochTokens:
    """Tokens of one epoch, in the order of what is saved. All but ``padded`` and ``across`` are exact."""

    padded: int  # as an ordinary trainer runs them in batches padded to their longest
    unshared: int  # the same without padding: the trainer's ``tokens/unshared``
    shared: int  # with every group's prompt once: the trainer's ``tokens/run``, under ``sharing="group"``
    regrouped: int  # with rows that have the same prompt merged (``regroup_prompts=True``)
    across: int  # with common beginnings of the examples of a batch shared as well (``sharing="step"``)
    targets: int  # distinct response tokens, whose log-probabilities are computed

    @property
    def shared_share(self) -> float:
        """Share of an ordinary trainer's tokens that are never run, padding not counted."""
        return 1 - self.shared / self.unshared


@dataclass(frozen=True)
class RepeatedPrompts:
    """Distinct prompts that occur more than once, the rows that have one, and how many rows have the commonest."""

    prompts: int
    rows: int
    most: int

    @classmethod
    def of(cls, counted: RowTokens) -> RepeatedPrompts:
        """Those of counted rows."""
        _, counts = classes_of(counted.prompt_keys)
        repeated = counts[counts > 1]
        return cls(int(repeated.size), int(repeated.sum()), int(counts.max()))


@dataclass(frozen=True)
class Estimate:
    """The prediction for a dataset."""

    report: DataReport
    dataset_rows: int  # of the whole; more than ``report.rows`` where a sample was used
    lengths: Lengths
    tokens: EpochTokens
    repeated: RepeatedPrompts
    prefixes: SharedPrefixes
    features: tuple[Feature, ...]  # each on top of those before it; the first is padded training
    speedup: dict[str, float]  # of a step with the settings as they are, over ``"padded"`` and ``"packed"`` training
    rows_per_batch: float  # packed rows, and so forward passes, that a batch takes on average
    memory: dict[str, MemoryPrediction]  # peak of a step of ``"padded"``, ``"packed"`` and ``"shared"`` training
    model: ModelSize
    suggestion: Suggestion
    settings: EstimateSettings
    images: ImageCounts | None = None
    stragglers: tuple[Straggler, ...] = ()  # for each number of processes that was asked for
    worth_it: bool = False  # whether sharing is predicted to gain at least a tenth over packed or padded training
    advice: tuple[str, ...] = ()  # plain sentences, the verdict first

    @property
    def is_sample(self) -> bool:
        """Whether only part of the dataset was looked at."""
        return self.report.rows < self.dataset_rows

    def as_json(self) -> dict[str, Any]:
        """Plain values, with totals beside the parts of memory."""
        values = {**asdict(self), "is_sample": self.is_sample}
        values["tokens"]["shared_share"] = self.tokens.shared_share
        for name, predicted in self.memory.items():
            values["memory"][name]["total"] = predicted.total
        return values

    def table(self) -> str:
        """The prediction for people: data, lengths, features, memory, settings and advice, about 40 lines."""
        advice = "\n".join(line for text in self.advice for line in wrap(text, _WIDTH, subsequent_indent="  "))
        parts = [_data(self), _lengths(self), _features(self), _memory(self), _suggested(self)]
        return "\n\n".join([*parts, *([_stragglers(self)] if self.stragglers else []), advice])


def _data(estimate: Estimate) -> str:
    report, repeated, prefixes = estimate.report, estimate.repeated, estimate.prefixes
    lines = [report.summary()]
    if estimate.is_sample:
        lines.append(
            f"  a random sample of {report.rows:,} of {estimate.dataset_rows:,} rows; totals are those of the "
            "sample, and fewer equal prompts meet in it than in the whole"
        )
    of = f"{repeated.rows:,} rows have one of {repeated.prompts:,} repeated prompts, at most {repeated.most:,} the same"
    equal = of if repeated.rows else "none"
    beginnings = f"all prompts share {prefixes.common_to_all:,} tokens"
    if prefixes.rows:
        beginnings += (
            f";\n    {prefixes.rows:,} rows begin like another for 128 tokens or more, in {prefixes.classes:,} ways; "
            f"most often {prefixes.largest_rows:,} rows for {prefixes.largest_tokens:,} tokens"
        )
    if estimate.images is not None:
        lines.append(f"  {estimate.images.line()}")
    return "\n".join([*lines, f"  equal prompts: {equal}", f"  common beginnings: {beginnings}"])


def _lengths(estimate: Estimate) -> str:
    lengths, tokens = estimate.lengths, estimate.tokens
    rows = [["tokens of", "mean", "median", "90 %", "99 %", "most"]]
    for name, of in {
        "a prompt": lengths.prompt,
        "a response": lengths.response,
        "a row, prompt per response": lengths.unshared,
        "a row, distinct": lengths.distinct,
    }.items():
        rows.append([f"  {name}", *(f"{value:,.0f}" for value in astuple(of))])
    counts = ", ".join(f"{count:,} with {number}" for number, count in lengths.responses.items())
    saved = f"shared: {tokens.shared_share:.1%} of {tokens.unshared:,} tokens, so {tokens.shared:,} are run"
    return "\n".join([aligned(rows), f"responses per prompt: {counts}", saved])


def _features(estimate: Estimate) -> str:
    settings, count, speed = estimate.settings, estimate.model.parameters, estimate.speedup
    parameters = f"{count / 1e9:.2f} billion" if count >= 10**9 else f"{count / 1e6:.1f} million"
    first = estimate.features[0]
    rows = [["", "tokens", "FLOPs", "speed-up", "in all"]]
    for feature in estimate.features:
        if feature.name in ("regrouping", "across") and feature.speedup == 1.0:
            continue
        gains = ["" if feature is first else f"{feature.speedup:.2f}", f"{first.seconds / feature.seconds:.2f}"]
        rows.append([f"  {feature.label}", f"{feature.tokens:,}", f"{feature.flops:.2e}", *gains])
    return "\n".join([
        f"an epoch of {estimate.model.name} ({parameters} parameters) on {settings.device}, "
        f"{settings.per_device_train_batch_size} rows a batch",
        aligned(rows),
        f"predicted speed-up of a step: {speed['packed']:.2f} over packed, {speed['padded']:.2f} over padded training",
        *wrap(f"costs: {find_machine(settings.device).source}", _WIDTH, initial_indent="  ", subsequent_indent="  "),
    ])  # fmt: skip


def _memory(estimate: Estimate) -> str:
    names = ("weights", "gradients", "optimizer", "reference", "activations", "working", "total")
    rows = [["peak memory of a step", "longest", *names]]
    for way, of in estimate.memory.items():
        rows.append([f"  {way}", f"{of.tokens:,}", *(gigabytes(getattr(of, name)) for name in names)])
    return aligned(rows)


def _suggested(estimate: Estimate) -> str:
    suggestion, buckets = estimate.suggestion, estimate.suggestion.buckets
    line = f"suggested for {gigabytes(suggestion.free)} of memory: {suggestion.options()}"
    if buckets is None:
        return line
    lengths = ", ".join(map(str, buckets.lengths))
    return f"{line}\n  row lengths to compile kernels for: {lengths} ({buckets.waste:.1%} padding)"


def _stragglers(estimate: Estimate) -> str:
    rows = [["processes", "examples a step", "unbalanced", "balanced"]]
    for found in estimate.stragglers:
        balanced = "-" if found.balanced is None else f"{found.balanced:.1%}"
        rows.append([f"  {found.processes:,}", f"{found.examples:,}", f"{found.unbalanced:.1%}", balanced])
    lines = ["how much more the slowest process of a step costs than the mean of all (computed):", aligned(rows)]
    if estimate.stragglers[-1].balanced is None:
        lines.append("  the trainer balances examples of one pair each, and no others")
    if short := [found for found in estimate.stragglers if found.repeats]:
        lines.append(f"  from {short[0].processes:,} on, a step takes more examples than there are: some were repeated")
    return "\n".join(lines)
