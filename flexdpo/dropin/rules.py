"""Which calls of a backbone can run as one packed row with the same result, and why the others cannot.

A reason is one word or two that :func:`flexdpo.sharing_stats` counts under. Everything here is decided before the model
runs; a call that has a reason runs as if flexdpo were not there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from flexdpo.hf.draws import ask, can_run, left_as_it_is
from flexdpo.hf.interface import HARMLESS_KWARGS
from flexdpo.hf.row_dependence import LengthLimits, length_limits, rope_settings
from flexdpo.hf.rules import attends
from flexdpo.hf.versions import CHUNKS_BEGIN_ANEW

# why a call passes through, with what to do about it where something can be done
REASONS = {
    "one_row": "the batch has one row",
    "little_gain": "running the shared tokens once saves less than min_gain",
    "generation": "the call makes or reads a key-value cache, as those of generate() do",
    "use_cache": "in evaluation mode a call that does not say so may want a cache; pass use_cache=False",
    "position_ids": "the caller gave positions that cannot be followed: they are not [N, T], or start anew too often, "
    "or under a state or FlashAttention, which then mix sequences",
    "inputs_embeds": "the backbone got embeddings and not token ids",
    "output_attentions": "attention weights of a shared token would differ from row to row",
    "attention_mask": "the mask is not a tensor of the shape of input_ids",
    "gaps": "padding stands between the tokens of a row",
    "left_padding": "padding on the left moves the model's positions in a way that it does not tell",
    "rope_scaling": "the batch is longer than the limit beyond which every length has rotary frequencies of its own",
    "random": "the model draws random numbers (dropout, noise); a shared token cannot have others for each row",
    "other_media": "the call brings video or audio, which flexdpo does not share",
    "image_inputs": "the images' inputs are not tensors with one entry for each image, or the model has no image token",
    "image_tokens": "it cannot be told which image tokens belong to which image, or the tokens of an image are cut",
    "token_types": "the call says of other tokens than the image tokens that they are images, or says nothing of them "
    "where the model needs it",
    "other_inputs": "the call has inputs that flexdpo does not know how to share",
}
# switches and counts that change nothing about how tokens are shared
_HARMLESS_TENSORS = frozenset({"input_ids", "attention_mask", "position_ids", "num_items_in_batch", "logits_to_keep"})
# what a trainer hands the model along with the batch and reads itself: margins of RewardTrainer
OF_THE_LOSS = frozenset({"margin"})
# what arguments about video and audio begin with
_OTHER_MEDIA = ("pixel_values_videos", "image_sizes_videos", "video_", "num_frames", "input_features", "audio_")
# architectures whose positions were measured to be relative: equal results wherever a row begins. Others are taken for
# absolute, since rotary embeddings alone prove nothing: a norm behind them, or a scale by position, undoes it
# fmt: off
_RELATIVE = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "bamba", "bitnet", "cohere", "cohere2", "cohere2_moe",
    "cohere_compass_text", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "emu3_text_model",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo", "flint", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_neox", "gpt_oss", "granite",
    "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hy_v3",
    "hyperclovax", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kolibri1", "laguna", "lfm2", "lfm2_moe",
    "llama", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "mistral",
    "mixtral", "mllama_text_model", "modernbert-decoder", "moshi", "nanochat", "nemotron", "nemotron_h", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma", "youtu", "zamba2",
})
# fmt: on
# transformers renamed the argument in 5.24, and takes the older names still
_CACHES = ("cache", "past_key_values", "cache_params")
_RELATIVE_ROPE = frozenset({"default", "linear", "llama3", "proportional", "yarn"})
# settings by which a model of rotary positions makes use of the absolute ones too
_ABSOLUTE_SETTINGS = ("attn_temperature_tuning", "llama_4_scaling_beta")


def _is_harmless(backbone: PreTrainedModel, name: str, value: object) -> bool:
    """Whether an argument says the same of a packed row as of the padded batch, as switches and known numbers do."""
    if name == "logits_to_keep" and backbone.get_output_embeddings() is not None:
        # Llama 4 is said to be its own backbone, head and all, and would keep positions of the row
        return value is None or (isinstance(value, int) and value == 0)
    if value is None or value is False or name in _HARMLESS_TENSORS:
        return True
    read = name in inspect.signature(type(backbone).forward).parameters
    if name in OF_THE_LOSS:
        return not read
    return (read or name in HARMLESS_KWARGS) and isinstance(value, bool | int | float | str)


def may_hold_sequences(backbone: PreTrainedModel, kwargs: dict[str, Any], stock: str) -> bool:
    """Whether a call is one whose rows may hold sequences one behind the other, kept apart by their positions.

    transformers looks for them where there is neither a mask nor a cache; FlashAttention whatever the cache.
    """
    if kwargs.get("position_ids") is None or kwargs.get("attention_mask") is not None:
        return False
    return "flash" in stock or not _asked_for(backbone, kwargs, "use_cache")


def reason_by_arguments(
    backbone: PreTrainedModel, kwargs: dict[str, Any], *, packed: bool = False, scores_only: bool = False
) -> str | None:
    """Say why a call cannot be shared, by its arguments alone; the values of tensors are not looked at.

    Rows of a ``packed`` call may hold several sequences. A model that ``scores_only`` makes a cache where it is asked
    to and nowhere else.
    """
    return next(_obstacles(backbone, kwargs, packed, scores_only), None)


def _obstacles(backbone: PreTrainedModel, kwargs: dict[str, Any], packed: bool, scores_only: bool) -> Iterator[str]:
    input_ids, mask, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    # by type, whatever a version of transformers calls the argument
    cached = any(isinstance(value, Cache) or (name in _CACHES and value is not None) for name, value in kwargs.items())
    if cached or kwargs.get("use_cache"):
        yield "generation"
    if not (backbone.training or scores_only) and _asked_for(backbone, kwargs, "use_cache"):
        yield "use_cache"
    if not isinstance(input_ids, torch.Tensor) or kwargs.get("inputs_embeds") is not None:
        yield "inputs_embeds"
        return
    places = {tuple(input_ids.shape), (1, input_ids.shape[-1])}
    if positions is not None and (positions.is_floating_point() or tuple(positions.shape) not in places):
        yield "position_ids"
    if _asked_for(backbone, kwargs, "output_attentions"):
        yield "output_attentions"
    if input_ids.ndim != 2 or (mask is not None and getattr(mask, "shape", None) != input_ids.shape):
        yield "attention_mask"
    if any(name.startswith(_OTHER_MEDIA) and value is not None for name, value in kwargs.items()):
        yield "other_media"
    if any(not _is_harmless(backbone, name, value) for name, value in kwargs.items()):
        yield "other_inputs"
    if input_ids.shape[0] == 1 and not packed:
        yield "one_row"


def _asked_for(backbone: PreTrainedModel, kwargs: dict[str, Any], name: str) -> bool:
    value = kwargs.get(name)
    return bool(getattr(backbone.config, name, False) if value is None else value)


@dataclass(frozen=True)
class Positions:
    """How a backbone makes use of positions."""

    relative: bool  # only distances matter, so that a row gives the same result wherever it begins
    limits: LengthLimits  # lengths of a padded batch at which its frequencies change
    # what it counts behind padding on the left where positions are not relative: "columns", "tokens" or "unknown"; ""
    # before it was asked
    behind_padding: str = ""
    # what it does with sequences one behind the other in a row: keeps them "apart", leaves them "mixed" or "unknown"
    sequences: str = ""

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Positions:
        """Judge by architecture and config."""
        config = backbone.config
        settings = rope_settings(config)
        kinds = {str(each.get("rope_type", each.get("type", "default"))) for each in settings}
        absolute = any(getattr(config, name, None) for name in _ABSOLUTE_SETTINGS)
        absolute |= any(each.get(name) for each in settings for name in _ABSOLUTE_SETTINGS)
        fixed = kinds <= _RELATIVE_ROPE
        relative = not attends(backbone) or (config.model_type in _RELATIVE and fixed and not absolute)
        return cls(relative, limits=length_limits(backbone))

    def asked(self, backbone: PreTrainedModel, *, of_sequences: bool) -> Positions:
        """Ask a backbone what its code alone does not tell, by running six tokens; what is known is not asked again.

        A sharded backbone must be asked in every process at once.
        """
        if self.behind_padding == "" and not self.relative:
            return replace(self, behind_padding=_behind_padding(backbone)).asked(backbone, of_sequences=of_sequences)
        if self.sequences == "" and of_sequences:
            return replace(self, sequences=_sequences(backbone))
        return self


def _behind_padding(backbone: PreTrainedModel) -> str:
    columns = torch.arange(6, device=backbone.get_input_embeddings().weight.device)[None]
    inputs = {"input_ids": columns, "attention_mask": (columns > 1).long()}
    choices = {"columns": columns, "tokens": (columns - 2).clamp(min=0)}
    with_positions = {name: {**inputs, "position_ids": positions} for name, positions in choices.items()}
    found = _which(backbone, inputs, with_positions, first=2)
    # a state that padding advances depends on what stands there
    others = {"input_ids": torch.where(columns > 1, columns, columns + 4)}
    moved = found != "unknown" and _which(backbone, inputs, {"same": inputs, "moved": {**inputs, **others}}, first=2)
    return "unknown" if moved == "same" else found


def _sequences(backbone: PreTrainedModel) -> str:
    if "chunked_attention" in (getattr(backbone.config, "layer_types", None) or ()) and not CHUNKS_BEGIN_ANEW:
        return "unknown"
    columns = torch.arange(6, device=backbone.get_input_embeddings().weight.device)[None]
    inputs = {"input_ids": columns, "position_ids": columns % 3}
    alone = {name: each[:, 3:] for name, each in inputs.items()}
    return _which(
        backbone, inputs, {"apart": alone, "mixed": {**inputs, "attention_mask": torch.ones_like(columns)}}, first=3
    )


def _which(backbone: PreTrainedModel, inputs: dict[str, Any], choices: dict[str, dict[str, Any]], first: int) -> str:
    """Which of two calls gives a model's result from token ``first`` on; "unknown" where that is not clear."""
    if not can_run(backbone):
        return "unknown"
    with left_as_it_is(backbone, training=False):
        result = ask(backbone, inputs).result[:, first:]
        found = {name: ask(backbone, call).result[:, -result.shape[1] :] for name, call in choices.items()}
    distance = {name: float((each - result).abs().max()) for name, each in found.items()}
    near, far = sorted(distance, key=lambda name: distance[name])
    # where both give the same, a difference may show further on
    clear = distance[far] > 16 * torch.finfo(result.dtype).eps * float(result.abs().max())
    return near if clear and distance[near] < 0.05 * distance[far] else "unknown"
