"""What an estimate says: values, aligned lines, and plain words."""

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
from flexdpo.layout.packing import MIN_SHARED
from flexdpo.show.table import aligned
from flexdpo.training.memory import MARGIN, MemoryPrediction, gigabytes
from flexdpo.training.model_size import ModelSize

_WIDTH = 112
# below this a step is not noticeably faster
_WORTH_IT = 1.10


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
            f";\n    {prefixes.rows:,} rows begin like another for {MIN_SHARED} tokens or more, in "
            f"{prefixes.classes:,} ways; most often {prefixes.largest_rows:,} rows for "
            f"{prefixes.largest_tokens:,} tokens"
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


def gains_over(features: dict[str, Feature], chosen: Feature) -> dict[str, float]:
    """Over padded training, and over packed training, which computes log-probabilities at the targets too."""
    baselines = {"padded": "padded", "packed": "targets"}
    return {name: features[other].seconds / chosen.seconds for name, other in baselines.items()}


def advise(estimate: Estimate) -> tuple[bool, tuple[str, ...]]:
    """Say whether it is worth it, and what to do; the verdict comes first."""
    suggestion, repeated, prefixes = estimate.suggestion, estimate.repeated, estimate.prefixes
    features = {feature.name: feature for feature in estimate.features}
    possible = ["sharing"] + ["regrouping"] * suggestion.regroup_prompts + ["across"] * (suggestion.sharing == "step")
    best = gains_over(features, min((features[name] for name in possible), key=lambda feature: feature.seconds))
    lines = [_verdict(best, f"{estimate.tokens.shared_share:.0%} of the tokens are repeated prompts or beginnings")]
    if suggestion.regroup_prompts:
        lines.append(
            f"Set regroup_prompts=True: {repeated.rows:,} rows share {repeated.prompts:,} prompts, and merging them "
            f"makes an epoch {features['regrouping'].speedup:.2f} times faster. A batch then counts groups, so other "
            "preferences meet in a step."
        )
    if suggestion.sharing == "step":
        lines.append(
            f"Set sharing='step': {prefixes.rows:,} rows begin like another row for at least {MIN_SHARED} tokens, and "
            f"sharing that within a batch makes an epoch {features['across'].speedup:.2f} times faster. It grows with "
            "the batch."
        )
    elif prefixes.rows and estimate.settings.sharing == "group":
        lines.append(
            f"{prefixes.rows:,} rows begin like another row for at least {MIN_SHARED} tokens, but such rows seldom "
            f"meet in a batch of {estimate.settings.per_device_train_batch_size}, so sharing='step' gains less than "
            "3 %."
        )
    return max(best.values()) >= _WORTH_IT, (*lines, *_data_advice(estimate), *_memory_advice(estimate))


def _verdict(best: dict[str, float], saved: str) -> str:
    if best["packed"] >= _WORTH_IT:
        return (
            f"Worth it: {saved}, and steps should be {best['packed']:.2f} times faster than packed and "
            f"{best['padded']:.2f} times faster than padded training."
        )
    if best["padded"] >= _WORTH_IT:
        return (
            f"Worth it over padded training only: {saved}. Steps should be {best['padded']:.2f} times faster than "
            f"padded, but just {best['packed']:.2f} times faster than packed training: if you pack already, it is not "
            "worth switching."
        )
    return (
        f"Not worth it: {saved}, and steps would be only {best['padded']:.2f} times faster than padded training. Long "
        "responses behind short prompts leave little to share; keep the trainer you have."
    )


def _data_advice(estimate: Estimate) -> list[str]:
    report, longest, common = estimate.report, estimate.settings.max_length, estimate.prefixes.common_to_all
    lines = []
    if too_long := report.skipped.get("prompt alone fills max_length", 0):
        lines.append(
            f"{too_long:,} rows are left out because the prompt alone fills max_length={longest}; raise "
            "max_length to keep them, and prompts that long are where sharing gains most."
        )
    if report.truncated > 0.05 * report.used:
        lines.append(
            f"{report.truncated / report.used:.0%} of the rows are cut to max_length={longest}; raise it "
            "unless that is meant."
        )
    if 16 <= common < MIN_SHARED:
        lines.append(
            f"All prompts begin with the same {common} tokens, which is too short to be shared across "
            f"examples: below {MIN_SHARED} tokens, one tile of attention, it would cost more than it saves."
        )
    return lines


def _memory_advice(estimate: Estimate) -> list[str]:
    memory, suggestion, asked = estimate.memory, estimate.suggestion, estimate.settings.training_setup
    free = gigabytes(suggestion.free)
    if not suggestion.fits:
        return [
            f"Training all weights needs about {gigabytes(memory['shared'].fixed)} before the first token, and a "
            f"device with {free} has no room for it: shard it over several devices (FSDP, ZeRO-3) or train an adapter."
        ]
    lines = []
    changed = ["activation_checkpointing"] * (suggestion.activation_checkpointing and not asked.gradient_checkpointing)
    changed += ["keep_attention"] * (suggestion.keep_attention and not asked.keeps_attention)
    changed += ["precompute_ref_log_probs"] * suggestion.precompute_ref_log_probs
    if changed:
        lines.append(f"Set {' and '.join(f'{name}=True' for name in changed)}, so that a row fits into {free}.")
    elif suggestion.max_tokens_per_row is not None:
        lines.append(
            f"Set max_tokens_per_row={suggestion.max_tokens_per_row}: the pairs of a step are then run in rows that "
            "fit into memory, and what is learned stays the same."
        )
    if memory["padded"].total > suggestion.free * (1 - MARGIN) >= memory["shared"].total:
        lines.append(
            f"A padded batch of this size would need {gigabytes(memory['padded'].total)} and not fit; the longest "
            f"shared row needs {gigabytes(memory['shared'].total)}."
        )
    return lines
