"""Model shapes for benchmarks, with random weights made on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from flexdpo.errors import FlexdpoError, nearest


@dataclass(frozen=True)
class Shape:
    """A causal LM without its weights.

    Attributes:
        name: What it is called here.
        hidden: Hidden size.
        intermediate: Width of the feed-forward layers.
        layers: Decoder layers.
        heads: Query heads.
        key_heads: Key heads.
        head_dim: Head size.
        vocabulary: Words.
        tied: Whether embeddings and head are one matrix.
        family: ``"llama"`` or ``"qwen3"``.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    family: str = "llama"

    @property
    def layer_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers, the head not included."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def config(self) -> Any:
        """The transformers config."""
        family = {"llama": LlamaConfig, "qwen3": Qwen3Config}[self.family]
        return family(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
        )

    def build(self, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> PreTrainedModel:
        """A model with random weights, made where it will run."""
        torch.manual_seed(seed)
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config(), dtype=dtype)
        return model.to(device).train()


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 256, 768, 4, 4, 2, 64, 2048, True),
        Shape("llama-160m", 768, 3072, 12, 12, 12, 64, 32000, False),
        Shape("llama-1b", 2048, 8192, 16, 32, 8, 64, 128256, True),
        Shape("llama-8b", 4096, 14336, 32, 32, 8, 128, 128256, False),
        Shape("qwen3-0.6b", 1024, 3072, 28, 16, 8, 128, 151936, True, "qwen3"),
    )
}


def find_shape(name: str) -> Shape:
    """The shape of this name."""
    if name not in SHAPES:
        raise FlexdpoError(f"--model {name!r} is unknown{nearest(name, list(SHAPES))}; shapes: {', '.join(SHAPES)}")
    return SHAPES[name]
