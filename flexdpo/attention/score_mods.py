"""``score_mod`` factories: what a model does to its attention scores before the softmax.

Each returns a ``score_mod(score, batch, head, q_idx, kv_idx) -> score`` as FlexAttention takes it. ``q_idx`` and
``kv_idx`` are row indices; what depends on distance looks up the logical positions that belong to them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexdpo.layout.row import Row, RowLayout

ScoreMod = Callable[[Tensor, Any, Any, Any, Any], Tensor]


@cache  # the same function for every layer and step, so that nothing compiles again
def softcap_score_mod(softcap: float) -> ScoreMod:
    """Bound every score smoothly: ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv:2408.00118, section 2)."""

    def score_mod(score: Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:  # noqa: ARG001
        return softcap * torch.tanh(score / softcap)

    return score_mod


def alibi_score_mod(slopes: Tensor, positions: Row | RowLayout | Tensor) -> ScoreMod:
    """Subtract ``slope * distance`` from every score, with the distance taken between logical positions.

    Args:
        slopes: One slope per query head, ``[Hq]``, float, on the row's device; may be trained.
        positions: The row, or its logical positions, ``[B, S]`` int64.

    Source:
        Press et al. 2022, arXiv:2108.12409, section 3.
    """

    def alibi(score: Tensor, batch: Any, head: Any, q_position: Any, kv_position: Any) -> Tensor:  # noqa: ARG001
        biased: Tensor = score - slopes[head] * (q_position - kv_position)
        return biased

    return logical_score_mod(positions, alibi)


def logical_score_mod(positions: Row | RowLayout | Tensor, function: ScoreMod) -> ScoreMod:
    """Evaluate a score function that was written for one sequence at the logical positions of a packed row.

    Args:
        positions: The row, or its logical positions, ``[B, S]`` int64.
        function: Takes a score, the row of the batch, the query head and two positions, all 0-d, and returns a score.
    """
    position_ids = positions if isinstance(positions, Tensor) else positions.position_ids

    def score_mod(score: Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        return function(score, batch, head, position_ids[batch, q_idx], position_ids[batch, kv_idx])

    return score_mod


def composed_score_mod(first: ScoreMod, second: ScoreMod) -> ScoreMod:
    """Apply one ``score_mod`` after another."""

    def score_mod(score: Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        return second(first(score, batch, head, q_idx, kv_idx), batch, head, q_idx, kv_idx)

    return score_mod


def modified_scores(score_mod: ScoreMod, scores: Tensor, batch: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Evaluate a ``score_mod`` as FlexAttention does, one score at a time, under vmap.

    Shapes: ``B`` rows, ``H`` query heads, ``Q`` queries, ``K`` keys.

    Args:
        score_mod: Of any make.
        scores: ``[B, H, Q, K]``.
        batch: Which row of the batch each one is, ``[B]`` int64.
        q_idx: Row indices of the queries, ``[Q]`` int64.
        kv_idx: Row indices of the keys, ``[K]`` int64.

    Returns:
        ``[B, H, Q, K]``, differentiable in the scores and in what the ``score_mod`` captured.
    """
    every = score_mod
    for in_dims in ((0, None, None, None, 0), (0, None, None, 0, None), (0, None, 0, None, None)):
        every = torch.vmap(every, in_dims)
    head = torch.arange(scores.shape[1], device=scores.device)
    return torch.vmap(every, (0, 0, None, None, None))(scores, batch, head, q_idx, kv_idx)
