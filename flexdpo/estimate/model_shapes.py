"""Configs of causal LMs by name, and models of them with random weights, for predictions and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from flexdpo.errors import FlexdpoError, nearest

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "tie_word_embeddings", "model_type",
)  # fmt: skip
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool, str]] = {
    "tiny": (256, 768, 4, 4, 2, 64, 2048, True, "llama"),
    "llama-160m": (768, 3072, 12, 12, 12, 64, 32000, False, "llama"),
    "llama-1b": (2048, 8192, 16, 32, 8, 64, 128256, True, "llama"),
    "llama-8b": (4096, 14336, 32, 32, 8, 128, 128256, False, "llama"),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True, "qwen3"),
}
# with layers that carry states, in the proportions of Qwen3-Next-80B-A3B, LFM2-1.2B and Granite-4-H-Small
# fmt: off
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3-next-tiny": {
        "model_type": "qwen3_next",
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "tie_word_embeddings": False,
    },
    "lfm2-tiny": {
        "model_type": "lfm2",
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "num_attention_heads": 4, "num_key_value_heads": 1, "conv_L_cache": 3,
        "intermediate_size": 1024, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True,
    },
    "granite-h-tiny": {
        "model_type": "granitemoehybrid",
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "num_attention_heads": 4, "num_key_value_heads": 1, "mamba_n_heads": 8, "mamba_d_head": 64,
        "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 64, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 128, "shared_intermediate_size": 256,
        "tie_word_embeddings": True,
    },
}
# fmt: on
NAMES = [*SHAPES, *HYBRIDS]


def require_shape(name: str) -> None:
    """Refuse a name that is not in :data:`NAMES`."""
    if name not in NAMES:
        raise FlexdpoError(f"the shape {name!r} is unknown{nearest(name, NAMES)}; use one of {', '.join(NAMES)}")


def shape_config(name: str) -> Any:
    """The transformers config of the shape of this name."""
    from transformers import AutoConfig

    require_shape(name)
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": 8192}
    if name in HYBRIDS:
        sizes = HYBRIDS[name] | {"hidden_size": 256, "vocab_size": 2048}
        layers = len(sizes["layer_types"])
        return AutoConfig.for_model(**sizes, **ends, name_or_path=name, num_hidden_layers=layers)
    return AutoConfig.for_model(**dict(zip(_SIZES, SHAPES[name], strict=True)), **ends, name_or_path=name)


def build_model(config: Any, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Any:
    """A causal LM with random weights, made where it will run, in train mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).train()
