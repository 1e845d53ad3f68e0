"""A tiny model of the same kind as a given one, from its config alone: every mechanism kept, every size cut."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexdpo.hf.auto import auto_class
from flexdpo.hf.row_dependence import rope_settings

_LAYERS, _WINDOW, _WIDTH, _VOCABULARY = 4, 8, 256, 256
# fmt: off
# of states: their heads and widths go with the hidden size, their own sizes and the chunks of their scans do not
_STATE_HEADS = re.compile(r"^(swa_\w+|(?!\w*(attention|key_value))\w*)_heads$|^num_query_groups$")
_STATE_WIDTHS = ("lru_width", "mamba_d_ssm", "attention_hidden_size", "mamba_dt_rank", "time_step_rank")
_STATE_CAPS = {
    "mamba_d_state": 16, "ssm_state_size": 16, "state_size": 16, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_head_dim": 32, "mamba_chunk_size": 16, "chunk_size": 16, "block_size": 16,
}
# sizes that stand on their own, with what they are cut to
_CAPS = {
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "ffn_hidden_size": 128, "decoder_ffn_dim": 128,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "intermediate_size_mlp": 128,
    "moe_shared_expert_intermediate_size": 64, "expert_ffn_hidden_size": 64, "shared_intermediate_size": 64,
    "max_position_embeddings": 4096, "sliding_window": _WINDOW, "attention_chunk_size": _WINDOW,
    "floor_scale": _WINDOW, "original_max_position_embeddings": 2 * _WINDOW,
    "vocab_size_per_layer_input": _VOCABULARY, "unpadded_vocab_size": _VOCABULARY,
    "hidden_size_per_layer_input": 16, **_STATE_CAPS,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 8,
    "n_group": 1, "topk_group": 1,
}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
# fmt: on


def tiny_model(config: Any, *, seed: int = 0, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a tiny model of the same kind as ``config`` describes, with random weights, in float64.

    Layers, vocabulary, widths, experts, windows and chunks are cut; heads keep their size and, where more than four
    share a key, their grouping. The weights are drawn so that attention matters: with the usual small ones the
    attention of a tiny model does next to nothing, and no test of it means anything.

    ``ValueError`` if the cut model would still be large; and whatever the model class says about the cut config.
    """
    cut = shrunk_config(config)
    with torch.device("meta"):
        outline = auto_class(cut).from_config(cut, trust_remote_code=trust_remote_code)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    if parameters > 100_000_000:
        # some size was not found
        raise ValueError(f"a tiny {type(outline).__name__} would still have {parameters:,} parameters")
    with torch.random.fork_rng(devices=[]):
        # not the generators of devices, which nothing would put back
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = auto_class(cut).from_config(
            cut, dtype=torch.float64, trust_remote_code=trust_remote_code
        )
    if type(model)._can_set_experts_implementation():
        # grouped matrix products exist for float32 and below only
        model.set_experts_implementation("eager")
    draw_weights(model.eval(), seed)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[11, 12]]) % cut.get_text_config(decoder=True).vocab_size, use_cache=False)
    except RuntimeError:
        # a router that makes float32 of what it is given meets its own float64 weights
        model.float()
    return model


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int = 0) -> None:
    """Draw matrices with standard deviation ``1/sqrt(fan_in)``, embeddings with 0.7, and add 0.1 noise to vectors."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
        if id(parameter) in embeddings:
            parameter.copy_(0.7 * noise)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)


def shrunk_config(config: Any) -> Any:
    """Return a copy of a config with every size cut to a few."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config(decoder=True)
    _cut_layers(text)
    hidden = getattr(text, "hidden_size", None)
    _cut_heads(text)
    if isinstance(hidden, int):
        _cut_states(text, hidden)
    _cap(text, _CAPS)
    for rope in rope_settings(text):
        if rope.get("original_max_position_embeddings", 0) > 2 * _WINDOW:
            rope["original_max_position_embeddings"] = 2 * _WINDOW
    for other in (getattr(cut, name, None) for name in getattr(cut, "sub_configs", {})):
        if other is not None and other is not text:
            # images and sounds take no part in a packed row
            _cap(other, dict.fromkeys((*_LAYER_COUNTS, "encoder_layers", "num_blocks"), 1))
    for each in (cut, text):
        # a pad token's embedding gets no gradient, so it is one that no probe draws
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _VOCABULARY - 1)
        _cap(each, {"vocab_size": _VOCABULARY, "vocab_size_per_layer_input": _VOCABULARY, **special})
    return cut


def _cap(config: Any, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        value = getattr(config, name, None)
        if isinstance(value, list) and all(isinstance(each, int) for each in value):
            setattr(config, name, [min(each, size) for each in value])
        elif isinstance(value, int) and not isinstance(value, bool) and value > size:
            setattr(config, name, size)


def _cut_layers(config: Any) -> None:
    """Keep a few layers, of every type that the model has, and of each with keys and values of its own and without."""
    types = list(getattr(config, "layer_types", None) or ())
    counted = [name for name in _LAYER_COUNTS if isinstance(getattr(config, name, None), int)]
    if not counted:
        return
    count = getattr(config, counted[0])
    # the last so many layers attend to keys and values of layers before them
    borrowing = getattr(config, "num_kv_shared_layers", None) or 0
    kinds = [(types[i] if types else "", i >= count - borrowing) for i in range(count)]
    kept = sorted(range(count), key=lambda i: (types != [] and i != kinds.index(kinds[i]), i))
    kept = sorted(kept[: max(_LAYERS, len(set(kinds)))])
    if borrowing:
        config.num_kv_shared_layers = sum(kinds[i][1] for i in kept)
    # whatever has one entry per layer loses the same entries
    for name, value in list(vars(config).items()):
        if name.endswith(("layer_ids", "layer_indices", "_idxs")) and isinstance(value, list | tuple):
            setattr(config, name, [kept.index(i) for i in value if i in kept])
        elif isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, [value[i] for i in kept])
    for name in counted:
        setattr(config, name, len(kept))
    # layers of a type that comes once in a while come once among these
    for name, period in list(vars(config).items()):
        if name.endswith("_layer_period") and isinstance(period, int) and period > len(kept):
            setattr(config, name, len(kept))
            offset = name.removesuffix("period") + "offset"
            setattr(config, offset, getattr(config, offset, 0) % len(kept))


def _cut_states(config: Any, hidden: int) -> None:
    """Keep the heads and widths of states in proportion to the hidden size, which was ``hidden``."""
    if not getattr(config, "num_attention_heads", None) and hidden > _WIDTH and hidden % _WIDTH == 0:
        config.hidden_size = _WIDTH  # nothing but states
    for name, value in list(vars(config).items()):
        scaled = name in _STATE_WIDTHS or _STATE_HEADS.match(name)
        if scaled and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, max(1, value * config.hidden_size // hidden))


def _cut_heads(config: Any) -> None:
    """Keep four query heads of their own size, and their number per key head as far as four allow."""
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size")
    heads, key_heads, hidden = (getattr(config, name, None) for name in names)
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 4:
        config.hidden_size = hidden // heads * 4
        config.num_attention_heads = 4
        if isinstance(key_heads, int):
            config.num_key_value_heads = max(1, 4 * key_heads // heads)
