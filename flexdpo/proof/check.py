"""``flexdpo check``: whether a model can be exact on shared, packed rows, and how that was found out."""

from __future__ import annotations

import json as json_module
import math
import textwrap
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from flexdpo.errors import FlexdpoError, first_line
from flexdpo.hf.auto import auto_class
from flexdpo.hf.mixer_kernels import mixing_ways
from flexdpo.hf.names import adapter_base, local_path, require_saved, why_unreachable
from flexdpo.hf.rules import refusal_reason
from flexdpo.hf.unwrap import backbone_of
from flexdpo.proof.probe import ParityReport, parity_probe
from flexdpo.proof.tiny_models import tiny_model

# a saved model up to this size is probed as it is; a larger one through a tiny model of the same kind
_LARGEST_LOADED = 500 * 2**20
# of a config's entries
_FEATURES = {
    "sliding_window": "sliding window of {} tokens",
    "attention_chunk_size": "chunks of {} tokens",
    "attn_logit_softcapping": "score softcap {}",
    "final_logit_softcapping": "logit softcap {}",
    "kv_lora_rank": "latent keys and values (MLA)",
}


@dataclass(frozen=True)
class CheckResult:
    """What was found out about a model."""

    model: str  # the name or folder that was asked for
    model_class: str  # in transformers
    model_type: str
    # ``"accepted"`` where the rule accepts a model that could not be run
    verdict: Literal["exact", "refused", "accepted"]
    reason: str = ""  # why it is refused, or why nothing could be run
    probed: str = "nothing"  # or what of it was run
    features: list[str] = field(default_factory=list)  # what packed rows have to honour in its attention, in words
    probe: ParityReport | None = None


def run_check(
    name_or_path: str, *, json: bool = False, trust_remote_code: bool = False, revision: str = "main"
) -> tuple[str, int]:
    """Check a model's folder, its ``config.json`` or a name on the hub; say so in text, or JSON.

    The exit code beside the text is 0 where packed rows can be used, 3 where the model is refused. ``FlexdpoError`` if
    there is no config under that name.
    """
    result = check_model(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    code = 3 if result.verdict == "refused" else 0
    if not json:
        return _screen(result), code
    plain = asdict(result)
    if result.probe is not None:
        nan = {name for name, value in plain["probe"].items() if isinstance(value, float) and math.isnan(value)}
        plain["probe"] |= dict.fromkeys(nan)  # NaN is not JSON
    return json_module.dumps(plain, indent=2), code


def check_model(name_or_path: str, *, trust_remote_code: bool = False, revision: str = "main") -> CheckResult:
    """Find out whether a model can be exact: the static rule, then the parity probe on something that runs.

    Of an adapter's folder, the model that it names is asked; the adapter itself is when it is trained.
    """
    name_or_path = adapter_base(name_or_path) or name_or_path
    config = _load_config(name_or_path, trust_remote_code, revision)
    outline = _outline(config, trust_remote_code)
    features = [*_features(config), *mixing_ways(backbone_of(outline))]
    found = CheckResult(name_or_path, type(outline).__name__, config.model_type, "accepted", features=features)
    reason = refusal_reason(backbone_of(outline))
    if reason is not None:
        return replace(found, verdict="refused", reason=reason)
    size = sum(file.stat().st_size for file in Path(name_or_path).expanduser().glob("*.safetensors"))
    try:
        if 0 < size <= _LARGEST_LOADED:
            probed, load = "saved model", auto_class(config).from_pretrained
            model = load(name_or_path, dtype=torch.float32, trust_remote_code=trust_remote_code)
        else:
            probed = "tiny model with random weights"
            model = tiny_model(config, trust_remote_code=trust_remote_code)
        report = parity_probe(model)
    except Exception as error:
        # a model class may say anything about a config that was cut, or about one that was never complete
        return replace(found, reason=f"no tiny model could be run ({first_line(error)})")
    verdict: Any = {"exact": "exact", "inconclusive": "accepted"}.get(report.verdict, "refused")
    return replace(found, verdict=verdict, reason=report.reason, probed=probed, probe=report)


def _load_config(name_or_path: str, trust_remote_code: bool, revision: str) -> Any:
    path = local_path(name_or_path)
    if path is not None and not path.exists():
        raise FlexdpoError(f"{name_or_path} does not exist; give a model folder, a config.json or a name on the hub")
    if path is not None and path.is_dir():
        require_saved(name_or_path, "config.json", revision=revision)
    unreachable = why_unreachable(name_or_path)
    try:
        return AutoConfig.from_pretrained(
            str(path or name_or_path),
            trust_remote_code=trust_remote_code,
            revision=revision,
            local_files_only=bool(unreachable),
        )
    except Exception as error:  # a config holds anything
        why = unreachable or f"{type(error).__name__}: {first_line(error)}"
        raise FlexdpoError(
            f"cannot load a config from {name_or_path!r} ({why}); give a folder that save_pretrained wrote, or another "
            "name"
        ) from error


def _outline(config: Any, trust_remote_code: bool) -> Any:
    """The model without weights: enough for the static rule, whatever its size."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        # model classes check their configs in ways of their own
        reason = first_line(error)
        if "Unrecognized configuration class" in reason:
            reason = "transformers has no causal language model of this kind"
        raise FlexdpoError(f"cannot build a {config.model_type!r} model: {reason}") from error


def _features(config: Any) -> list[str]:
    """What packed rows have to honour in this model, as far as its config tells."""
    text = config.get_text_config(decoder=True)
    names = ("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts", "layer_types")
    heads, key_heads, local_experts, all_experts, types = (getattr(text, name, None) for name in names)
    experts = local_experts or all_experts
    features = [
        f"{heads} query heads on {key_heads} key heads" if key_heads not in (None, heads) else "",
        *(said.format(value) for name, said in _FEATURES.items() if (value := getattr(text, name, None))),
        f"mixture of {experts} experts" if experts else "",
        f"layers: {', '.join(sorted(set(types)))}" if types else "",
    ]
    return [feature for feature in features if feature]


def _screen(result: CheckResult) -> str:
    said, way_out = {
        "exact": ("exact", ""),
        "refused": ("REFUSED", "train it without flexdpo, or choose a model of another kind"),
        "accepted": (
            "accepted, not proven",
            "run flexdpo.parity_probe(model) on the loaded model; training checks it as well",
        ),
    }[result.verdict]
    lines = [
        f"{result.model}: {result.model_class} (model_type {result.model_type})",
        f"  verdict   {said}",
        *_wrapped("why", result.reason),
        *_wrapped("uses", "; ".join(result.features)),
        *_wrapped("way out", way_out),
    ]
    if (report := result.probe) is not None and result.verdict != "refused":
        lines += [
            f"  probed    {result.probed}, documents of up to {report.tokens} tokens, {report.seconds:.1f} s",
            f"            {'error against the unpacked run':<34} {'values':>9} {'gradients':>10}",
            f"            {'packed and shared':<34} {report.value_error:>9.1e} {report.gradient_error:>10.1e}",
            f"            {'under a wrong mask, for scale':<34} {report.wrong_value_error:>9.1e} "
            f"{report.wrong_gradient_error:>10.1e}",
        ]
        if report.threshold >= report.tokens:
            lines += _wrapped(
                "note",
                f"the documents do not reach the model's threshold of {report.threshold} tokens; a tiny copy with "
                "short thresholds was probed too, if one could be built",
            )
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, width=100, initial_indent=f"  {label:<10}", subsequent_indent=" " * 12, break_long_words=False
    )
