"""An estimate as aligned lines."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

from flexdpo.estimate.costs import find_machine
from flexdpo.training.memory import gigabytes

if TYPE_CHECKING:
    from flexdpo.estimate.estimate import Estimate, Spread

_WIDTH = 112


def estimate_table(estimate: Estimate) -> str:
    """The whole prediction: data, lengths, features, memory, settings and advice, about 40 lines."""
    parts = [
        _data(estimate),
        _lengths(estimate),
        _features(estimate),
        _memory(estimate),
        _settings(estimate),
        "\n".join(line for text in estimate.advice for line in wrap(text, _WIDTH, subsequent_indent="  ")),
    ]
    return "\n\n".join(parts)


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
    counts = ", ".join(f"{count:,} with {number}" for number, count in lengths.responses.items())
    return "\n".join(
        [
            f"{'tokens of':<32}{'mean':>9}{'median':>9}{'90 %':>9}{'99 %':>9}{'most':>9}",
            _spread("a prompt", lengths.prompt),
            _spread("a response", lengths.response),
            _spread("a row, prompt per response", lengths.unshared),
            _spread("a row, distinct", lengths.distinct),
            f"responses per prompt: {counts}",
            f"shared: {tokens.shared_share:.1%} of {tokens.unshared:,} tokens, so {tokens.shared:,} are run",
        ]
    )


def _spread(name: str, spread: Spread) -> str:
    return f"  {name:<30}{spread.mean:>9,.0f}{spread.median:>9,}{spread.p90:>9,}{spread.p99:>9,}{spread.most:>9,}"


def _features(estimate: Estimate) -> str:
    settings = estimate.settings
    lines = [
        f"an epoch of {estimate.model.name} ({_counted(estimate.model.parameters)} parameters) on "
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
    for arm, predicted in estimate.memory.items():
        cells = "".join(f"{gigabytes(getattr(predicted, name)):>13}" for name in names)
        lines.append(f"  {arm:<22}{predicted.tokens:>10,}{cells}{gigabytes(predicted.total):>13}")
    return "\n".join(lines)


def _settings(estimate: Estimate) -> str:
    suggestion = estimate.suggestion
    lines = [f"suggested for {gigabytes(suggestion.free)} of memory: {suggestion.options()}"]
    if suggestion.buckets is not None:
        lengths = ", ".join(map(str, suggestion.buckets.lengths))
        lines.append(f"  row lengths to compile kernels for: {lengths} ({suggestion.buckets.waste:.1%} padding)")
    return "\n".join(lines)


def _counted(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 10**9 else f"{number / 1e6:.1f} million"
