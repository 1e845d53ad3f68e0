"""Attention of the part of a row that one process runs: its queries, and the keys and values of all processes.

Keys and values are gathered for the layer in hand and gathered again for its backward pass, so that what a process
holds from layer to layer is its own part. For the same reason the attention itself runs again there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexdpo.attention.inputs import AttentionInputs
from flexdpo.attention.row_mask import RowMask, row_mask_for
from flexdpo.errors import FlexdpoError
from flexdpo.layout.row_layout import ContextShard

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@torch.compiler.disable
def sharded_attention(packed_attention: Callable[..., Tensor], inputs: AttentionInputs, row_mask: RowMask) -> Tensor:
    """Attend from this process's tokens to those of all.

    Every process of the group must call it, in its forward and in its backward pass. ``packed_attention`` is
    :func:`flexdpo.attention.kernels.packed_attention`.
    """
    shard = row_mask.layout.shard
    assert shard is not None
    if row_mask.impl == "varlen":
        raise FlexdpoError("impl='varlen' plans whole rows; with context_parallel use impl='flex' (or 'auto')")

    def attend(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        attended = []
        for chunk, part in zip(shard.chunks, query.split(shard.chunks[0].length, dim=2), strict=True):
            seen = (chunk.keys or chunk).length
            mask = row_mask_for(chunk, row_mask.kind, row_mask.impl)
            settings = {"scaling": inputs.scaling, "softcap": inputs.softcap, "sinks": sinks}
            attended.append(packed_attention(part, keys[:, :, :seen], values[:, :, :seen], mask, **settings))
        return torch.cat(attended, dim=2)

    output: Tensor = _ShardedAttention.apply(inputs.query, inputs.key, inputs.value, inputs.sinks, shard, attend)
    return output


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, shard: ContextShard, attend: Attend
    ) -> Tensor:
        ctx.shard, ctx.attend = shard, attend
        ctx.save_for_backward(query, key, value, sinks)
        return attend(query, gathered_heads(key, shard), gathered_heads(value, shard), sinks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        whole = query, gathered_heads(key, ctx.shard), gathered_heads(value, ctx.shard)
        leaves = [x.detach().requires_grad_() for x in (*whole, *(() if sinks is None else (sinks,)))]
        with torch.enable_grad():
            attended = ctx.attend(*leaves[:3], leaves[3] if sinks is not None else None)
        to_query, to_keys, to_values, *to_sinks = torch.autograd.grad(attended, leaves, gradient)
        to_key, to_value = (_own_part(each, ctx.shard, query.shape[2]) for each in (to_keys, to_values))
        return to_query, to_key, to_value, to_sinks[0] if to_sinks else None, None, None


def gathered_heads(own: Tensor, shard: ContextShard) -> Tensor:
    """Heads of all processes' tokens in row order, ``[1, H, S, D]``, from this one's, ``[1, H, N, D]``."""
    tokens = rearrange(own, "1 h n d -> n h d").contiguous()
    everyone = tokens.new_empty(len(shard.order), *tokens.shape[1:])
    dist.all_gather_into_tensor(everyone, tokens, group=shard.group)
    return rearrange(everyone[shard.order], "s h d -> 1 h s d")


def _own_part(whole: Tensor, shard: ContextShard, tokens: int) -> Tensor:
    """The sum over all processes of what each found for this one's tokens, ``[1, H, N, D]``."""
    found = rearrange(whole, "1 h s d -> s h d")
    by_process = torch.empty_like(found, memory_format=torch.contiguous_format).index_copy_(0, shard.order, found)
    own = by_process.new_empty(tokens, *by_process.shape[1:])
    dist.reduce_scatter_tensor(own, by_process, group=shard.group)
    return rearrange(own, "n h d -> 1 h n d")
