"""The numbers of a causal LM that its memory and its work depend on, read off a model or a config."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexdpo.errors import FlexdpoError, first_line, found
from flexdpo.hf.auto import auto_class
from flexdpo.hf.mixer_kernels import SCAN_CHUNK, mixers_of, state_of, weights_passed
from flexdpo.hf.unwrap import backbone_of, base_model, unwrapped
from flexdpo.training.kept_bytes import KeptBytes, kept_bytes


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a causal LM that its memory depends on."""

    name: str
    parameters: int  # tied ones once
    hidden: int
    intermediate: int  # width of the feed-forward layers that a token passes; all its experts together
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True  # feed-forward layers multiply a gate in (``SwiGLU``), or are two plain matrices
    layer_norm: bool = False  # norms are torch's fused ``LayerNorm``, or ``RMSNorm`` written out in Python
    head_norms: bool = False  # queries and keys are normalised head by head
    head_learns: bool = True  # the language-model head is trained
    # where some layers carry states: those with attention and those with a state; weights that a token passes in all
    # layers; numbers of the state that a segment hands on, of a layer; heads of it
    attention_layers: int | None = None
    state_layers: int = 0
    weights_passed: int = 0
    state: int = 0
    state_heads: int = 0
    # of a model that sees: weights that images pass and text does not, and the numbers of a patch of an image
    tower: int = 0
    patch: int = 0
    # what autograd keeps, as the model itself tells, ``None`` where it was not asked or cannot tell; with weights of so
    # many bytes, and whether under autocast
    kept: KeptBytes | None = None
    asked: tuple[int, bool] = (0, False)

    @property
    def attending(self) -> int:
        """Layers with attention."""
        return self.layers if self.attention_layers is None else self.attention_layers

    @property
    def scan_products(self) -> float:
        """Multiplications per token of all scans: into the state, out of it, and with the others of its chunk."""
        width = self.state / max(self.state_heads, 1)
        return float(self.state_layers * (3 * self.state + 2 * self.state_heads * SCAN_CHUNK * width**0.5))

    @property
    def gated_intermediate(self) -> int:
        """Width of a gated feed-forward layer, three matrices, with as many weights."""
        return self.intermediate if self.gated else self.intermediate * 2 // 3

    @property
    def layer_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers that a token passes, the head not included."""
        if self.weights_passed:
            return self.weights_passed
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.gated_intermediate)

    @classmethod
    def measured(cls, model_or_config: Any, weight_bytes: int, *, autocast: bool) -> ModelSize:
        """The same with what autograd keeps, for which the model runs on torch's meta device."""
        if isinstance(model_or_config, cls):
            return model_or_config
        kept = kept_bytes(model_or_config, weight_bytes, autocast=autocast)
        return replace(cls.of(model_or_config), kept=kept, asked=(weight_bytes, autocast))

    @classmethod
    def of(cls, model_or_config: Any) -> ModelSize:
        """Read the numbers off a model, or a config, whose causal LM is made without memory; refuse anything else."""
        if isinstance(model_or_config, cls):
            return model_or_config
        model = model_or_config if isinstance(model_or_config, torch.nn.Module) else without_memory(model_or_config)
        inner = unwrapped(model)
        config = inner.config.get_text_config()
        heads, states = _mean(config, "num_attention_heads"), _states(inner)
        if not heads and not states:
            raise FlexdpoError(f"{config.model_type} has no attention heads, so it is no model to be trained here")
        widths = (_mean(config, name) for name in ("intermediate_size", "n_inner", "ffn_dim"))
        width = next(filter(None, widths), 4 * config.hidden_size)
        if experts := _mean(config, "num_experts_per_tok"):
            width = experts * (_mean(config, "moe_intermediate_size") or _mean(config, "intermediate_size"))
            width += _mean(config, "shared_expert_intermediate_size")
        head = base_model(inner).get_output_embeddings()
        # the part that sees has layers of other kinds
        layers = dict(backbone_of(base_model(inner)).named_modules())
        return cls(
            name=str(getattr(config, "_name_or_path", "") or config.model_type),
            parameters=sum(parameter.numel() for parameter in inner.parameters()),
            hidden=int(config.hidden_size),
            intermediate=width,
            layers=int(config.num_hidden_layers),
            heads=heads,
            key_heads=_mean(config, "num_key_value_heads") or heads,
            head_dim=_mean(config, "head_dim") or config.hidden_size // max(heads, 1),
            vocabulary=int(config.vocab_size),
            gated=any(name.endswith(("gate_proj", "gate_up_proj", "experts")) for name in layers),
            layer_norm=any(isinstance(module, torch.nn.LayerNorm) for module in layers.values()),
            head_norms=any(name.endswith(("q_norm", "q_layernorm")) for name in layers),
            head_learns=head is None or any(weight.requires_grad for weight in head.parameters()),
            **{**_tower(inner), **states},  # type: ignore[arg-type]
        )


def _mean(config: Any, name: str) -> int:
    """A number of a config that may differ from layer to layer: the mean, rounded up, or 0 where there is none."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    found = [getattr(layer, name, None) for layer in layers]
    numbers = [number for each in found for number in (each if isinstance(each, list | tuple) else [each]) if number]
    return math.ceil(sum(numbers) / len(numbers)) if numbers else 0


def _tower(model: Any) -> dict[str, int]:
    """What only images pass, and the numbers of one patch of an image."""
    base = base_model(model)
    vision = getattr(base.config, "vision_config", None)
    if vision is None or not getattr(vision, "patch_size", None):
        return {}
    head = base.get_output_embeddings()
    of_text = {id(weight) for part in (backbone_of(base), head) if part is not None for weight in part.parameters()}
    side = vision.patch_size[0] if isinstance(vision.patch_size, list | tuple) else vision.patch_size
    return {
        "tower": sum(weight.numel() for weight in base.parameters() if id(weight) not in of_text),
        "patch": 3 * side**2 * int(getattr(vision, "temporal_patch_size", None) or 1),
    }


def _states(model: Any) -> dict[str, int]:
    """What the layers that carry states add to a ``ModelSize``; nothing where there are none."""
    backbone = backbone_of(base_model(model))
    mixers = mixers_of(backbone)
    if not mixers:
        return {}
    sizes = [state_of(mixer) for mixer in mixers.values()]
    stateful = [size for size in sizes if size[0]]
    attentions = [m for m in backbone.modules() if hasattr(m, "is_causal") and hasattr(m, "scaling")]
    return {
        "attention_layers": len(attentions),
        "state_layers": len(stateful),
        "weights_passed": round(weights_passed(backbone)),
        "state": max((numbers for numbers, _ in stateful), default=0),
        "state_heads": max((heads for _, heads in stateful), default=0),
    }


def without_memory(config: Any) -> torch.nn.Module:
    """Make a causal LM of a transformers config on torch's ``meta`` device.

    Raises:
        FlexdpoError: if it is no config, or none can be made of it.
    """
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        raise FlexdpoError(f"expected a model, a transformers config or a ModelSize, got {found(config)}")
    try:
        with torch.device("meta"):
            model: torch.nn.Module = auto_class(config).from_config(config)
    except (ValueError, TypeError, KeyError) as error:
        raise FlexdpoError(f"no causal LM can be made of a {type(config).__name__}: {first_line(error)}") from error
    return model
