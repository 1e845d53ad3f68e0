"""Attention by the formula, for what no fused kernel does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor

from flexdpo.attention.inputs import AttentionInputs


def softmax_attention(
    inputs: AttentionInputs, bias: Tensor, *, score_mod: Callable[[Tensor], Tensor] | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend by the formula, for what SDPA cannot do; the scores are held in memory.

    ``bias`` is added to the scores and broadcasts to ``[B, Hq, Q, K]``; queries and keys may differ in number.
    ``score_mod`` is what happens to the scores after the softcap, in float32 or better, ``[B, Hq, Q, K]`` to the same.
    Sinks are ``[Hq]``, or ``[B, Hq, Q, 1]`` where every query has its own. A weight is dropped with the chance
    ``dropout``, in models that run without a packed row.

    Returns ``[B, Hq, Q, Dv]`` in the dtype of ``value``; the softmax runs in float32 or better. A query that no key is
    open to gets zeros, as in SDPA and FlexAttention.
    """
    query, key, value, scaling, softcap, sinks = inputs
    key, value = (repeat(x, "b h k d -> b (h g) k d", g=query.shape[1] // key.shape[1]) for x in (key, value))
    scores = query @ rearrange(key, "b h k d -> b h d k") * (query.shape[-1] ** -0.5 if scaling is None else scaling)
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
        column = sinks.to(scores.dtype)
        if sinks.ndim == 1:
            column = repeat(column, "h -> b h q 1", b=query.shape[0], q=query.shape[2])
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights.to(value.dtype) @ value).masked_fill(blind, 0)
