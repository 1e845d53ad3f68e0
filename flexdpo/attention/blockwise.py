"""Attention in blocks of a row's queries, in memory linear in its length, for where FlexAttention has no backward.

Each block (:mod:`flexdpo.attention.query_blocks`) runs on its own, and its gradients are added into those of the whole
row in place. Letting autograd do that would allocate and add a whole row of zeros for every block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_mask
from torch.utils.checkpoint import checkpoint

from flexdpo.attention.formula import softmax_attention
from flexdpo.attention.inputs import AttentionInputs
from flexdpo.attention.mask_mods import MaskMod
from flexdpo.attention.query_blocks import MAX_QUERIES, QueryBlock, plan_query_blocks
from flexdpo.attention.remembered import remembered
from flexdpo.attention.row_mask import RowMask
from flexdpo.attention.score_mods import modified_scores

# the masks of one row's blocks are kept for all layers while they hold at most this many scores; above it, a long
# document's masks would grow with the square of its length, so they are built again at every layer
KEPT_SCORES = 1 << 24
# scores of all heads that a block may hold where no fused kernel hides them
FORMULA_SCORES = 1 << 21

_Part = tuple[Tensor, Tensor, Tensor, Tensor]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def blockwise_attention(inputs: AttentionInputs, row_mask: RowMask) -> Tensor:
    """Attend one query block after the other; see :func:`flexdpo.attention.kernels.packed_attention`."""
    query, key, value, scaling, softcap, sinks = inputs
    heads, head_dim = query.shape[1], query.shape[3]
    # torch's own CPU kernel returns what its backward needs, and takes a mask
    fused = query.device.type == "cpu" and softcap is None and head_dim == value.shape[-1]
    fused = fused and row_mask.score_mod is None
    memo, kind, width, max_queries = row_mask.layout.memo, row_mask.kind, heads * head_dim, MAX_QUERIES
    if not fused:
        # every head's scores exist at once: the fewer queries, the more keys one may see
        if "deepest" not in memo:
            memo["deepest"] = int(row_mask.layout.position_ids.max()) + 1
        max_queries = max(16, min(MAX_QUERIES, FORMULA_SCORES // (heads * memo["deepest"])))
    plan_key = ("query blocks", kind.name, kind.size, kind.blocks, width, max_queries)
    if plan_key not in memo:
        planned = plan_query_blocks(row_mask.layout, kind, width=width, max_queries=max_queries)
        memo[plan_key] = planned, sum(block.num_scores for block in planned) <= KEPT_SCORES
    blocks, keeps_masks = memo[plan_key]
    run = _Run(row_mask, plan_key, blocks, keeps_masks, heads, fused, scaling, softcap)
    if row_mask.score_mod is not None:
        return _attend_with_score_mod(query, key, value, sinks, run)
    output: Tensor = _BlockwiseAttention.apply(query, key, value, sinks, run)
    return output


def bias_between(row_mask: RowMask, row: int, q_idx: Tensor, kv_idx: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """0 where a query of a row may attend to a key and ``-inf`` elsewhere.

    ``q_idx`` ``[queries]`` and ``kv_idx`` ``[keys]`` are row indices, int64. Returns ``[queries, keys]``, or
    ``[heads, queries, keys]`` where a mask function tells query heads apart.
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


@dataclass(frozen=True, eq=False)
class _Run:
    """What the blocks of one call have in common."""

    row_mask: RowMask
    plan_key: tuple[Any, ...]  # what the blocks follow from, besides the row
    blocks: list[QueryBlock]
    keeps_masks: bool  # for all layers
    heads: int
    fused: bool
    scaling: float | None
    softcap: float | None

    def indices(self, block: QueryBlock) -> tuple[Tensor, Tensor]:
        """Row indices of a block's queries, and of its keys among all keys."""
        device = self.row_mask.layout.position_ids.device
        keys = [torch.arange(start, stop, device=device) for start, stop in block.key_runs]
        return torch.arange(block.start - block.before, block.stop - block.before, device=device), torch.cat(keys)

    def bias(self, number: int, dtype: torch.dtype) -> Tensor:
        """What :func:`bias_between` the queries and the keys of block ``number`` is."""
        kept = self.row_mask.biases.get((self.plan_key, dtype), {})
        if number in kept:
            return kept[number]
        block = self.blocks[number]
        bias = bias_between(self.row_mask, block.row, *self.indices(block), dtype, self.heads)
        if bias.ndim == 2 and self.keeps_masks:
            self.row_mask.biases.setdefault((self.plan_key, dtype), {})[number] = bias
        return bias

    def part(self, number: int, query: Tensor, key: Tensor, value: Tensor) -> _Part:
        """Query, key, value and bias of block ``number``, the first three ``[Hkv, Hq / Hkv, tokens, D]``."""
        block, groups = self.blocks[number], query.shape[1] // key.shape[1]

        def gathered(x: Tensor) -> Tensor:
            runs = [x[block.row, :, start:stop] for start, stop in block.key_runs]
            return repeat(runs[0] if len(runs) == 1 else torch.cat(runs, dim=1), "h k d -> h g k d", g=groups)

        bias = self.bias(number, query.dtype)
        bias = bias if bias.ndim == 2 else _grouped(bias, key.shape[1])
        return _grouped(query[_place(block)], key.shape[1]), gathered(key), gathered(value), bias


def _place(block: QueryBlock) -> tuple[int, slice, slice]:
    """Where a block's queries stand among those of all rows and heads, ``[B, H, S]``."""
    return block.row, slice(None), slice(block.start - block.before, block.stop - block.before)


def _grouped(heads: Tensor, key_heads: int) -> Tensor:
    return rearrange(heads, "(h g) ... -> h g ...", h=key_heads)


def _flat(grouped: Tensor) -> Tensor:
    return rearrange(grouped, "h g ... -> (h g) ...")


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, run: _Run) -> Tensor:
        batch, heads, length, _ = query.shape
        if remembered.again is not None:
            known, lse = next(remembered.again)
            output, blocks = known.detach(), []
        else:
            # laid out token by token, as the projection that follows wants it
            output = rearrange(query.new_empty(batch, length, heads, value.shape[-1]), "b s h d -> b h s d")
            wide = torch.promote_types(query.dtype, torch.float32)
            lse, blocks = query.new_empty(batch, heads, length, dtype=wide) if run.fused else None, run.blocks
        for number, block in enumerate(blocks):
            part, here = run.part(number, query, key, value), _place(block)
            if lse is None:
                output[here] = _flat(_plain_block(part, run, sinks))
            else:
                attended, norm = _flash(*part[:3], 0.0, False, attn_mask=part[3], scale=run.scaling)
                output[here], lse[here] = _flat(attended), _flat(norm)
        if blocks and lse is not None and sinks is not None:
            # one sink per head shares the softmax and carries no value. With this output and this normaliser the
            # kernel's own backward gives the gradients of a softmax that has the sink
            without, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
            output.mul_((without - lse).exp()[..., None].to(output.dtype))
        if remembered.kept is not None:
            remembered.kept.append((output.detach(), lse))
        ctx.run = run
        ctx.save_for_backward(query, key, value, sinks, output if run.fused else None, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        query, key, value, sinks, output, lse = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        to_sinks = None if sinks is None else torch.zeros_like(sinks)
        if sinks is not None and lse is not None:
            weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()
            delta = (gradient.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1)
            to_sinks = -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)
        for number, block in enumerate(run.blocks):
            part, here = run.part(number, query, key, value), _place(block)
            grad = _grouped(gradient[here], key.shape[1])
            if lse is None:
                found = _plain_gradients(part, run, sinks, grad)
                if to_sinks is not None:
                    to_sinks += found[3]
            else:
                attended, norm = _grouped(output[here], key.shape[1]), _grouped(lse[here], key.shape[1])
                found = _flash_backward(
                    grad, *part[:3], attended, norm, 0.0, False, attn_mask=part[3], scale=run.scaling
                )
            to_query[here] = _flat(found[0])
            _scatter_add_(to_key, found[1], block)
            _scatter_add_(to_value, found[2], block)
        return to_query, to_key, to_value, to_sinks, None


def _scatter_add_(total: Tensor, gradient: Tensor, block: QueryBlock) -> None:
    """Add the gradients of a block's keys, ``[Hkv, groups, keys, D]``, to those of all keys."""
    summed = gradient[:, 0] if gradient.shape[1] == 1 else reduce(gradient, "h g k d -> h k d", "sum")
    offset = 0
    for start, stop in block.key_runs:
        total[block.row, :, start:stop] += summed[:, offset : offset + stop - start]
        offset += stop - start


def _plain_block(
    part: _Part, run: _Run, sinks: Tensor | None, score_mod: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """One block by SDPA or the formula; its scores live as long as the block."""
    query, key, value, bias = part
    if run.softcap is None and sinks is None and score_mod is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=run.scaling)
    inputs = AttentionInputs(_flat(query)[None], _flat(key)[None], _flat(value)[None], run.scaling, run.softcap, sinks)
    attended = softmax_attention(inputs, bias if bias.ndim == 2 else _flat(bias), score_mod=score_mod)
    return _grouped(attended[0], query.shape[0])


def _plain_gradients(part: _Part, run: _Run, sinks: Tensor | None, gradient: Tensor) -> tuple[Tensor, ...]:
    """Run a block again with gradients, so that no block's scores outlive it."""
    leaves = [x.detach().requires_grad_() for x in (*part[:3], sinks) if x is not None]
    query, key, value, *sink = leaves
    with torch.enable_grad():
        attended = _plain_block((query, key, value, part[3]), run, sink[0] if sink else None)
    return torch.autograd.grad(attended, leaves, gradient)


def _attend_with_score_mod(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, run: _Run) -> Tensor:
    """Attend block by block and leave the gradients to autograd: nobody can tell which tensors a score_mod captured."""

    def attend(number: int, *inputs: Tensor) -> Tensor:
        block = run.blocks[number]
        score_mod = block_score_mod(run.row_mask, block.row, *run.indices(block))
        return _flat(_plain_block(run.part(number, *inputs), run, sinks, score_mod))

    rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for number, block in enumerate(run.blocks):
        attended = checkpoint(attend, number, query, key, value, use_reentrant=False, preserve_rng_state=False)
        rows[block.row].append(attended)
    return torch.stack([torch.cat(row, dim=1) for row in rows])
