"""What a layer asks of its attention: queries, keys and values, and what is done to their scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionInputs(NamedTuple):
    """One call of attention, without its mask.

    Shapes: ``B`` rows, ``Hq`` query and ``Hkv`` key heads (a divisor), ``S`` tokens, ``D`` and ``Dv`` head sizes.
    """

    query: Tensor  # ``[B, Hq, S, D]``
    key: Tensor  # ``[B, Hkv, S, D]``
    value: Tensor  # ``[B, Hkv, S, Dv]``
    scaling: float | None = None  # factor on the scores, ``D ** -0.5`` by default
    softcap: float | None = None  # scores become ``softcap * tanh(score / softcap)`` (Gemma 2)
    # one extra logit per query head that takes part in the softmax and carries no value, ``[Hq]`` (GPT-OSS)
    sinks: Tensor | None = None


class Shape(NamedTuple):
    """What a kernel is compiled for, besides its mask."""

    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype


class AttentionCall(NamedTuple):
    """What stays the same of a layer's calls, from row to row."""

    shape: Shape
    scaling: float | None = None
    softcap: float | None = None
    sinks: bool = False  # whether every head has one

    @classmethod
    def of(cls, inputs: AttentionInputs) -> AttentionCall:
        """The call that these inputs make."""
        query, key, value, scaling, softcap, sinks = inputs
        shape = Shape(query.shape[1], key.shape[1], query.shape[3], value.shape[3], query.dtype)
        return cls(shape, scaling, softcap, sinks is not None)


def wants_gradients(inputs: AttentionInputs) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:3])
