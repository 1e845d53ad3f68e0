"""Prepares models for shared, packed rows, and refuses those that would not give the ordinary result."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from flexdpo.attention.row_mask import Impl, resolve_impl
from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.adapters import refuse_adapters
from flexdpo.hf.forward_layout import ATTN_IMPLEMENTATION, MixingLayers, install_layout_hooks
from flexdpo.hf.images import install_image_hooks
from flexdpo.hf.interface import flexdpo_attention, flexdpo_mask
from flexdpo.hf.limits import find_limits
from flexdpo.hf.mixers import install_mixers
from flexdpo.hf.rules import attends, require_exact
from flexdpo.hf.unwrap import backbone_of, unwrap_model


def prepare_model(model: nn.Module, *, impl: Impl = "auto") -> nn.Module:
    """Make a Hugging Face causal LM run packed rows exactly, or refuse it.

    Checks that the model can be exact, sets ``attn_implementation="flexdpo"`` and lets the model take a row's layout as
    its ``attention_mask``. Without a layout the model goes on behaving as transformers made it. Safe to call again.

    Args:
        model: A ``PreTrainedModel``, or a ``PeftModel`` around one; before DDP, FSDP or ``torch.compile`` wrap it.
        impl: ``"auto"``, ``"flex"`` (compiled FlexAttention), ``"varlen"`` (FlashAttention along root paths: half
            precision on CUDA, no softcap, no sinks) or ``"sdpa"`` (chunks of queries, with a CPU backward).

    Returns the same model. Raises ``UnsupportedModelError`` if it would not give the ordinary result, ``FlexdpoError``
    if it is no Hugging Face model or ``impl`` is unknown.
    """
    resolve_impl(impl, torch.device("cpu"))
    base: Any = unwrap_model(model)
    require_exact(base)
    refuse_adapters(model)
    backbone: Any = backbone_of(base)
    # the parts of a multimodal model that look at images keep their own attention
    backbone.set_attn_implementation(ATTN_IMPLEMENTATION)
    # transformers only warns where it cannot change the implementation, and keeps the old one
    if backbone.config._attn_implementation != ATTN_IMPLEMENTATION:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} kept attn_implementation={backbone.config._attn_implementation!r}; "
            "transformers cannot change it for this model, so train it without flexdpo"
        )
    mixing = MixingLayers(attends(backbone), install_mixers(backbone))
    for part in {base, backbone}:
        install_layout_hooks(part, impl)
        part._flexdpo_mixing = mixing
    install_image_hooks(base)
    find_limits(base)
    return model


# whoever gets here has imported transformers' models already
AttentionInterface.register(ATTN_IMPLEMENTATION, flexdpo_attention)
AttentionMaskInterface.register(ATTN_IMPLEMENTATION, flexdpo_mask)
