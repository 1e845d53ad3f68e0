"""Configs of causal LMs by name, and models of them with random weights, for predictions and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.training.memory import ModelSize

# hidden, feed-forward, layers, heads, key heads, head size, words, tied, model type
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool, str]] = {
    "tiny": (256, 768, 4, 4, 2, 64, 2048, True, "llama"),
    "llama-160m": (768, 3072, 12, 12, 12, 64, 32000, False, "llama"),
    "llama-1b": (2048, 8192, 16, 32, 8, 64, 128256, True, "llama"),
    "llama-8b": (4096, 14336, 32, 32, 8, 128, 128256, False, "llama"),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True, "qwen3"),
}


def require_shape(name: str) -> None:
    """Refuse a name that is not in :data:`SHAPES`."""
    if name not in SHAPES:
        raise FlexdpoError(f"--model {name!r} is unknown{nearest(name, list(SHAPES))}; shapes: {', '.join(SHAPES)}")


def shape_config(name: str) -> Any:
    """The transformers config of the shape of this name."""
    from transformers import AutoConfig

    require_shape(name)
    hidden, intermediate, layers, heads, key_heads, head_dim, vocabulary, tied, model_type = SHAPES[name]
    return AutoConfig.for_model(
        model_type,
        name_or_path=name,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )


def find_shape(name: str) -> ModelSize:
    """The sizes of the shape of this name."""
    return ModelSize.of(shape_config(name))


def build_model(config: Any, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Any:
    """A causal LM with random weights, made where it will run, in train mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).train()
