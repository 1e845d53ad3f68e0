"""``score_mod`` factories: what a model does to its attention scores before the softmax.

Each returns a ``score_mod(score, batch, head, q_idx, kv_idx) -> score`` as FlexAttention takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Any, Any, Any, Any], Tensor]


@cache  # the same function for every layer and step, so that nothing compiles again
def softcap_score_mod(softcap: float) -> ScoreMod:
    """Bound every score smoothly: ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv:2408.00118, section 2)."""

    def score_mod(score: Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:  # noqa: ARG001
        return softcap * torch.tanh(score / softcap)

    return score_mod


def alibi_score_mod(slopes: Tensor, position_ids: Tensor) -> ScoreMod:
    """Subtract ``slope * distance`` from every score, with the distance taken between logical positions.

    Args:
        slopes: One slope per query head, ``[Hq]``, float.
        position_ids: Logical positions, ``[B, S]`` int64.

    Source:
        Press et al. 2022, arXiv:2108.12409, section 3.
    """

    def score_mod(score: Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        distance = position_ids[batch, q_idx] - position_ids[batch, kv_idx]
        return score - slopes[head] * distance

    return score_mod
