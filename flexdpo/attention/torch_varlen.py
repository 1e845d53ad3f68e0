"""Causal attention of sequences of different lengths by ``torch.nn.attention.varlen``, on CUDA in half precision."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexdpo.errors import FlexdpoError

# what FlashAttention's kernels are made for
_HEAD_SIZES, _HEAD_MULTIPLE = 256, 8
_HALVES = (torch.bfloat16, torch.float16)
WAY_OUT = "use impl='flex' (attn_impl='flex'), or 'auto'"


class Sequences(NamedTuple):
    """Where sequences stand, one after the other."""

    query_starts: Tensor  # where each sequence's queries begin, and the end of the last, ``[N + 1]`` int32
    # the same of its keys, ``[N + 1]`` int32. Another tensor even where all lengths are equal: torch takes one tensor
    # given twice for self-attention, which it may run by a kernel that aligns at the beginnings.
    key_starts: Tensor
    longest_query: int  # most queries of a sequence
    longest_key: int  # most keys of a sequence


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, *, window: int = 0, scaling: float | None = None
) -> Tensor:
    """Causal attention within sequences, whose last query and last key stand at the same place.

    Shapes: ``Tq`` queries and ``Tk`` keys of ``N`` sequences, one after the other, ``Hq`` and ``Hkv`` heads, head
    size ``D``.

    Args:
        query: ``[Tq, Hq, D]``, contiguous.
        key: ``[Tk, Hkv, D]``, contiguous; ``Hkv`` divides ``Hq``.
        value: ``[Tk, Hkv, D]``, contiguous.
        sequences: Where they stand.
        window: A query sees this many keys, its own included; 0 for all before it.
        scaling: Factor on the scores, ``D ** -0.5`` by default.

    Returns:
        ``[Tq, Hq, D]``, differentiable in query, key and value. Gradients of shared keys are added up in no fixed
        order, as FlashAttention's are.

    Raises:
        FlexdpoError: if device, dtype or head size is none that FlashAttention runs.
    """
    from torch.nn.attention.varlen import varlen_attn

    require_flash(query)
    # torch 2.11 takes fewer key heads without being told
    gqa: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _takes(varlen_attn, "enable_gqa") else {}
    output = varlen_attn(
        query,
        key,
        value,
        *sequences,
        scale=scaling,
        # so many before a query, and none behind it
        window_size=(window - 1, 0) if window else (-1, 0),
        **gqa,
    )
    assert isinstance(output, torch.Tensor)
    return output


@cache
def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def require_flash(query: Tensor) -> None:
    """Raise where FlashAttention does not run: another device, dtype or head size than its own."""
    if query.device.type != "cuda":
        raise FlexdpoError(f"impl='varlen' is FlashAttention on a GPU, and this model is on {query.device}; {WAY_OUT}")
    if query.dtype not in _HALVES:
        raise FlexdpoError(
            f"impl='varlen' needs bfloat16 or float16 (weights or autocast), got {query.dtype}; {WAY_OUT}"
        )
    if query.shape[-1] > _HEAD_SIZES or query.shape[-1] % _HEAD_MULTIPLE:
        raise FlexdpoError(
            f"impl='varlen' needs a head size of at most {_HEAD_SIZES} that is a multiple of {_HEAD_MULTIPLE}, "
            f"got {query.shape[-1]}; {WAY_OUT}"
        )
