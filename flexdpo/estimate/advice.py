"""From an estimate's figures to plain words."""

from __future__ import annotations

from flexdpo.estimate.features import Feature
from flexdpo.estimate.report import Estimate
from flexdpo.layout.packing import MIN_SHARED
from flexdpo.training.memory import MARGIN, gigabytes

# below this a step is not noticeably faster
_WORTH_IT = 1.10


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
