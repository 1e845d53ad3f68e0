"""Copies of entries from one order into another, whose gradients are copied back instead of added up.

Shapes: ``T`` tokens; ``P`` places, each of which holds a token or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Take:
    """What to read for each entry."""

    sources: Tensor  # which entry to read, 0 where there is none
    empty: Tensor  # entries that are 0
    more: tuple[Tensor, Tensor]  # entries to be added to, and which are added


@dataclass(frozen=True, eq=False)
class Moves:
    """Which entry is copied to which, and by which its gradient comes back."""

    there: _Take
    back: _Take

    @classmethod
    def both_ways(
        cls, tokens: NDArray[np.int64], count: int, on: Callable[[NDArray[np.int64]], Tensor]
    ) -> tuple[Moves, Moves]:
        """From ``T`` tokens to ``P`` places, and from the first place of each token to the tokens.

        Args:
            tokens: Number of the token at each place, -1 for nothing, ``[P]``.
            count: ``T``.
            on: Brings an index to where the entries are.
        """

        def take(sources: NDArray[np.int64], to: Any = (), by: Any = ()) -> _Take:
            more = (on(np.asarray(to, dtype=np.int64)), on(np.asarray(by, dtype=np.int64)))
            return _Take(on(np.maximum(sources, 0)), on(np.flatnonzero(sources < 0)), more)

        real = np.flatnonzero(tokens >= 0)
        first = np.full(count, -1, dtype=np.int64)
        # backwards, so that the first of several places stays
        first[tokens[real[::-1]]] = real[::-1]
        is_first = np.zeros(tokens.size, dtype=bool)
        is_first[first[first >= 0]] = True
        again = real[~is_first[real]]
        to_places = take(tokens)
        return (
            cls(to_places, take(first, tokens[again], again)),
            cls(take(first), take(np.where(is_first, tokens, -1))),
        )


def moved(values: Tensor, moves: Moves) -> Tensor:
    """Copy entries ``[T, ...]`` to their places ``[P, ...]``, 0 where there is nothing.

    The gradients of copies are added up in float32 at least.
    """
    out: Tensor = _Moved.apply(values, moves)
    return out


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, moves: Moves) -> Tensor:
        ctx.moves = moves
        return _taken(values, moves.there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _taken(gradient, ctx.moves.back), None


def _taken(values: Tensor, take: _Take) -> Tensor:
    out = values.index_select(0, take.sources)
    if take.empty.numel():
        out.index_fill_(0, take.empty, 0)
    entries, added = take.more
    if not entries.numel():
        return out
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    wide.index_add_(0, entries, values.index_select(0, added).to(wide.dtype))
    return wide.to(out.dtype)
