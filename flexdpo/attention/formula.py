"""Attention by the formula, for what no fused kernel does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    score_mod: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
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
        score_mod: What happens to the scores after the softcap, in float32 or better, ``[B, Hq, Q, K]`` to the same.
        dropout: Chance that a weight is dropped, for models that run without a packed row.

    Returns:
        ``[B, Hq, Q, Dv]`` in the dtype of ``value``; the softmax runs in float32 or better. A query that no key is
        open to gets zeros, as in SDPA and FlexAttention.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    blind = bias.isneginf()
    if score_mod is not None:
        # what it makes of pairs that the mask hides may be anything, NaN too
        scores = score_mod(scores.to(wide)).masked_fill(blind, float("-inf"))
        blind = scores.isneginf()
    blind = blind.all(dim=-1, keepdim=True)
    if sinks is None:
        # the softmax of no score at all is NaN, so such a query looks at everything and its output is left out
        bias = bias.masked_fill(blind, 0)
        scores = scores if score_mod is None else scores.masked_fill(blind, 0)
    scores = (scores + bias).to(wide)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights.to(value.dtype) @ value).masked_fill(blind, 0)
