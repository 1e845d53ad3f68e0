"""``mask_mod`` factories: which token of a packed row may attend to which.

Every factory returns a ``mask_mod(batch, head, q_idx, kv_idx) -> bool`` as FlexAttention takes it. ``q_idx`` and
``kv_idx`` are row indices; whatever depends on distance is evaluated on logical positions instead, since a sibling
branch between two tokens moves them apart in the row but not in the text.

Shapes: ``B`` rows, ``S`` tokens per row; all tensors ``[B, S]`` int64 unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flexdpo.layout.row import RowLayout

# arguments are 0-d tensors in a kernel and may be integers or index tensors that broadcast elsewhere
MaskMod = Callable[[Any, Any, Any, Any], Tensor]


@dataclass(frozen=True)
class MaskKind:
    """What a model wants of its mask besides causality."""

    # ``"causal"``, ``"sliding"`` (attends to ``size`` tokens, itself included), ``"chunked"`` (attends within chunks of
    # ``size`` positions) or ``"other"`` (only known as a function of two positions)
    name: Literal["causal", "sliding", "chunked", "other"]
    # window or chunk in tokens; 0 where the name needs none. For ``"other"``, where not 0, no token sees one that
    # stands this many logical positions or more before it.
    size: int = 0
    function: MaskMod | None = None  # the model's own mask function for ``"other"``, evaluated at logical positions
    # whether the tokens of an image, one run of image tokens, also see those that come after them there (Gemma 3 and
    # 4), as far as a window lets them
    blocks: bool = False


CAUSAL = MaskKind("causal")


def tree_mask_mod(subtree_end: Tensor) -> MaskMod:
    """Let a token see itself and its ancestors: ``kv <= q < subtree_end[kv]``."""

    def mask_mod(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:  # noqa: ARG001
        visible: Tensor = (kv_idx <= q_idx) & (q_idx < subtree_end[batch, kv_idx])
        return visible

    return mask_mod


def block_mask_mod(subtree_end: Tensor, block_end: Tensor) -> MaskMod:
    """Let a token see itself, its ancestors, and what follows it in its image: also ``q < kv < block_end[q]``.

    ``block_end`` is the row index just past the image that a token belongs to, and of text itself.
    """
    tree = tree_mask_mod(subtree_end)

    def mask_mod(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        ahead: Tensor = (kv_idx > q_idx) & (kv_idx < block_end[batch, q_idx])
        return tree(batch, head, q_idx, kv_idx) | ahead

    return mask_mod


def composed_mask_mod(visible: MaskMod, position_ids: Tensor, function: MaskMod) -> MaskMod:
    """Of what is ``visible`` let a token see what a mask function allows, evaluated at logical positions."""

    def mask_mod(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        own = function(batch, head, position_ids[batch, q_idx], position_ids[batch, kv_idx])
        return visible(batch, head, q_idx, kv_idx) & own

    return mask_mod


def shifted_mask_mod(mask_mod: MaskMod, offset: int, device: torch.device) -> MaskMod:
    """Let queries count from ``offset`` on, behind the keys of passes of their own."""
    # a tensor, since every Python number would compile a kernel of its own
    behind = torch.full((), offset, dtype=torch.int64, device=device)
    return lambda batch, head, q_idx, kv_idx: mask_mod(batch, head, q_idx + behind, kv_idx)


def mask_mod_for(layout: RowLayout, kind: MaskKind) -> MaskMod:
    """Return the ``mask_mod`` of one mask kind on one layout; keys are those of its path too, where it has one."""
    if layout.keys is not None:
        return shifted_mask_mod(mask_mod_for(layout.keys, kind), layout.keys.length - layout.length, layout.device)
    visible = tree_mask_mod(layout.subtree_end)
    if kind.blocks:
        if kind.name not in ("causal", "sliding"):
            raise ValueError(f"images that see themselves both ways are known under a window only, not {kind.name!r}")
        visible = block_mask_mod(layout.subtree_end, layout.block_end())
    if kind.name == "causal":
        return visible
    # a tensor, as a Python number every new value would compile a kernel; written by the device itself, since one made
    # of a Python number is copied to it, and waits for all work before
    size = torch.full((), kind.size, dtype=torch.int64, device=layout.device)
    functions: dict[str, MaskMod | None] = {
        "sliding": lambda _batch, _head, q, kv: q - kv < size,
        "chunked": lambda _batch, _head, q, kv: q // size == kv // size,
        "other": kind.function,
    }
    function = functions[kind.name]
    if function is None:
        raise ValueError("a mask kind named 'other' needs its function")
    return composed_mask_mod(visible, layout.position_ids, function)
