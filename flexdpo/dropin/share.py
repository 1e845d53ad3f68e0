"""The drop-in: a model in anybody's training loop runs the common beginnings of a padded batch once.

Hooks on the backbone turn a padded batch into one packed row on the token trie of its rows, and put what the backbone
returns back at the padded places. Everything above the backbone (heads, losses, metrics) sees what it always saw.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from flexdpo.attention.row_mask import Impl
from flexdpo.dropin.hooks import Sharing, SharingStats, install_sharing_hooks, remove_sharing_hooks, sharing_of
from flexdpo.dropin.native_attention import implementation_over
from flexdpo.dropin.rules import Positions
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.forward_layout import install_layout_hooks, remove_layout_hooks
from flexdpo.hf.images import image_part, install_image_hooks, looks_at_images, remove_image_hooks
from flexdpo.hf.limits import find_limits
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.unwrap import backbone_of, unwrap_model, unwrapped
from flexdpo.layout.sequences import is_count


@dataclass(eq=False)
class PrefixSharing:
    """Sharing in force on a model; as a context manager it ends with the ``with`` block."""

    model: nn.Module

    @property
    def stats(self) -> SharingStats:
        """What sharing has done so far."""
        return sharing_stats(self.model)

    def unshare(self) -> None:
        """See :func:`unshare`."""
        unshare(self.model)

    def __enter__(self) -> PrefixSharing:
        return self

    def __exit__(self, *error: object) -> None:
        self.unshare()


def share_prefixes(
    model: nn.Module, *, min_gain: float = 1.1, min_prefix: int = 16, impl: Impl = "auto"
) -> PrefixSharing:
    """Let a model run the common beginnings of the rows of a padded batch once, in whatever loop it is used.

    Chosen and rejected, K completions of a prompt, repeated prompts: whatever begins alike in a batch ``[N, T]`` of
    token ids is run once, padding not at all, and ``last_hidden_state``, ``hidden_states`` and ``router_logits`` come
    back in their padded places, 0 at padding. Heads, losses, metrics and gradients are those without sharing, to
    rounding. What cannot be shared exactly (a cache, attention weights, dropout in training), or is not worth it, runs
    as before and is counted by :func:`sharing_stats`.

    Padding may stand on either side, and rows may hold several sequences one behind the other, told apart by
    ``position_ids`` that begin again, ``[1, T]`` or ``[N, T]``. Where positions are absolute (GPT-2), or the caller's
    own, tokens are shared that agree in their positions too. A cache is not made for a shared batch: outside of
    training mode, calls are shared that say ``use_cache=False``.

    Args:
        model: A ``PreTrainedModel`` with any head, or a ``PeftModel`` around one; before DDP, FSDP or
            ``torch.compile`` wrap it. It is changed in place.
        min_gain: Padded places per token that would be run, ``N * T / S``, below which a batch passes through.
        min_prefix: Rows with fewer tokens than this in common share none of them: a common BOS saves nothing and ties
            all rows of the batch together.
        impl: As in :func:`flexdpo.prepare_model`.

    Raises ``UnsupportedModelError`` if the model would not give the ordinary result, and ``FlexdpoError`` if it is
    shared already, wrapped or compiled, or an argument is out of range.
    """
    _require_bare(model)
    return share_backbone(model, min_gain=min_gain, min_prefix=min_prefix, impl=impl)


def share_backbone(
    model: nn.Module, *, min_gain: float = 1.1, min_prefix: int = 16, impl: Impl = "auto", scores_only: bool = False
) -> PrefixSharing:
    """:func:`share_prefixes` for a model that may be sharded; one that ``scores_only`` makes a cache only if told."""
    # NaN is not at least 1
    if not isinstance(min_gain, int | float) or isinstance(min_gain, bool) or not min_gain >= 1:
        raise FlexdpoError(f"min_gain must be at least 1, got {min_gain!r}; 1 shares whenever nothing more is run")
    if not is_count(min_prefix):
        raise FlexdpoError(f"min_prefix must be at least 1 token, got {min_prefix!r}; give a whole number")
    base = unwrap_model(model)
    backbone, input_module = backbone_of(base), input_module_of(base)
    if sharing_of(input_module) is not None:
        raise FlexdpoError(
            f"this {type(base).__name__} shares prefixes already; call flexdpo.unshare(model) before sharing it again"
        )
    if looks_at_images(input_module) and image_part(input_module) is None:
        raise UnsupportedModelError(
            f"{type(base).__name__} looks at images, which flexdpo shares from transformers 5.15 on; "
            "install a newer one, or train it without sharing"
        )
    stock = backbone.config._attn_implementation
    impl_before: Any = getattr(backbone, "_flexdpo_impl", None)
    name = implementation_over(stock)
    prepare_model(model, impl=impl)
    backbone.set_attn_implementation(name)
    install_layout_hooks(input_module, impl)
    if image_part(input_module) is input_module:
        install_image_hooks(input_module)
    input_module._flexdpo_mixing = backbone._flexdpo_mixing
    find_limits(input_module)
    parameters = tuple(inspect.signature(type(input_module).forward).parameters)[1:]
    positions = Positions.of(backbone)
    sharing = Sharing(stock, impl_before, impl, min_gain, min_prefix, positions, parameters, scores_only)
    install_sharing_hooks(input_module, sharing)
    return PrefixSharing(model)


def unshare(model: nn.Module) -> None:
    """Undo :func:`share_prefixes`: the model runs as if it had never been shared; ``FlexdpoError`` if it was not."""
    base = unwrap_model(unwrapped(model))
    backbone, input_module = backbone_of(base), input_module_of(base)
    sharing = _require_shared(input_module)
    remove_sharing_hooks(input_module)
    backbone.set_attn_implementation(sharing.stock)
    parts: set[Any] = {base, backbone, input_module}
    for part in parts:
        if sharing.impl_before is None:
            remove_layout_hooks(part)
            remove_image_hooks(part)
        else:
            part._flexdpo_impl = sharing.impl_before


def sharing_stats(model: nn.Module) -> SharingStats:
    """What sharing did on a model, and which batches passed through and why; ``FlexdpoError`` if it is not shared."""
    return _require_shared(input_module_of(unwrap_model(unwrapped(model)))).stats_so_far()


def is_shared(model: nn.Module) -> bool:
    """Whether prefixes are shared on a model, or on what is inside of its wrappers."""
    return sharing_of(input_module_of(unwrap_model(unwrapped(model)))) is not None


def input_module_of(base: PreTrainedModel) -> PreTrainedModel:
    """The part that takes token ids from a model's head: the backbone, or what makes embeddings of text and images."""
    backbone, inner = backbone_of(base), base.base_model
    # with a part for images comes a config of its own
    composed = isinstance(inner, PreTrainedModel) and inner.config is not backbone.config
    return inner if composed and "position_ids" in inspect.signature(inner.forward).parameters else backbone


def _require_shared(input_module: nn.Module) -> Sharing:
    sharing = sharing_of(input_module)
    if sharing is None:
        raise FlexdpoError(
            f"this {type(input_module).__name__} shares no prefixes; call flexdpo.share_prefixes(model) first"
        )
    return sharing


def _require_bare(model: Any) -> None:
    """Stop where the model is not the bare one: one rule for all wrappers."""
    inner: Any = unwrapped(model)
    parts: set[Any] = set()
    if inner is model and (isinstance(model, PreTrainedModel) or hasattr(model, "get_base_model")):
        base = unwrap_model(model)
        parts = {model, base, input_module_of(base), backbone_of(base)}
    if isinstance(model, OptimizedModule) or any(part._compiled_call_impl is not None for part in parts):
        raise FlexdpoError(
            f"this {type(getattr(model, '_orig_mod', model)).__name__} is compiled already; call "
            "flexdpo.share_prefixes(model) first and torch.compile after it"
        )
    wrapper = None if inner is model else type(model).__name__
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        wrapper = "FSDP2 (fully_shard)" if isinstance(model, FSDPModule) else wrapper
    if wrapper is not None:
        raise FlexdpoError(
            f"the model is wrapped by {wrapper} already; call flexdpo.share_prefixes(model) on the bare model and "
            "wrap it after that"
        )
