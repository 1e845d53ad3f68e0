"""What an estimate says, as values and as aligned lines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from flexdpo.estimate.costs import find_machine
from flexdpo.training.memory import gigabytes

if TYPE_CHECKING:
    from flexdpo.data.tokenize import DataReport
    from flexdpo.estimate.advice import Suggestion
    from flexdpo.estimate.counts import EpochTokens, Lengths, RepeatedPrompts
    from flexdpo.estimate.features import Feature
    from flexdpo.estimate.lengths import SharedPrefixes
    from flexdpo.estimate.settings import EstimateSettings
    from flexdpo.training.memory import MemoryPrediction, ModelSize

_WIDTH = 112


@dataclass(frozen=True)
class Estimate:
    """The prediction for a dataset.

    Attributes:
        dataset_rows: Rows of the whole dataset; more than ``report.rows`` where a sample was used.
        features: What each feature contributes, each on top of those before it; the first is padded training.
        speedup: Predicted gain of a step with the settings as they are, over ``"padded"`` and ``"packed"`` training.
        rows_per_batch: Packed rows, and so forward passes, that a batch takes on average.
        memory: Predicted bytes at the peak of a step of ``"padded"``, ``"packed"`` and ``"shared"`` training.
        model: The sizes that work and memory were predicted with.
        advice: Plain sentences, the verdict first.
        worth_it: Whether sharing is predicted to gain at least a tenth over packed or padded training.
    """

    report: DataReport
    dataset_rows: int
    lengths: Lengths
    tokens: EpochTokens
    repeated: RepeatedPrompts
    prefixes: SharedPrefixes
    features: tuple[Feature, ...]
    speedup: dict[str, float]
    rows_per_batch: float
    memory: dict[str, MemoryPrediction]
    model: ModelSize
    suggestion: Suggestion
    advice: tuple[str, ...]
    worth_it: bool
    settings: EstimateSettings

    @property
    def is_sample(self) -> bool:
        """Whether only part of the dataset was looked at."""
        return self.report.rows < self.dataset_rows

    def as_json(self) -> dict[str, Any]:
        """Plain values, with totals beside the parts of memory."""
        values = asdict(self)
        values["tokens"]["shared_share"] = self.tokens.shared_share
        values["is_sample"] = self.is_sample
        for name, predicted in self.memory.items():
            values["memory"][name]["total"] = predicted.total
        return values

    def table(self) -> str:
        """The prediction for people: data, lengths, features, memory, settings and advice, about 40 lines."""
        parts = [_data(self), _lengths(self), _features(self), _memory(self), _suggested(self.suggestion)]
        advice = [line for text in self.advice for line in wrap(text, _WIDTH, subsequent_indent="  ")]
        return "\n\n".join([*parts, "\n".join(advice)])


def _data(estimate: Estimate) -> str:
    lines = [estimate.report.summary()]
    if estimate.is_sample:
        lines.append(
            f"  a random sample of {estimate.report.rows:,} of {estimate.dataset_rows:,} rows; totals are those of the "
            "sample, and fewer equal prompts meet in it than in the whole"
        )
    repeated, prefixes = estimate.repeated, estimate.prefixes
    lines.append(
        f"  equal prompts: {repeated.rows:,} rows have one of {repeated.prompts:,} repeated prompts, at most "
        f"{repeated.most:,} the same"
        if repeated.rows
        else "  equal prompts: none"
    )
    beginnings = f"  common beginnings: all prompts share {prefixes.common_to_all:,} tokens"
    if prefixes.rows:
        beginnings += (
            f";\n    {prefixes.rows:,} rows begin like another for 128 tokens or more, in {prefixes.classes:,} ways; "
            f"most often {prefixes.largest_rows:,} rows for {prefixes.largest_tokens:,} tokens"
        )
    return "\n".join([*lines, beginnings])


def _lengths(estimate: Estimate) -> str:
    lengths, tokens = estimate.lengths, estimate.tokens
    lines = [f"{'tokens of':<32}{'mean':>9}{'median':>9}{'90 %':>9}{'99 %':>9}{'most':>9}"]
    for name, of in (
        ("a prompt", lengths.prompt),
        ("a response", lengths.response),
        ("a row, prompt per response", lengths.unshared),
        ("a row, distinct", lengths.distinct),
    ):
        lines.append(f"  {name:<30}{of.mean:>9,.0f}{of.median:>9,}{of.p90:>9,}{of.p99:>9,}{of.most:>9,}")
    counts = ", ".join(f"{count:,} with {number}" for number, count in lengths.responses.items())
    saved = f"shared: {tokens.shared_share:.1%} of {tokens.unshared:,} tokens, so {tokens.shared:,} are run"
    return "\n".join([*lines, f"responses per prompt: {counts}", saved])


def _features(estimate: Estimate) -> str:
    settings, count = estimate.settings, estimate.model.parameters
    parameters = f"{count / 1e9:.2f} billion" if count >= 10**9 else f"{count / 1e6:.1f} million"
    lines = [
        f"an epoch of {estimate.model.name} ({parameters} parameters) on "
        f"{settings.device}, {settings.per_device_train_batch_size} rows a batch",
        f"{'':<42}{'tokens':>16}{'FLOPs':>14}{'speed-up':>11}{'in all':>9}",
    ]
    first = estimate.features[0]
    for feature in estimate.features:
        if feature.name in ("regrouping", "across") and feature.speedup == 1.0:
            continue
        over = "" if feature is first else f"{feature.speedup:.2f}"
        lines.append(
            f"  {feature.label:<40}{feature.tokens:>16,}{feature.flops:>14.2e}{over:>11}"
            f"{first.seconds / feature.seconds:>9.2f}"
        )
    speed = estimate.speedup
    lines.append(
        f"predicted speed-up of a step: {speed['packed']:.2f} over packed, {speed['padded']:.2f} over padded training"
    )
    lines += wrap(f"costs: {find_machine(settings.device).source}", _WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _memory(estimate: Estimate) -> str:
    names = ("weights", "gradients", "optimizer", "reference", "activations", "working")
    lines = [
        f"{'peak memory of a step':<24}{'longest':>10}" + "".join(f"{name:>13}" for name in names) + f"{'total':>13}"
    ]
    for way, predicted in estimate.memory.items():
        cells = "".join(f"{gigabytes(getattr(predicted, name)):>13}" for name in names)
        lines.append(f"  {way:<22}{predicted.tokens:>10,}{cells}{gigabytes(predicted.total):>13}")
    return "\n".join(lines)


def _suggested(suggestion: Suggestion) -> str:
    lines = [f"suggested for {gigabytes(suggestion.free)} of memory: {suggestion.options()}"]
    if suggestion.buckets is not None:
        lengths = ", ".join(map(str, suggestion.buckets.lengths))
        lines.append(f"  row lengths to compile kernels for: {lengths} ({suggestion.buckets.waste:.1%} padding)")
    return "\n".join(lines)
