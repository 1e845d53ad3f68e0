"""Lets rotary embeddings whose frequencies change with the length of a batch go by each sequence of a packed row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexdpo.hf.forward_layout import packed_forward
from flexdpo.hf.row_dependence import evaluated_by_side, length_limits, rotary_modules
from flexdpo.hf.unwrap import backbone_of

if TYPE_CHECKING:
    from torch import nn


def find_limits(module: Any) -> None:
    """Let the rotary embeddings of a causal LM or its backbone go by each token's sequence. Safe to call again."""
    backbone = backbone_of(module)
    if "_flexdpo_limits" not in vars(backbone):
        backbone._flexdpo_limits = limits = length_limits(backbone)
        if limits.limits:
            backbone._flexdpo_hooks += tuple(
                rotary.register_forward_hook(_go_by_sequences, with_kwargs=True) for rotary in rotary_modules(backbone)
            )
    module._flexdpo_limits = backbone._flexdpo_limits


def _go_by_sequences(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG001
    forward = packed_forward()
    if forward is None or forward.layout.longest is None:
        return None  # without lengths all sequences were found to be short
    return evaluated_by_side(module, forward.module._flexdpo_limits, forward.layout.longest, args, kwargs)
