"""The mask of one kind on one batch of rows: a BlockMask that remembers the layout it was built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from flexdpo.attention.block_masks import build_block_mask
from flexdpo.errors import FlexdpoError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

    from flexdpo.attention.mask_mods import MaskKind
    from flexdpo.layout.row import RowLayout

Impl = Literal["auto", "flex", "sdpa"]
_ATTRIBUTE = "_flexdpo_row_mask"


@dataclass(eq=False)
class RowMask:
    """What a kernel needs to know besides the BlockMask.

    Attributes:
        layout: The batch of rows.
        kind: What the model wants besides causality.
        impl: ``"flex"`` compiled FlexAttention, ``"sdpa"`` scaled-dot-product attention in chunks of queries.
        block_mask: The BlockMask that models pass from layer to layer.
        biases: Additive masks of the chunks by dtype, built at the first layer and shared by the others.
    """

    layout: RowLayout
    kind: MaskKind
    impl: Literal["flex", "sdpa"]
    block_mask: BlockMask
    biases: dict[torch.dtype, list[Tensor]] = field(default_factory=dict, repr=False)


def row_mask_for(layout: RowLayout, kind: MaskKind, impl: Impl = "auto") -> RowMask:
    """Return the mask of one kind on one layout, building it the first time it is asked for."""
    resolved = resolve_impl(impl, layout.device)
    # an unknown mask function is a new object at every forward and may close over anything, so it is built anew
    memo_key = (kind, resolved) if kind.name != "other" else None
    if memo_key is not None and memo_key in layout.memo:
        found: RowMask = layout.memo[memo_key]
        return found
    block_mask = build_block_mask(layout, kind)
    row_mask = RowMask(layout, kind, resolved, block_mask)
    setattr(block_mask, _ATTRIBUTE, row_mask)
    if memo_key is not None:
        layout.memo[memo_key] = row_mask
    return row_mask


def row_mask_of(attention_mask: object) -> RowMask | None:
    """Return the row mask that a BlockMask was built for, or ``None`` for anybody else's mask."""
    found = getattr(attention_mask, _ATTRIBUTE, None)
    return found if isinstance(found, RowMask) else None


def resolve_impl(impl: str, device: torch.device) -> Literal["flex", "sdpa"]:
    """Turn ``"auto"`` into the kernel that trains on ``device``: FlexAttention on CUDA, chunked SDPA elsewhere."""
    if impl not in get_args(Impl):
        raise FlexdpoError(f"impl must be one of {get_args(Impl)}, got {impl!r}{nearest(impl, get_args(Impl))}")
    if impl == "auto":
        return "flex" if device.type == "cuda" else "sdpa"
    return "flex" if impl == "flex" else "sdpa"
