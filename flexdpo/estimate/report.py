"""What an estimate says, as values and as aligned lines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from flexdpo.estimate.costs import find_machine
from flexdpo.show.table import aligned
from flexdpo.training.memory import gigabytes

if TYPE_CHECKING:
    from flexdpo.data.report import DataReport
    from flexdpo.estimate.counts import EpochTokens, Lengths, RepeatedPrompts
    from flexdpo.estimate.features import Feature
    from flexdpo.estimate.images import ImageCounts
    from flexdpo.estimate.lengths import SharedPrefixes
    from flexdpo.estimate.settings import EstimateSettings
    from flexdpo.estimate.stragglers import Straggler
    from flexdpo.estimate.suggest import Suggestion
    from flexdpo.training.memory import MemoryPrediction
    from flexdpo.training.model_size import ModelSize

_WIDTH = 112


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
        values = asdict(self)
        values["tokens"]["shared_share"] = self.tokens.shared_share
        values["is_sample"] = self.is_sample
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
    equal = "none"
    if repeated.rows:
        equal = (
            f"{repeated.rows:,} rows have one of {repeated.prompts:,} repeated prompts, at most {repeated.most:,} the "
            "same"
        )
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
    for name, of in (
        ("a prompt", lengths.prompt),
        ("a response", lengths.response),
        ("a row, prompt per response", lengths.unshared),
        ("a row, distinct", lengths.distinct),
    ):
        rows.append([f"  {name}", *(f"{value:,.0f}" for value in (of.mean, of.median, of.p90, of.p99, of.most))])
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
        over = "" if feature is first else f"{feature.speedup:.2f}"
        in_all = f"{first.seconds / feature.seconds:.2f}"
        rows.append([f"  {feature.label}", f"{feature.tokens:,}", f"{feature.flops:.2e}", over, in_all])
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
    for way, predicted in estimate.memory.items():
        parts = (gigabytes(getattr(predicted, name)) for name in names)
        rows.append([f"  {way}", f"{predicted.tokens:,}", *parts])
    return aligned(rows)


def _suggested(estimate: Estimate) -> str:
    suggestion = estimate.suggestion
    lines = [f"suggested for {gigabytes(suggestion.free)} of memory: {suggestion.options()}"]
    if suggestion.buckets is not None:
        lengths = ", ".join(map(str, suggestion.buckets.lengths))
        lines.append(f"  row lengths to compile kernels for: {lengths} ({suggestion.buckets.waste:.1%} padding)")
    return "\n".join(lines)


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
