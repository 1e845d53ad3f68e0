"""The mask of one kind on one batch of rows: a BlockMask that remembers the layout it was built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdpo.attention.block_masks import build_block_mask
from flexdpo.attention.flash import flash_block_size
from flexdpo.attention.mask_mods import MaskKind
from flexdpo.attention.score_mods import ScoreMod
from flexdpo.attention.settings import KernelSettings, kernel_settings
from flexdpo.errors import FlexdpoError, nearest
from flexdpo.layout.row import TILE, RowLayout

Kernel = Literal["flex", "varlen", "sdpa"]
Impl = Literal["auto", "flex", "varlen", "sdpa"]
_ATTRIBUTE = "_flexdpo_row_mask"


@dataclass(eq=False)
class RowMask:
    """What a kernel needs to know besides the BlockMask."""

    layout: RowLayout  # the batch of rows
    kind: MaskKind  # what the model wants besides causality
    # ``"flex"`` compiled FlexAttention, ``"varlen"`` FlashAttention along root paths, ``"sdpa"`` scaled-dot-product
    # attention in query blocks
    impl: Kernel
    block_mask: BlockMask  # the BlockMask that models pass from layer to layer
    settings: KernelSettings = field(default_factory=kernel_settings)  # how FlexAttention is compiled and checked
    traced: bool = False  # whether the mask was made inside a graph that ``torch.compile`` is making
    # whether the kernels of the compiled layer that is about to run were compared with dense attention
    tested: bool = False
    # additive masks of query blocks, made at the first layer and shared by the others: by plan and dtype, then number
    biases: dict[tuple[Any, torch.dtype], dict[int, Tensor]] = field(default_factory=dict, repr=False)
    score_mod: ScoreMod | None = None  # what a model does to its scores besides a softcap, after it


def row_mask_for(layout: RowLayout, kind: MaskKind, impl: Impl = "auto") -> RowMask:
    """Return the mask of one kind on one layout, building it the first time it is asked for."""
    device = layout.position_ids.device
    resolved = resolve_impl(impl, device)
    # an unknown mask function is a new object at every forward and may close over anything, so it is built anew
    # and a compiled model makes its masks inside its graph: a memo that fills up would compile it again
    keeps = kind.name != "other" and not torch.compiler.is_compiling()
    memo_key = (kind, resolved)
    if keeps and memo_key in layout.memo:
        found: RowMask = layout.memo[memo_key]
        # a checkpoint that runs the model again does so in a thread of the backward pass, with what the first run had
        if found.settings == kernel_settings() or torch._C._current_graph_task_id() != -1:
            return found
    block_mask = build_block_mask(layout, kind, block_size=_block_size(resolved, device))
    row_mask = RowMask(layout, kind, resolved, block_mask, kernel_settings(), torch.compiler.is_compiling())
    setattr(block_mask, _ATTRIBUTE, row_mask)
    if not row_mask.traced:
        # what BlockMask.to() returns is a new object with the same mask_mod: offloading moves every layer's inputs
        setattr(block_mask.mask_mod, _ATTRIBUTE, row_mask)
    if keeps:
        layout.memo[memo_key] = row_mask
    return row_mask


def _block_size(impl: str, device: torch.device) -> int | tuple[int, int]:
    if impl == "flex" and kernel_settings().backend == "FLASH" and device.type == "cuda":
        return flash_block_size(torch.cuda.get_device_capability(device))
    return TILE


def row_mask_of(attention_mask: object) -> RowMask | None:
    """Return the row mask that a BlockMask, or a copy of it on the same device, was built for; ``None`` for others."""
    found = getattr(attention_mask, _ATTRIBUTE, None)
    if found is None and isinstance(attention_mask, BlockMask):
        found = getattr(attention_mask.mask_mod, _ATTRIBUTE, None)
        if found is not None and attention_mask.kv_num_blocks.device != found.layout.device:
            return None
    return found if isinstance(found, RowMask) else None


def resolve_impl(impl: str, device: torch.device) -> Kernel:
    """Turn ``"auto"`` into the kernel that trains on ``device``: FlexAttention on CUDA, chunked SDPA elsewhere."""
    if impl not in get_args(Impl):
        raise FlexdpoError(f"impl must be one of {get_args(Impl)}, got {impl!r}{nearest(impl, get_args(Impl))}")
    if impl == "auto":
        # on a CPU query blocks are two to five times faster than FlexAttention's compiled forward, so passes without
        # gradients run in them too
        return "flex" if device.type == "cuda" else "sdpa"
    return cast("Kernel", impl)
