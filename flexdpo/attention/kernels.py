"""Attention over packed rows: compiled FlexAttention, and chunked SDPA where FlexAttention has no backward.

Shapes: ``B`` rows, ``Hq`` query heads, ``Hkv`` key heads, ``S`` tokens, ``D`` and ``Dv`` head sizes.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_mask, flex_attention

from flexdpo.attention.score_mods import softcap_score_mod
from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flexdpo.attention.mask_mods import MaskMod
    from flexdpo.attention.row_mask import RowMask

# queries of one chunk: large enough for efficient products, small enough that its scores stay in cache
CHUNK_QUERIES = 512
# chunk masks of one row are kept for all layers while they hold at most this many scores; above it, a long document's
# masks would grow with the square of its length, so they are built again at every layer
KEPT_SCORES = 1 << 24


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

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``, ``Hkv`` divides ``Hq``.
        value: ``[B, Hkv, S, Dv]``.
        row_mask: The mask and the kernel to run it with.
        scaling: Factor on the scores, ``D ** -0.5`` by default.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: One extra logit per query head that takes part in the softmax and carries no value, ``[Hq]``.

    Returns:
        ``[B, Hq, S, Dv]`` in the dtype of ``query``.

    Raises:
        FlexdpoError: if the shapes do not fit the layout, or the kernel that was asked for cannot do this.
    """
    layout = row_mask.layout
    if (query.shape[0], query.shape[2]) != (layout.batch_size, layout.length):
        raise FlexdpoError(
            f"the layout is for {layout.batch_size} rows of {layout.length} tokens, but attention received "
            f"{query.shape[0]} rows of {query.shape[2]}; pass the layout that belongs to these input_ids"
        )
    run = _flex if row_mask.impl == "flex" else _chunked
    return run(query, key, value, row_mask, scaling, softcap, sinks)


# --- FlexAttention ---------------------------------------------------------------------------------------------------


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # fullgraph: past its recompile limit FlexAttention would otherwise fall back to the dense version without a word
    return torch.compile(flex_attention, fullgraph=True)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if query.device.type == "cpu":
        _require_cpu_forward(query, key, value, sinks)
    kwargs: dict[str, Any] = {
        "block_mask": row_mask.block_mask,
        "scale": scaling,
        "score_mod": None if softcap is None else softcap_score_mod(softcap),
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    attend = _compiled_flex_attention()
    if sinks is None:
        output: Tensor = attend(query, key, value, **kwargs)
        return output
    # softmax over the scores and one sink: the usual output, scaled by the share of the mass that is not the sink's
    output, aux = attend(query, key, value, return_aux=AuxRequest(lse=True), **kwargs)
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
    return (output * share[..., None]).to(query.dtype)


def _require_cpu_forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> None:
    """FlexAttention on a CPU is a forward for float32 and below; say what is missing before torch does."""
    way_out = "use impl='sdpa' (or 'auto') there"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise FlexdpoError(f"impl='flex' has no backward on a CPU; {way_out}, or run under torch.no_grad()")
    if query.dtype == torch.float64:
        raise FlexdpoError(f"impl='flex' has no float64 kernel on a CPU; {way_out}")
    if sinks is not None:
        raise FlexdpoError(f"impl='flex' cannot return the log-sum-exp that attention sinks need on a CPU; {way_out}")


# --- chunks of queries -----------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Queries ``[start, stop)`` of one row and the first key any of them may see; the last one is ``stop - 1``."""

    row: int
    key_start: int
    start: int
    stop: int


def plan_chunks(subtree_end: Tensor, chunk_queries: int = CHUNK_QUERIES) -> list[Chunk]:
    """Cut rows into runs of queries: whole documents where they are short, pieces of one where it is long.

    Args:
        subtree_end: ``[B, S]`` int64; copied to the host.
        chunk_queries: Most queries in a chunk.

    Returns:
        Chunks that cover every query once, in order.
    """
    chunks = []
    for row, ends in enumerate(subtree_end.cpu()):
        for start, stop in _query_runs(ends, chunk_queries):
            live = ends[: start + 1] > start
            chunks.append(Chunk(row, int(live.int().argmax()), start, stop))
    return chunks


def _query_runs(ends: Tensor, chunk_queries: int) -> list[tuple[int, int]]:
    # a document ends where nothing before reaches beyond
    reach = ends.cummax(dim=0).values
    boundaries = [0, *(torch.nonzero(reach == torch.arange(1, len(ends) + 1)).flatten() + 1).tolist()]
    runs: list[tuple[int, int]] = []
    open_start = 0
    for start, stop in pairwise(boundaries):
        if stop - open_start <= chunk_queries // 4:
            continue  # several small documents share a chunk: one larger product beats many tiny ones
        if start > open_start:
            runs.append((open_start, start))
        open_start = start
        while stop - open_start > chunk_queries:
            runs.append((open_start, open_start + chunk_queries))
            open_start += chunk_queries
    if open_start < boundaries[-1]:
        runs.append((open_start, boundaries[-1]))
    return runs


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    chunks = _chunks_of(row_mask)
    biases = _kept_biases(row_mask, chunks, query.dtype)
    plain = softcap is None and sinks is None
    outputs: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for number, chunk in enumerate(chunks):
        row = slice(chunk.row, chunk.row + 1)
        q = query[row, :, chunk.start : chunk.stop]
        k = key[row, :, chunk.key_start : chunk.stop]
        v = value[row, :, chunk.key_start : chunk.stop]
        bias = _chunk_bias(row_mask, chunk, query.dtype) if biases is None else biases[number]
        if plain:
            gqa = q.shape[1] != k.shape[1]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling, enable_gqa=gqa)
        else:
            attended = softmax_attention(q, k, v, bias, scaling=scaling, softcap=softcap, sinks=sinks)
        outputs[chunk.row].append(attended)
    return torch.cat([torch.cat(pieces, dim=2) for pieces in outputs], dim=0)


def _chunks_of(row_mask: RowMask) -> list[Chunk]:
    memo = row_mask.layout.memo
    if "chunks" not in memo:
        memo["chunks"] = plan_chunks(row_mask.layout.subtree_end)
    chunks: list[Chunk] = memo["chunks"]
    return chunks


def _kept_biases(row_mask: RowMask, chunks: list[Chunk], dtype: torch.dtype) -> list[Tensor] | None:
    """The additive masks of all chunks, or ``None`` where keeping them would take too much memory."""
    if sum((c.stop - c.start) * (c.stop - c.key_start) for c in chunks) > KEPT_SCORES:
        return None
    if dtype not in row_mask.biases:
        row_mask.biases[dtype] = [_chunk_bias(row_mask, chunk, dtype) for chunk in chunks]
    return row_mask.biases[dtype]


def _chunk_bias(row_mask: RowMask, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """0 where a query of the chunk may attend to a key and ``-inf`` elsewhere, ``[queries, keys]``."""
    allowed = _chunk_mask(row_mask, chunk)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def _chunk_mask(row_mask: RowMask, chunk: Chunk) -> Tensor:
    mask_mod: MaskMod = row_mask.block_mask.mask_mod
    device = row_mask.layout.device
    if row_mask.kind.name == "other":
        # a function of unknown make is evaluated as FlexAttention would: one pair at a time, under vmap
        def shifted(_: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:
            return mask_mod(batch, head, q_idx + chunk.start, kv_idx + chunk.key_start)

        batch = torch.tensor(chunk.row, device=device)
        queries, keys = chunk.stop - chunk.start, chunk.stop - chunk.key_start
        return create_mask(shifted, 1, 1, queries, keys, device=str(device))[0, 0]
    q_idx = torch.arange(chunk.start, chunk.stop, device=device)
    kv_idx = torch.arange(chunk.key_start, chunk.stop, device=device)
    return mask_mod(chunk.row, 0, q_idx[:, None], kv_idx[None, :])


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by the formula, for what SDPA cannot do; the scores are held in memory.

    Args:
        query: ``[B, Hq, Q, D]``.
        key: ``[B, Hkv, K, D]``.
        value: ``[B, Hkv, K, Dv]``.
        bias: Added to the scores, broadcastable to ``[B, Hq, Q, K]``.
        scaling: Factor on the scores, ``D ** -0.5`` by default.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: One extra logit per query head that takes part in the softmax and carries no value, ``[Hq]``.

    Returns:
        ``[B, Hq, Q, Dv]`` in the dtype of ``value``; the softmax runs in float32 or better.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value
