"""Prepares models for shared, packed rows, and refuses those that would not give the ordinary result."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flexdpo.attention.row_mask import Impl, resolve_impl
from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.adapters import refuse_adapters
from flexdpo.hf.forward_layout import ATTN_IMPLEMENTATION, find_limits, install_layout_hooks
from flexdpo.hf.interface import flexdpo_attention, flexdpo_mask
from flexdpo.hf.rules import backbone_of, refusal_reason, require_exact, unwrap_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["backbone_of", "prepare_model", "refusal_reason", "register", "unwrap_model"]


def prepare_model(model: nn.Module, *, impl: Impl = "auto") -> nn.Module:
    """Make a Hugging Face causal LM run packed rows exactly, or refuse it.

    Checks that the model can be exact, sets ``attn_implementation="flexdpo"`` and lets the model take a row's layout as
    its ``attention_mask``. Without a layout the model goes on behaving as transformers made it. Safe to call again.

    Args:
        model: A ``PreTrainedModel``, or a ``PeftModel`` around one; before DDP, FSDP or ``torch.compile`` wrap it.
        impl: ``"auto"``, ``"flex"`` (compiled FlexAttention), ``"varlen"`` (FlashAttention along root paths: half
            precision on CUDA, no softcap, no sinks) or ``"sdpa"`` (chunks of queries, with a CPU backward).

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the model would not give the ordinary result.
        FlexdpoError: if ``model`` is not a Hugging Face model, or ``impl`` is unknown.
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
    for part in {base, backbone}:
        install_layout_hooks(part, impl)
        part._flexdpo_checked = True
    find_limits(base)
    return model


def register() -> None:
    """Make ``attn_implementation="flexdpo"`` known to transformers. Safe to call again."""
    AttentionInterface.register(ATTN_IMPLEMENTATION, flexdpo_attention)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, flexdpo_mask)
    _hook_into_loading()


def _hook_into_loading() -> None:
    """Let a model that is loaded with ``attn_implementation="flexdpo"`` take layouts at once.

    The name alone would run packed rows on no model: each one reads its ``attention_mask`` in its own way, and three
    never read it at all. transformers asks every model, when it is made and whenever the implementation changes,
    whether it can run the name asked for; that is where the hooks go in. The static rule follows at the first row.
    """
    ask = PreTrainedModel.get_correct_attn_implementation
    if hasattr(ask, "_flexdpo_asks"):
        return

    @wraps(ask)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        applicable: str = ask(self, requested_attention, is_init_check)
        if applicable == ATTN_IMPLEMENTATION and not hasattr(self, "_flexdpo_impl"):
            install_layout_hooks(self, "auto")
        return applicable

    get_correct_attn_implementation._flexdpo_asks = ask  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


# whoever gets here has imported transformers' models already
register()
