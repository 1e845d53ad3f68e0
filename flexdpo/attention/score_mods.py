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

from flexdpo.errors import FlexdpoError, found
from flexdpo.layout.row import Row, RowLayout
from flexdpo.layout.sequences import is_finite

ScoreMod = Callable[[Tensor, Any, Any, Any, Any], Tensor]


def softcap_score_mod(softcap: float) -> ScoreMod:
    """Bound every score smoothly: ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv:2408.00118, section 2)."""
    require_softcap(softcap)
    return _softcap_score_mod(softcap)


def require_softcap(softcap: Any) -> None:
    """Refuse what bounds no scores: they would become NaN, or all 0."""
    if not is_finite(softcap) or softcap <= 0:
        raise FlexdpoError(
            f"softcap must be above 0 and finite, got {found(softcap)}; leave it out for scores without a bound"
        )


@cache  # the same function for every layer and step, so that nothing compiles again
def _softcap_score_mod(softcap: float) -> ScoreMod:
    def score_mod(score: Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:  # noqa: ARG001
        return softcap * torch.tanh(score / softcap)

    return score_mod


def alibi_score_mod(slopes: Tensor, positions: Row | RowLayout | Tensor) -> ScoreMod:
    """Subtract ``slope * distance`` from every score, with the distance taken between logical positions.

    ``slopes`` has one per query head, ``[Hq]``, float, on the row's device, and may be trained. ``positions`` is the
    row, or its logical positions, ``[B, S]`` int64. Source: Press et al. 2022, arXiv:2108.12409, section 3.
    """
    if not isinstance(slopes, Tensor) or slopes.ndim != 1 or not slopes.is_floating_point():
        raise FlexdpoError(f"slopes must be a float tensor [Hq], one for each query head, got {found(slopes)}")
    score_mod = logical_score_mod(positions, lambda score, _, head, q, kv: score - slopes[head] * (q - kv))
    # what attend compares with its query: a slope too many would belong to no head, and pass unseen
    score_mod.query_heads = slopes.shape[0]  # type: ignore[attr-defined]
    return score_mod


def logical_score_mod(positions: Row | RowLayout | Tensor, function: ScoreMod) -> ScoreMod:
    """Evaluate a score function that was written for one sequence at the logical positions of a packed row.

    ``positions`` is the row, or its logical positions, ``[B, S]`` int64. ``function`` takes a score, the row of the
    batch, the query head and two positions, all 0-d, and returns a score.
    """
    if not isinstance(positions, Row | RowLayout | Tensor):
        raise FlexdpoError(f"positions must be a flexdpo.Row, or a tensor of its position_ids, got {found(positions)}")
    position_ids = positions if isinstance(positions, Tensor) else positions.position_ids
    if position_ids.ndim != 2 or position_ids.dtype != torch.int64:
        raise FlexdpoError(
            f"positions must be [B, S] int64, as row.position_ids are, got {list(position_ids.shape)} "
            f"{position_ids.dtype}"
        )

    def score_mod(score: Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        return function(score, batch, head, position_ids[batch, q_idx], position_ids[batch, kv_idx])

    # what attend compares with its row: another's positions would give other scores, or none. A tensor may be meant so
    score_mod.shape = position_ids.shape  # type: ignore[attr-defined]
    score_mod.of_row = None if isinstance(positions, Tensor) else position_ids  # type: ignore[attr-defined]
    return score_mod


def composed_score_mod(first: ScoreMod, second: ScoreMod) -> ScoreMod:
    """Apply one ``score_mod`` after another."""

    def score_mod(score: Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        return second(first(score, batch, head, q_idx, kv_idx), batch, head, q_idx, kv_idx)

    return score_mod


def modified_scores(score_mod: ScoreMod, scores: Tensor, batch: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Evaluate a ``score_mod`` as FlexAttention does, one score at a time, under vmap.

    ``scores`` are ``[B, H, Q, K]``: rows, query heads, queries and keys, whose row indices are ``batch`` ``[B]``,
    ``q_idx`` ``[Q]`` and ``kv_idx`` ``[K]``, int64. Returns ``[B, H, Q, K]``, differentiable in the scores and in what
    the ``score_mod`` captured.
    """
    every = score_mod
    for in_dims in ((0, None, None, None, 0), (0, None, None, 0, None), (0, None, 0, None, None)):
        every = torch.vmap(every, in_dims)
    head = torch.arange(scores.shape[1], device=scores.device)
    return torch.vmap(every, (0, 0, None, None, None))(scores, batch, head, q_idx, kv_idx)
