"""From figures to settings and plain words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from flexdpo.errors import FlexdpoError
from flexdpo.estimate.features import first_rows
from flexdpo.layout.packing import MIN_SHARED, Buckets, choose_buckets
from flexdpo.layout.row import TILE
from flexdpo.training.memory import gigabytes
from flexdpo.training.row_budget import MARGIN, auto_row_budget

if TYPE_CHECKING:
    from flexdpo.data.tokenize import DataReport
    from flexdpo.estimate.counts import EpochTokens, RepeatedPrompts
    from flexdpo.estimate.features import Feature, Layouts
    from flexdpo.estimate.lengths import RowTokens, SharedPrefixes
    from flexdpo.estimate.settings import EstimateSettings
    from flexdpo.training.memory import MemoryPrediction, ModelSize, TrainingSetup

# below this a step is not noticeably faster
WORTH_IT = 1.10
# a feature that has to be switched on must gain this much to be recommended
_WORTH_A_SWITCH = 1.03
# rows longer than this keep any device busy; memory is better left to the allocator
_LONG_ENOUGH = 32768
_MOST_CUT = 0.05
_MOST_WASTE = 0.03


@dataclass(frozen=True)
class Suggestion:
    """Settings of ``DPOConfig`` to train with; the pairs of an optimizer step stay those that were asked for.

    Attributes:
        max_tokens_per_row: Longest row; ``None`` where a batch fits into one, or nothing fits.
        precompute_ref_log_probs: Whether the reference should be run beforehand, so that its weights need not stay.
        buckets: Row lengths to compile kernels for; ``None`` on a CPU, and where one kernel for all lengths is better.
        fits: Whether the model can be trained in the device's memory with these settings.
        free: The memory this was judged by, in bytes.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_tokens_per_row: int | None
    activation_checkpointing: bool
    precompute_ref_log_probs: bool
    regroup_prompts: bool
    sharing: str
    buckets: Buckets | None
    fits: bool
    free: int

    def options(self) -> str:
        """The settings as options of ``flexdpo train``."""
        words = [f"--per_device_train_batch_size {self.per_device_train_batch_size}"]
        if self.max_tokens_per_row is not None:
            words.append(f"--max_tokens_per_row {self.max_tokens_per_row}")
        for name in ("activation_checkpointing", "precompute_ref_log_probs", "regroup_prompts"):
            if getattr(self, name):
                words.append(f"--{name} true")
        if self.sharing != "group":
            words.append(f"--sharing {self.sharing}")
        return " ".join(words)


def suggest(
    size: ModelSize,
    settings: EstimateSettings,
    layouts: Layouts,
    counted: RowTokens,
    features: dict[str, Feature],
    *,
    free: int,
) -> Suggestion:
    """Choose settings by the predicted gains and the memory that is there."""
    longest = int(counted.distinct.max())
    setup, budget = _first_that_fits(size, settings, longest, free)
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    whole = layouts.longest_shared.tokens * settings.gradient_accumulation_steps
    bound: int | None = None
    if budget is not None:
        most = min(budget, max(_LONG_ENOUGH, -(-longest // TILE) * TILE))
        bound = most if whole > most else None
    return Suggestion(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        max_tokens_per_row=bound,
        activation_checkpointing=setup.gradient_checkpointing,
        precompute_ref_log_probs=settings.training_setup.reference and not setup.reference,
        regroup_prompts=features["regrouping"].speedup >= _WORTH_A_SWITCH
        and features["regrouping"].seconds <= features["across"].seconds,
        sharing="step" if features["across"].speedup >= _WORTH_A_SWITCH else "group",
        buckets=_buckets(settings, first_rows(counted.distinct[layouts.order], batch, bound)),
        fits=budget is not None,
        free=free,
    )


def _first_that_fits(
    size: ModelSize, settings: EstimateSettings, longest: int, free: int
) -> tuple[TrainingSetup, int | None]:
    """What has to be given up, in the order of what it costs, so that the longest example fits; and its row budget."""
    asked = settings.training_setup
    rerun = replace(asked, gradient_checkpointing=True)
    for setup in (asked, rerun, replace(asked, reference=False), replace(rerun, reference=False)):
        try:
            return setup, auto_row_budget(
                size, setup, device=settings.device, free=free, multiple=settings.row_multiple, longest=longest
            )
        except FlexdpoError:
            continue
    return asked, None


def _buckets(settings: EstimateSettings, rows: list[list[int]]) -> Buckets | None:
    if settings.device != "cuda":
        return None
    found = choose_buckets([length for batch in rows for length in batch])
    # more padding than this costs more than a kernel that checks bounds
    return found if found.waste <= _MOST_WASTE else None


# --- words -----------------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """All that advice depends on."""

    settings: EstimateSettings
    report: DataReport
    tokens: EpochTokens
    repeated: RepeatedPrompts
    prefixes: SharedPrefixes
    features: dict[str, Feature]
    memory: dict[str, MemoryPrediction]
    suggestion: Suggestion


def gains_over(features: dict[str, Feature], chosen: Feature) -> dict[str, float]:
    """Over padded training, and over packed training, which computes log-probabilities at the targets too."""
    return {
        name: features[other].seconds / chosen.seconds for name, other in (("padded", "padded"), ("packed", "targets"))
    }


def advise(facts: Facts) -> tuple[bool, tuple[str, ...]]:
    """Say whether it is worth it, and what to do; the verdict comes first."""
    settings, _, tokens, repeated, prefixes, features, _, suggestion = facts
    chosen = max(
        [features["sharing"]]
        + ([features["regrouping"]] if suggestion.regroup_prompts else [])
        + ([features["across"]] if suggestion.sharing == "step" else []),
        key=lambda feature: 1 / feature.seconds,
    )
    best = gains_over(features, chosen)
    worth_it = max(best.values()) >= WORTH_IT
    lines = [_verdict(best, tokens)]
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
    elif prefixes.rows and settings.sharing == "group":
        lines.append(
            f"{prefixes.rows:,} rows begin like another row for at least {MIN_SHARED} tokens, but such rows seldom "
            f"meet in a batch of {settings.per_device_train_batch_size}, so sharing='step' gains less than 3 %."
        )
    lines += _data_advice(facts)
    lines += _memory_advice(facts)
    return worth_it, tuple(lines)


def _verdict(best: dict[str, float], tokens: EpochTokens) -> str:
    saved = f"{tokens.shared_share:.0%} of the tokens are repeated prompts or beginnings"
    if best["packed"] >= WORTH_IT:
        return (
            f"Worth it: {saved}, and steps should be {best['packed']:.2f} times faster than packed and "
            f"{best['padded']:.2f} times faster than padded training."
        )
    if best["padded"] >= WORTH_IT:
        return (
            f"Worth it over padded training only: {saved}. Steps should be {best['padded']:.2f} times faster than "
            f"padded, but just {best['packed']:.2f} times faster than packed training: if you pack already, it is not "
            "worth switching."
        )
    return (
        f"Not worth it: {saved}, and steps would be only {best['padded']:.2f} times faster than padded training. Long "
        "responses behind short prompts leave little to share; keep the trainer you have."
    )


def _data_advice(facts: Facts) -> list[str]:
    settings, report, prefixes = facts.settings, facts.report, facts.prefixes
    lines = []
    too_long = report.skipped.get("prompt alone fills max_length", 0)
    if too_long:
        lines.append(
            f"{too_long:,} rows are left out because the prompt alone fills max_length={settings.max_length}; raise "
            "max_length to keep them, and prompts that long are where sharing gains most."
        )
    if report.truncated > _MOST_CUT * report.used:
        lines.append(
            f"{report.truncated / report.used:.0%} of the rows are cut to max_length={settings.max_length}; raise it "
            "unless that is meant."
        )
    if 16 <= prefixes.common_to_all < MIN_SHARED:
        lines.append(
            f"All prompts begin with the same {prefixes.common_to_all} tokens, which is too short to be shared across "
            f"examples: below {MIN_SHARED} tokens, one tile of attention, it would cost more than it saves."
        )
    return lines


def _memory_advice(facts: Facts) -> list[str]:
    settings, memory, suggestion = facts.settings, facts.memory, facts.suggestion
    free = gigabytes(suggestion.free)
    if not suggestion.fits:
        return [
            f"Training all weights needs about {gigabytes(memory['shared'].fixed)} before the first token, and a "
            f"device with {free} has no room for it: shard it over several devices (FSDP, ZeRO-3) or train an adapter."
        ]
    lines = []
    checkpointing = suggestion.activation_checkpointing and not settings.training_setup.gradient_checkpointing
    changed = ["activation_checkpointing"] * checkpointing
    changed += ["precompute_ref_log_probs"] * suggestion.precompute_ref_log_probs
    if changed:
        lines.append(f"Set {' and '.join(f'{name}=True' for name in changed)}, so that a row fits into {free}.")
    elif suggestion.max_tokens_per_row is not None:
        lines.append(
            f"Set max_tokens_per_row={suggestion.max_tokens_per_row}: the pairs of a step are then run in rows that "
            "fit into memory, and what is learned stays the same."
        )
    usable = suggestion.free * (1 - MARGIN)
    if memory["padded"].total > usable >= memory["shared"].total:
        lines.append(
            f"A padded batch of this size would need {gigabytes(memory['padded'].total)} and not fit; the longest "
            f"shared row needs {gigabytes(memory['shared'].total)}."
        )
    return lines
