"""Which calls of a backbone can run as one packed row with the same result, and why the others cannot.

A reason is one word or two that :func:`flexdpo.sharing_stats` counts under. Everything here is decided before the model
runs; a call that has a reason runs as if flexdpo were not there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from flexdpo.hf.interface import HARMLESS_KWARGS
from flexdpo.hf.row_dependence import LengthLimits, length_limits
from flexdpo.hf.rules import attends

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

# why a call passes through, with what to do about it where something can be done
REASONS = {
    "one_row": "the batch has one row",
    "little_gain": "running the shared tokens once saves less than min_gain",
    "generation": "the call makes or reads a key-value cache, as those of generate() do",
    "use_cache": "in evaluation mode a call that does not say so may want a cache; pass use_cache=False",
    "position_ids": "the caller gave positions of its own",
    "inputs_embeds": "the backbone got embeddings and not token ids",
    "output_attentions": "attention weights of a shared token would differ from row to row",
    "attention_mask": "the mask is not a tensor of the shape of input_ids",
    "gaps": "padding stands between the tokens of a row",
    "left_padding": "the model's positions are absolute, and padding on the left moves them",
    "rope_scaling": "the batch is longer than the limit beyond which every length has rotary frequencies of its own",
    "random": "the model draws random numbers (dropout, noise); a shared token cannot have others for each row",
    "other_inputs": "the call has inputs that flexdpo does not know how to share",
}
# switches and counts that change nothing about how tokens are shared
_HARMLESS_TENSORS = frozenset({"input_ids", "attention_mask", "num_items_in_batch", "logits_to_keep"})
# architectures whose positions were measured to be relative: equal results wherever a row begins. Others are taken for
# absolute, since rotary embeddings alone prove nothing: a norm behind them, or a scale by position, undoes it
# fmt: off
_RELATIVE = frozenset(
    (
        "afmoe", "apertus", "arcee", "aria_text", "axk1", "bamba", "bitnet", "cohere", "cohere2", "cohere2_moe",
        "cohere_compass_text", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "emu3_text_model",
        "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo", "flint", "gemma", "gemma2",
        "gemma3_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_neox", "gpt_oss", "granite", "granite_swa",
        "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hy_v3",
        "hyperclovax", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kolibri1", "laguna", "lfm2", "lfm2_moe",
        "llama", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "mistral",
        "mixtral", "mllama_text_model", "modernbert-decoder", "moshi", "nanochat", "nemotron", "nemotron_h", "olmo",
        "olmo2", "olmo3", "olmo_hybrid", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
        "vaultgemma", "youtu", "zamba2",
    )
)
# fmt: on
# transformers renamed the argument in 5.24, and takes the older names still
_CACHES = ("cache", "past_key_values", "cache_params")
_RELATIVE_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
# settings by which a model of rotary positions makes use of the absolute ones too
_ABSOLUTE_SETTINGS = ("attn_temperature_tuning", "llama_4_scaling_beta")


def _is_harmless(backbone: PreTrainedModel, name: str, value: object) -> bool:
    """Whether an argument says the same of a packed row as of the padded batch.

    Switches and numbers that the backbone or its attention knows do; anything else may hold one entry per token.
    """
    if name == "logits_to_keep" and backbone.get_output_embeddings() is not None:
        # Llama 4 is said to be its own backbone, head and all, and would keep positions of the row
        return value is None or (isinstance(value, int) and value == 0)
    if value is None or value is False or name in _HARMLESS_TENSORS:
        return True
    known = name in HARMLESS_KWARGS or name in inspect.signature(type(backbone).forward).parameters
    return known and isinstance(value, bool | int | float | str)


def reason_by_arguments(backbone: PreTrainedModel, kwargs: dict[str, Any], *, scores_only: bool = False) -> str | None:
    """Say why a call cannot be shared, by its arguments alone; the values of tensors are not looked at.

    A model that ``scores_only`` makes a cache where it is asked to and nowhere else.
    """
    return next(_obstacles(backbone, kwargs, scores_only), None)


def _obstacles(backbone: PreTrainedModel, kwargs: dict[str, Any], scores_only: bool) -> Iterator[str]:
    input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    # by type, whatever a version of transformers calls the argument
    cached = any(isinstance(value, Cache) or (name in _CACHES and value is not None) for name, value in kwargs.items())
    if cached or kwargs.get("use_cache"):
        yield "generation"
    if not (backbone.training or scores_only) and _asked_for(backbone, kwargs, "use_cache"):
        yield "use_cache"
    if not isinstance(input_ids, torch.Tensor) or kwargs.get("inputs_embeds") is not None:
        yield "inputs_embeds"
        return
    if kwargs.get("position_ids") is not None:
        yield "position_ids"
    if _asked_for(backbone, kwargs, "output_attentions"):
        yield "output_attentions"
    if input_ids.ndim != 2 or (mask is not None and getattr(mask, "shape", None) != input_ids.shape):
        yield "attention_mask"
    if any(not _is_harmless(backbone, name, value) for name, value in kwargs.items()):
        yield "other_inputs"
    if input_ids.shape[0] == 1:
        yield "one_row"


def _asked_for(backbone: PreTrainedModel, kwargs: dict[str, Any], name: str) -> bool:
    value = kwargs.get(name)
    return bool(getattr(backbone.config, name, False) if value is None else value)


@dataclass(frozen=True)
class Positions:
    """How a backbone makes use of positions."""

    relative: bool  # only distances matter, so that a row gives the same result wherever it begins
    limits: LengthLimits  # lengths of a padded batch at which its frequencies change

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Positions:
        """Judge by architecture and config."""
        config = backbone.config
        settings = _rope_settings(config)
        kinds = {str(each.get("rope_type", each.get("type", "default"))) for each in settings}
        absolute = any(getattr(config, name, None) for name in _ABSOLUTE_SETTINGS)
        absolute |= any(each.get(name) for each in settings for name in _ABSOLUTE_SETTINGS)
        fixed = kinds <= _RELATIVE_ROPE
        relative = not attends(backbone) or (config.model_type in _RELATIVE and fixed and not absolute)
        return cls(relative, limits=length_limits(backbone))


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a config, one for all layers or one per kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return []
    nested = [each for each in found.values() if isinstance(each, dict)]
    return nested or [found]
