"""Attention over packed rows: compiled FlexAttention, FlashAttention along root paths, or pieces of SDPA.

FlexAttention has no backward on a CPU, which is what the pieces are for.

Shapes: ``B`` rows, ``Hq`` query heads, ``Hkv`` key heads, ``S`` tokens, ``D`` and ``Dv`` head sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

from flexdpo.attention.flex import run_flex
from flexdpo.attention.formula import softmax_attention
from flexdpo.attention.piecewise import piecewise_attention
from flexdpo.attention.selftest import require_correct_kernel
from flexdpo.attention.varlen import require_varlen, varlen_attention
from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.attention.row_mask import RowMask

__all__ = ["packed_attention", "softmax_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend within the branches of a batch of packed rows.

    Under autocast the inputs take autocast's dtype, as in ``scaled_dot_product_attention``.

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``, ``Hkv`` divides ``Hq``.
        value: ``[B, Hkv, S, Dv]``.
        row_mask: The mask and the kernel to run it with.
        scaling: Factor on the scores, ``D ** -0.5`` by default.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: One extra logit per query head that takes part in the softmax and carries no value, ``[Hq]``.

    Returns:
        ``[B, Hq, S, Dv]`` in the dtype of ``query``, or in autocast's.

    Raises:
        FlexdpoError: if the shapes do not fit the layout, the kernel that was asked for cannot do this, or its
            self-test found it wrong.
    """
    layout = row_mask.layout
    if (query.shape[0], query.shape[2]) != (layout.batch_size, layout.length):
        raise FlexdpoError(
            f"the layout is for {layout.batch_size} rows of {layout.length} tokens, but attention received "
            f"{query.shape[0]} rows of {query.shape[2]}; pass the layout that belongs to these input_ids"
        )
    query, key, value = _in_one_dtype(query, key, value)
    if row_mask.impl == "flex":
        if not torch.compiler.is_compiling():
            require_correct_kernel(query, key, value, row_mask, scaling, softcap, sinks)
        run = run_flex
    elif row_mask.impl == "varlen":
        # its plan is made on the host, so a compiled layer pauses for it
        run = _tested_varlen
    elif torch.compiler.is_compiling():
        # pieces follow from the data, so a graph that makes its own mask cannot hold them; one that receives a mask
        # pauses for them
        run = _whole if row_mask.traced else _paused
    else:
        run = piecewise_attention
    return run(query, key, value, row_mask, scaling, softcap, sinks)


def _in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # rotary embeddings are computed in float32, so under autocast queries and keys come wider than values
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


_paused = torch.compiler.disable(piecewise_attention)


@torch.compiler.disable
def _tested_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    require_varlen(query, value, row_mask, softcap, sinks)
    require_correct_kernel(query, key, value, row_mask, scaling, softcap, sinks, attend=varlen_attention)
    return varlen_attention(query, key, value, row_mask, scaling, softcap, sinks)


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend under one dense mask of ``S * S`` scores, for models compiled where FlexAttention has no backward."""
    length, device = row_mask.layout.length, row_mask.layout.device
    allowed = create_mask(row_mask.block_mask.mask_mod, row_mask.layout.batch_size, 1, length, length, str(device))
    bias = torch.zeros(allowed.shape, dtype=query.dtype, device=device).masked_fill(~allowed, float("-inf"))
    if softcap is None and sinks is None:
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=gqa)
    return softmax_attention(query, key, value, bias, scaling=scaling, softcap=softcap, sinks=sinks)
