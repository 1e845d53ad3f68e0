"""Which models are exact on shared, packed rows, and what they need to get there."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from flexdpo.attention.row_mask import Impl, resolve_impl
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.interface import ATTN_IMPLEMENTATION, install_layout_hooks

if TYPE_CHECKING:
    from torch import nn

_EXACT_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def prepare_model(model: nn.Module, *, impl: Impl = "auto") -> nn.Module:
    """Make a Hugging Face causal LM run packed rows exactly, or refuse it.

    Checks that the model can be exact, sets ``attn_implementation="flexdpo"`` and lets the model take a row's layout as
    its ``attention_mask``. Without a layout the model goes on behaving as transformers made it. Safe to call again.

    Args:
        model: A ``PreTrainedModel``, or a ``PeftModel`` around one; before DDP, FSDP or ``torch.compile`` wrap it.
        impl: ``"auto"``, ``"flex"`` (compiled FlexAttention) or ``"sdpa"`` (chunks of queries, with a CPU backward).

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the model would not give the ordinary result.
        FlexdpoError: if ``model`` is not a Hugging Face model, or ``impl`` is unknown.
    """
    resolve_impl(impl, torch.device("cpu"))
    base = unwrap_model(model)
    backbone = backbone_of(base)
    reason = refusal_reason(backbone)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(base).__name__} (model_type {base.config.model_type!r}) cannot be exact on shared, packed rows: "
            f"{reason}. Train it without flexdpo."
        )
    base.set_attn_implementation(ATTN_IMPLEMENTATION)
    # transformers only warns where it cannot change the implementation, and keeps the old one
    for part in (base, backbone):
        if part.config._attn_implementation != ATTN_IMPLEMENTATION:
            raise UnsupportedModelError(
                f"{type(part).__name__} kept attn_implementation={part.config._attn_implementation!r}; "
                "transformers cannot change it for this model, so train it without flexdpo"
            )
    install_layout_hooks(base, impl)
    if backbone is not base:
        install_layout_hooks(backbone, impl)
    return model


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """Return the ``PreTrainedModel`` inside a PEFT model, or the model itself."""
    if isinstance(model, torch.nn.DataParallel):
        raise UnsupportedModelError(
            "nn.DataParallel runs replicas in threads that would share one layout; start one process per GPU with "
            "torchrun or accelerate launch"
        )
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise FlexdpoError(
            f"expected a transformers PreTrainedModel or a PeftModel around one, got {type(inner).__name__}; "
            "prepare the model before it is wrapped or compiled"
        )
    return inner


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the decoder below the language-model head, which is what decides whether a model can be exact."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def refusal_reason(backbone: PreTrainedModel) -> str | None:
    """Say why a backbone cannot be exact, by its class and config alone; ``None`` where nothing speaks against it."""
    config = backbone.config
    if not type(backbone)._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _EXACT_LAYER_TYPES)
    if other:
        return f"its layers of type {', '.join(other)} mix tokens in row order"
    if getattr(backbone, "_is_stateful", False):
        return "it carries a recurrent state from token to token in row order"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return "its backbone takes no position_ids, so positions would count row indices"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in backbone.modules()):
        return "its positions start at padding_idx + 1 and are made from input_ids"
    return None
