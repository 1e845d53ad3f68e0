"""Attention in pieces of a row, in memory linear in its length, for where FlexAttention has no backward.

Each piece (:mod:`flexdpo.attention.query_blocks`) runs on its own, and its gradients are added into those of the whole
row in place. Letting autograd do that would allocate and add a whole row of zeros for every piece.

Shapes: ``B`` rows, ``Hq`` query heads, ``Hkv`` key heads, ``S`` tokens, ``D`` and ``Dv`` head sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_mask
from torch.utils.checkpoint import checkpoint

from flexdpo.attention.formula import softmax_attention
from flexdpo.attention.query_blocks import MAX_QUERIES, Piece, plan_pieces
from flexdpo.attention.score_mods import modified_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flexdpo.attention.mask_mods import MaskMod
    from flexdpo.attention.row_mask import RowMask

# the masks of one row's pieces are kept for all layers while they hold at most this many scores; above it, a long
# document's masks would grow with the square of its length, so they are built again at every layer
KEPT_SCORES = 1 << 24
# scores of all heads that a piece may hold where no fused kernel hides them
FORMULA_SCORES = 1 << 21

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def piecewise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend piece by piece; arguments and result as in :func:`flexdpo.attention.kernels.packed_attention`."""
    fused = _is_fused(query, value, softcap) and row_mask.score_mod is None
    plan = _plan_for(row_mask, query.shape[1], query.shape[3], fused)
    run = _Run(row_mask, plan, *_pieces_of(row_mask, plan), query.shape[1], fused, scaling, softcap)
    if row_mask.score_mod is not None:
        return _attend_with_score_mod(query, key, value, sinks, run)
    output: Tensor = _PiecewiseAttention.apply(query, key, value, sinks, run)
    return output


def _is_fused(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether torch's own CPU kernel can do this: it returns what its backward needs, and takes a mask."""
    return query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]


class _Plan(NamedTuple):
    """What :func:`flexdpo.attention.query_blocks.plan_pieces` is asked for."""

    width: int
    max_queries: int


def _plan_for(row_mask: RowMask, heads: int, head_dim: int, fused: bool) -> _Plan:
    if fused:
        return _Plan(heads * head_dim, MAX_QUERIES)
    # every head's scores exist at once here, so a piece is narrower the more keys it may see
    memo = row_mask.layout.memo
    if "deepest" not in memo:
        memo["deepest"] = int(row_mask.layout.position_ids.max()) + 1
    narrow = FORMULA_SCORES // (heads * memo["deepest"])
    return _Plan(heads * head_dim, max(16, min(MAX_QUERIES, narrow)))


def _pieces_of(row_mask: RowMask, plan: _Plan) -> tuple[list[Piece], bool]:
    """The pieces of a row, and whether their masks may be kept for all layers."""
    memo, kind = row_mask.layout.memo, row_mask.kind
    memo_key = ("pieces", kind.name, kind.size, plan)
    if memo_key not in memo:
        pieces = plan_pieces(row_mask.layout, kind, width=plan.width, max_queries=plan.max_queries)
        memo[memo_key] = pieces, sum(piece.num_scores for piece in pieces) <= KEPT_SCORES
    found: tuple[list[Piece], bool] = memo[memo_key]
    return found


# --- the masks of pieces ---------------------------------------------------------------------------------------------


def _indices(piece: Piece, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row indices of a piece's queries and of its keys."""
    keys = [torch.arange(start, stop, device=device) for start, stop in piece.key_runs]
    return torch.arange(piece.start, piece.stop, device=device), torch.cat(keys)


def bias_between(row_mask: RowMask, row: int, q_idx: Tensor, kv_idx: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """0 where a query of a row may attend to a key and ``-inf`` elsewhere.

    Args:
        row_mask: The mask.
        row: Which row of the batch.
        q_idx: Row indices of the queries, ``[queries]`` int64.
        kv_idx: Row indices of the keys, ``[keys]`` int64.
        dtype: Of the result.
        heads: Query heads.

    Returns:
        ``[queries, keys]``, or ``[heads, queries, keys]`` where a mask function tells heads apart.
    """
    mask_mod: MaskMod = row_mask.block_mask.mask_mod
    device = q_idx.device
    if row_mask.kind.name == "other":
        # a function of unknown make is evaluated as FlexAttention would: one pair at a time, under vmap
        def shifted(_: Any, head: Any, query: Any, key: Any) -> Tensor:
            return mask_mod(batch, head, q_idx[query], kv_idx[key])

        batch = torch.full((), row, device=device)
        allowed = create_mask(shifted, 1, heads, len(q_idx), len(kv_idx), device=str(device))[0]
        allowed = allowed[0] if bool((allowed == allowed[:1]).all()) else allowed
    else:
        allowed = mask_mod(row, 0, q_idx[:, None], kv_idx[None, :])
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))


def block_score_mod(row_mask: RowMask, row: int, q_idx: Tensor, kv_idx: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The mask's score_mod for scores ``[1, heads, queries, keys]`` of some queries and keys of a row."""
    score_mod = row_mask.score_mod
    if score_mod is None:
        return None
    batch = torch.full((1,), row, device=q_idx.device)
    return lambda scores: modified_scores(score_mod, scores, batch, q_idx, kv_idx)


# --- forward and backward --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Run:
    """What the pieces of one call have in common."""

    row_mask: RowMask
    plan: _Plan
    pieces: list[Piece]
    keeps_masks: bool
    heads: int
    fused: bool
    scaling: float | None
    softcap: float | None

    def bias(self, number: int, dtype: torch.dtype) -> Tensor:
        """What :func:`bias_between` the queries and the keys of piece ``number`` is."""
        kept = self.row_mask.biases.get((self.plan, dtype), {})
        if number in kept:
            return kept[number]
        piece = self.pieces[number]
        q_idx, kv_idx = _indices(piece, self.row_mask.layout.position_ids.device)
        bias = bias_between(self.row_mask, piece.row, q_idx, kv_idx, dtype, self.heads)
        if bias.ndim == 2 and self.keeps_masks:
            self.row_mask.biases.setdefault((self.plan, dtype), {})[number] = bias
        return bias


class _Part(NamedTuple):
    """The heads of one piece, query heads grouped by the key head they share: ``[Hkv, Hq / Hkv, tokens, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor


def _part(run: _Run, number: int, query: Tensor, key: Tensor, value: Tensor) -> _Part:
    piece = run.pieces[number]
    groups = query.shape[1] // key.shape[1]
    bias = run.bias(number, query.dtype)
    return _Part(
        _grouped(query[piece.row, :, piece.start : piece.stop], key.shape[1]),
        _gathered(key, piece)[:, None].expand(-1, groups, -1, -1),
        _gathered(value, piece)[:, None].expand(-1, groups, -1, -1),
        bias if bias.ndim == 2 else _grouped(bias, key.shape[1]),
    )


def _grouped(heads: Tensor, key_heads: int) -> Tensor:
    grouped: Tensor = heads.unflatten(0, (key_heads, -1))
    return grouped


def _gathered(x: Tensor, piece: Piece) -> Tensor:
    runs = [x[piece.row, :, start:stop] for start, stop in piece.key_runs]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)


class _PiecewiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, run: _Run) -> Tensor:
        batch, heads, length, _ = query.shape
        # laid out token by token, as the projection that follows wants it
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(batch, heads, length, dtype=wide) if run.fused else None
        for number, piece in enumerate(run.pieces):
            part = _part(run, number, query, key, value)
            here = (piece.row, slice(None), slice(piece.start, piece.stop))
            if lse is None:
                output[here] = _plain_piece(part, run, sinks).flatten(0, 1)
            else:
                attended, norm = _flash(*part[:3], 0.0, False, attn_mask=part.bias, scale=run.scaling)
                output[here], lse[here] = attended.flatten(0, 1), norm.flatten(0, 1)
        if lse is not None and sinks is not None:
            lse = _let_sinks_in_(output, lse, sinks)
        ctx.run = run
        ctx.save_for_backward(query, key, value, sinks, output if run.fused else None, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        query, key, value, sinks, output, lse = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        to_sinks = None
        if sinks is not None:
            to_sinks = torch.zeros_like(sinks) if lse is None else _sink_gradient(gradient, output, lse, sinks)
        for number, piece in enumerate(run.pieces):
            part = _part(run, number, query, key, value)
            here = (piece.row, slice(None), slice(piece.start, piece.stop))
            grad = _grouped(gradient[here], key.shape[1])
            if lse is None:
                found = _plain_gradients(part, run, sinks, grad)
                if to_sinks is not None:
                    to_sinks += found[3]
            else:
                attended, norm = _grouped(output[here], key.shape[1]), _grouped(lse[here], key.shape[1])
                found = _flash_backward(
                    grad, *part[:3], attended, norm, 0.0, False, attn_mask=part.bias, scale=run.scaling
                )
            to_query[here] = found[0].flatten(0, 1)
            _scatter_add_(to_key, found[1], piece)
            _scatter_add_(to_value, found[2], piece)
        return to_query, to_key, to_value, to_sinks, None


def _scatter_add_(total: Tensor, gradient: Tensor, piece: Piece) -> None:
    """Add the gradients of a piece's keys, ``[Hkv, groups, keys, D]``, to those of all keys."""
    summed = gradient[:, 0] if gradient.shape[1] == 1 else gradient.sum(dim=1)
    offset = 0
    for start, stop in piece.key_runs:
        total[piece.row, :, start:stop] += summed[:, offset : offset + stop - start]
        offset += stop - start


def _let_sinks_in_(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Share the softmax with one sink per head, which carries no value: scales ``output`` in place, returns the norm.

    With this output and this normaliser the kernel's own backward gives the gradients of a softmax that has the sink.
    """
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    output.mul_((lse - with_sink).exp()[..., None].to(output.dtype))
    return with_sink


def _sink_gradient(gradient: Tensor, output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()
    delta = (gradient.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1)
    return -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)


def _plain_piece(
    part: _Part, run: _Run, sinks: Tensor | None, score_mod: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """One piece by SDPA or the formula; its scores live as long as the piece."""
    query, key, value, bias = part
    if run.softcap is None and sinks is None and score_mod is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=run.scaling)
    attended = softmax_attention(
        query.flatten(0, 1)[None],
        key.flatten(0, 1)[None],
        value.flatten(0, 1)[None],
        bias if bias.ndim == 2 else bias.flatten(0, 1),
        scaling=run.scaling,
        softcap=run.softcap,
        sinks=sinks,
        score_mod=score_mod,
    )
    return _grouped(attended[0], query.shape[0])


def _plain_gradients(part: _Part, run: _Run, sinks: Tensor | None, gradient: Tensor) -> tuple[Tensor, ...]:
    """Run a piece again with gradients, so that no piece's scores outlive it."""
    query, key, value = (x.detach().requires_grad_() for x in part[:3])
    sink_leaf = None if sinks is None else sinks.detach().requires_grad_()
    with torch.enable_grad():
        attended = _plain_piece(_Part(query, key, value, part.bias), run, sink_leaf)
    return torch.autograd.grad(attended, [query, key, value, *([] if sink_leaf is None else [sink_leaf])], gradient)


# --- with a score_mod ------------------------------------------------------------------------------------------------


def _attend_with_score_mod(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, run: _Run) -> Tensor:
    """Attend piece by piece and leave the gradients to autograd: a score_mod may have captured what is trained.

    Which tensors those are nobody can tell from outside, so each piece is checkpointed, and runs again in the backward
    pass with whatever it captured.
    """

    def attend(number: int, *inputs: Tensor) -> Tensor:
        piece = run.pieces[number]
        score_mod = block_score_mod(run.row_mask, piece.row, *_indices(piece, query.device))
        part = _part(run, number, *inputs[:3])
        return _plain_piece(part, run, sinks, score_mod).flatten(0, 1)

    rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for number, piece in enumerate(run.pieces):
        attended = checkpoint(attend, number, query, key, value, use_reentrant=False, preserve_rng_state=False)
        rows[piece.row].append(attended)
    return torch.stack([torch.cat(row, dim=1) for row in rows])
