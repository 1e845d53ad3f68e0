"""``flexdpo check``: whether a model can be exact on shared, packed rows, and how that was found out."""

from __future__ import annotations

import json as json_module
import math
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from flexdpo.errors import FlexdpoError, first_line
from flexdpo.hf.mixer_kernels import mixing_ways
from flexdpo.hf.names import adapter_base, local_path, require_saved
from flexdpo.hf.rules import refusal_reason
from flexdpo.hf.unwrap import backbone_of
from flexdpo.proof.probe import ParityReport, parity_probe
from flexdpo.proof.tiny_models import tiny_model

EXIT_EXACT, EXIT_REFUSED = 0, 3
# a saved model up to this size is probed as it is; a larger one through a tiny model of the same kind
_LARGEST_LOADED = 500 * 2**20
_WAY_OUT = "train it without flexdpo, or choose a model of another kind"


@dataclass(frozen=True)
class CheckResult:
    """What was found out about a model.

    Attributes:
        model: The name or folder that was asked for.
        model_class: Its class in transformers.
        model_type: Its ``model_type``.
        verdict: ``"exact"``; ``"refused"``; or ``"accepted"`` where the rule accepts a model that could not be run.
        reason: Why it is refused, or why nothing could be run; empty where it is exact.
        probed: ``"saved model"``, ``"tiny model with random weights"`` or ``"nothing"``.
        features: What of the model's attention packed rows have to honour, in words.
        probe: What the parity probe measured, or ``None``.
    """

    model: str
    model_class: str
    model_type: str
    verdict: Literal["exact", "refused", "accepted"]
    reason: str = ""
    probed: str = "nothing"
    features: list[str] = field(default_factory=list)
    probe: ParityReport | None = None


def run_check(
    name_or_path: str, *, json: bool = False, trust_remote_code: bool = False, revision: str = "main"
) -> tuple[str, int]:
    """Check one model and say so in text or JSON.

    Args:
        name_or_path: A folder with a ``config.json``, such a file itself, or a name on the hub.
        json: Return JSON instead of text for a screen.
        trust_remote_code: Whether to run code that comes with the model.
        revision: Branch, tag or commit on the hub.

    Returns:
        The text, and the exit code: 0 where packed rows can be used, 3 where the model is refused.

    Raises:
        FlexdpoError: if there is no config under that name.
    """
    result = check_model(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    code = EXIT_REFUSED if result.verdict == "refused" else EXIT_EXACT
    text = json_module.dumps(_jsonable(result), indent=2) if json else _screen(result)
    return text, code


def check_model(name_or_path: str, *, trust_remote_code: bool = False, revision: str = "main") -> CheckResult:
    """Find out whether a model can be exact: the static rule, then the parity probe on something that runs.

    Of an adapter's folder, the model that it names is asked; the adapter itself is when it is trained.
    """
    name_or_path = adapter_base(name_or_path) or name_or_path
    config = _load_config(name_or_path, trust_remote_code, revision)
    outline = _outline(config, trust_remote_code)
    about: dict[str, Any] = {
        "model": name_or_path,
        "model_class": type(outline).__name__,
        "model_type": config.model_type,
        "features": [*_features(config), *mixing_ways(backbone_of(outline))],
    }
    reason = refusal_reason(backbone_of(outline))
    if reason is not None:
        return CheckResult(**about, verdict="refused", reason=reason)
    try:
        model, probed = _something_to_run(name_or_path, config, trust_remote_code)
        report = parity_probe(model)
    except Exception as error:
        # a model class may say anything about a config that was cut, or about one that was never complete
        return CheckResult(**about, verdict="accepted", reason=f"no tiny model could be run ({first_line(error)})")
    if report.verdict == "inconclusive":
        return CheckResult(**about, verdict="accepted", reason=report.reason, probed=probed, probe=report)
    verdict: Literal["exact", "refused"] = "exact" if report.exact else "refused"
    return CheckResult(**about, verdict=verdict, reason=report.reason, probed=probed, probe=report)


# --- what is loaded --------------------------------------------------------------------------------------------------


def _load_config(name_or_path: str, trust_remote_code: bool, revision: str) -> Any:
    from transformers import AutoConfig

    path = local_path(name_or_path)
    if path is not None and not path.exists():
        raise FlexdpoError(f"{name_or_path} does not exist; give a model folder, a config.json or a name on the hub")
    if path is not None and path.is_dir():
        require_saved(name_or_path, "config.json")
    try:
        return AutoConfig.from_pretrained(
            str(path or name_or_path), trust_remote_code=trust_remote_code, revision=revision
        )
    except Exception as error:  # a config holds anything
        raise FlexdpoError(
            f"cannot load a config from {name_or_path!r} ({type(error).__name__}: {first_line(error)}); give a folder "
            "that save_pretrained wrote, or another name"
        ) from error


def _outline(config: Any, trust_remote_code: bool) -> Any:
    """The model without weights: enough for the static rule, whatever its size."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        # model classes check their configs in ways of their own
        reason = first_line(error)
        if "Unrecognized configuration class" in reason:
            reason = "transformers has no causal language model of this kind"
        raise FlexdpoError(f"cannot build a {config.model_type!r} model: {reason}") from error


def _something_to_run(name_or_path: str, config: Any, trust_remote_code: bool) -> tuple[Any, str]:
    from transformers import AutoModelForCausalLM

    weights = list(Path(name_or_path).expanduser().glob("*.safetensors"))
    if weights and sum(file.stat().st_size for file in weights) <= _LARGEST_LOADED:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        return model, "saved model"
    return tiny_model(config, trust_remote_code=trust_remote_code), "tiny model with random weights"


# --- what is said ----------------------------------------------------------------------------------------------------


def _features(config: Any) -> list[str]:
    """What packed rows have to honour in this model, as far as its config tells."""
    text = config.get_text_config(decoder=True)

    def has(name: str) -> Any:
        return getattr(text, name, None)

    heads, key_heads = has("num_attention_heads"), has("num_key_value_heads")
    features = [
        f"{heads} query heads on {key_heads} key heads" if key_heads not in (None, heads) else "",
        f"sliding window of {has('sliding_window')} tokens" if has("sliding_window") else "",
        f"chunks of {has('attention_chunk_size')} tokens" if has("attention_chunk_size") else "",
        f"score softcap {has('attn_logit_softcapping')}" if has("attn_logit_softcapping") else "",
        f"logit softcap {has('final_logit_softcapping')}" if has("final_logit_softcapping") else "",
        "latent keys and values (MLA)" if has("kv_lora_rank") else "",
        f"mixture of {experts} experts" if (experts := has("num_local_experts") or has("num_experts")) else "",
        f"layers: {', '.join(sorted(set(types)))}" if (types := has("layer_types")) else "",
    ]
    return [feature for feature in features if feature]


def _jsonable(result: CheckResult) -> dict[str, Any]:
    # NaN is not JSON
    plain = asdict(result)
    if plain["probe"] is not None:
        plain["probe"] = {name: None if _is_nan(value) else value for name, value in plain["probe"].items()}
    return plain


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _screen(result: CheckResult) -> str:
    said = {"exact": "exact", "refused": "REFUSED", "accepted": "accepted, not proven"}[result.verdict]
    lines = [f"{result.model}: {result.model_class} (model_type {result.model_type})", f"  verdict   {said}"]
    if result.reason:
        lines += _wrapped("why", result.reason)
    if result.features:
        lines += _wrapped("uses", "; ".join(result.features))
    if result.verdict == "refused":
        lines += _wrapped("way out", _WAY_OUT)
    if result.verdict == "accepted":
        lines += _wrapped("way out", "run flexdpo.parity_probe(model) on the loaded model; training checks it as well")
    if result.probe is not None and result.verdict != "refused":
        lines += _probe_lines(result.probed, result.probe)
    return "\n".join(lines)


def _probe_lines(probed: str, report: ParityReport) -> list[str]:
    lines = [
        f"  probed    {probed}, documents of up to {report.tokens} tokens, {report.seconds:.1f} s",
        f"            {'error against the unpacked run':<34} {'values':>9} {'gradients':>10}",
        f"            {'packed and shared':<34} {report.value_error:>9.1e} {report.gradient_error:>10.1e}",
        f"            {'under a wrong mask, for scale':<34} {report.wrong_value_error:>9.1e} "
        f"{report.wrong_gradient_error:>10.1e}",
    ]
    if report.threshold >= report.tokens:
        lines += _wrapped(
            "note",
            f"the documents do not reach the model's threshold of {report.threshold} tokens; a tiny copy with short "
            "thresholds was probed too, if one could be built",
        )
    return lines


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, width=100, initial_indent=f"  {label:<10}", subsequent_indent=" " * 12, break_long_words=False
    )
