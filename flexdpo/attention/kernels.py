"""Attention over packed rows: compiled FlexAttention, FlashAttention along root paths, or blocks of queries by SDPA.

FlexAttention has no backward on a CPU, which is what the query blocks are for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from flexdpo.attention.blockwise import blockwise_attention
from flexdpo.attention.context_parallel import sharded_attention
from flexdpo.attention.flex import run_flex
from flexdpo.attention.formula import softmax_attention
from flexdpo.attention.inputs import AttentionCall, AttentionInputs
from flexdpo.attention.remembered import remembered
from flexdpo.attention.row_mask import RowMask
from flexdpo.attention.score_mods import modified_scores
from flexdpo.attention.selftest import is_compared, require_correct_kernel
from flexdpo.attention.varlen import require_varlen, varlen_attention
from flexdpo.errors import FlexdpoError


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

    The mask brings a score_mod of the model's own and its kernel along; the other arguments are those of
    :class:`~flexdpo.attention.inputs.AttentionInputs`. Under autocast these take autocast's dtype, as in SDPA.

    Returns ``[B, Hq, S, Dv]`` in the dtype of ``query``, or in autocast's. Raises ``FlexdpoError`` if the shapes do not
    fit the layout, the kernel that was asked for cannot do this, or its self-test found it wrong.
    """
    _require_shapes(query, key, value, row_mask, sinks)
    if query.is_meta and row_mask.impl == "sdpa":
        # values are autocast's, where it was asked what that keeps
        kept: Tensor = _Kept.apply(*(_laid_out(x.to(value.dtype)) for x in (query, key, value)))
        return kept
    if torch.is_autocast_enabled(device := query.device.type) and query.dtype != torch.float64:
        # rotary embeddings are computed in float32, so queries and keys come wider than values
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    query, key, value = (_laid_out(x) for x in (query, key, value))
    inputs = AttentionInputs(query, key, value, scaling, softcap, sinks)
    if row_mask.layout.shard is not None:
        attended: Tensor = sharded_attention(packed_attention, inputs, row_mask)
        return attended
    compiling = torch.compiler.is_compiling()
    if remembered.checkpointed and (row_mask.impl != "sdpa" or compiling):
        raise FlexdpoError(
            "context_fn=keep_attention keeps what attention in query blocks came to, impl='sdpa' in layers that are "
            f"not compiled, and this is {row_mask.impl!r}{', compiled' if compiling else ''}; leave context_fn out"
        )
    if row_mask.impl == "flex":
        if compiling:
            _require_tested(row_mask, query.device)
        elif _watch.on:
            raise _Reached(AttentionCall.of(inputs))
        else:
            _compare(inputs, row_mask)
        return run_flex(inputs, row_mask)
    if row_mask.impl == "varlen" and row_mask.layout.keys is not None:
        raise FlexdpoError(
            "attn_impl='varlen' plans whole rows, and this one runs in pieces since it is longer than "
            "max_tokens_per_row; use attn_impl='flex' (or 'auto'), or raise max_tokens_per_row"
        )
    if row_mask.impl == "varlen":
        # its plan is made on the host, so a compiled layer pauses for it
        found: Tensor = _tested_varlen(inputs, row_mask)
        return found
    if not compiling:
        return blockwise_attention(inputs, row_mask)
    # query blocks follow from the data, so a graph that makes its own mask cannot hold them; one that receives a mask
    # pauses for them
    return _whole(inputs, row_mask) if row_mask.traced else _paused(inputs, row_mask)


class _Kept(torch.autograd.Function):
    """On torch's meta device, where nothing is computed: the output, and what every kernel keeps for its backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[3])
        normaliser = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004 (there is nothing in it)
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Watch(threading.local):
    on: bool = False


_watch = _Watch()


class _Reached(Exception):  # noqa: N818 (no error: it ends a run that has told what was asked)
    def __init__(self, call: AttentionCall) -> None:
        super().__init__(call)
        self.call = call


def attention_call_of(run: Callable[[], object]) -> AttentionCall | None:
    """Run a layer as far as its FlexAttention on a packed row, and return what it asks of it.

    Nothing behind the attention runs, and ``run`` is given up where it stands.

    Returns ``None`` where the layer never gets there.
    """
    before, _watch.on = _watch.on, True
    try:
        with torch.no_grad():
            run()
    except _Reached as reached:
        return reached.call
    finally:
        _watch.on = before
    return None


def _require_tested(row_mask: RowMask, device: torch.device) -> None:
    """Keep a kernel that nothing has compared with dense attention out of a graph."""
    if is_compared(row_mask, device) and not row_mask.tested:
        raise FlexdpoError(
            "FlexAttention would be compiled into a graph before its self-test. Compile layers with "
            "flexdpo.compile_decoder_layers, which tests before it compiles; for a model compiled whole, run a "
            "packed row through it once before torch.compile; or switch self_test off"
        )


def _require_shapes(query: Tensor, key: Tensor, value: Tensor, row_mask: RowMask, sinks: Tensor | None) -> None:
    """Stop at what kernels would read as something else: they look keys up by the row's indices, whatever is there."""
    rows, length = row_mask.layout.position_ids.shape
    for tensor in (query, key, value):
        if tensor is not query and row_mask.layout.keys is not None:
            length = row_mask.layout.keys.length
        if (tensor.shape[0], tensor.shape[2]) != (rows, length):
            raise FlexdpoError(
                f"the layout is for {rows} rows of {length} tokens, but attention received {tensor.shape[0]} rows of "
                f"{tensor.shape[2]}; pass the layout that belongs to these input_ids"
            )
    heads, key_heads = query.shape[1], key.shape[1]
    empty = 0 in (heads, key_heads, query.shape[3], value.shape[3])
    if empty or heads % key_heads or value.shape[1] != key_heads or key.shape[3] != query.shape[3]:
        raise FlexdpoError(
            "attention takes query [B, Hq, S, D], key [B, Hkv, S, D] and value [B, Hkv, S, Dv], no size 0 and Hkv a "
            f"divisor of Hq, got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise FlexdpoError(f"sinks must hold one logit for each of {heads} query heads, got {list(sinks.shape)}")


def _laid_out(x: Tensor) -> Tensor:
    """The tensor with each head's values side by side, as kernels read them whatever its strides say.

    torch's CPU kernel and FlexAttention's memory descriptors take the last stride for 1; gradients take the strides of
    what they belong to, and where one is 0 many values would share a place.
    """
    shared = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.contiguous() if shared or x.stride(-1) != 1 else x


_paused = torch.compiler.disable(blockwise_attention)
# around a graph that broke off, Dynamo would compile the comparison too
_compare = torch.compiler.disable(require_correct_kernel)


@torch.compiler.disable
def _tested_varlen(inputs: AttentionInputs, row_mask: RowMask) -> Tensor:
    # what the kernel cannot do is said before it is compared
    require_varlen(inputs, row_mask)
    require_correct_kernel(inputs, row_mask, attend=varlen_attention)
    return varlen_attention(inputs, row_mask)


def _whole(inputs: AttentionInputs, row_mask: RowMask) -> Tensor:
    """Attend under one dense mask of ``S * S`` scores, for models compiled where FlexAttention has no backward."""
    query, key, value, scaling, softcap, sinks = inputs
    length, device, batch = row_mask.layout.length, row_mask.layout.device, row_mask.layout.batch_size
    # only a mask function of unknown make may tell heads apart
    heads = query.shape[1] if row_mask.kind.name == "other" else 1
    allowed = create_mask(row_mask.block_mask.mask_mod, batch, heads, length, length, str(device))
    bias = torch.zeros(allowed.shape, dtype=query.dtype, device=device).masked_fill(~allowed, float("-inf"))
    if softcap is None and sinks is None and row_mask.score_mod is None:
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=gqa)
    rows, index = torch.arange(batch, device=device), torch.arange(length, device=device)
    score_mod = row_mask.score_mod and partial(
        modified_scores, row_mask.score_mod, batch=rows, q_idx=index, kv_idx=index
    )
    return softmax_attention(inputs, bias, score_mod=score_mod)
