"""Numbers as a caller gives them, and ids to stand for tokens of which only the number is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.errors import FlexdpoError, found

if TYPE_CHECKING:
    from numpy.typing import NDArray


def is_count(value: Any) -> bool:
    """Whether something is a whole number above 0."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) > 0


def is_finite(value: Any) -> bool:
    """Whether something is a finite number."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def require_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise FlexdpoError(f"{name} must be a whole number, at least {least}, got {found(value)}")
    if value < least:
        raise FlexdpoError(f"{name} must be at least {least}, got {value}")


def numbered_sequences(lengths: Sequence[Any]) -> list[NDArray[np.int64]]:
    """Every path from root to leaf of a forest (:meth:`flexdpo.Row.from_lengths`), its tokens numbered depth first."""
    if not isinstance(lengths, Sequence | np.ndarray):
        raise FlexdpoError(f"lengths must be a list, one for each document, got {found(lengths)}")
    sequences: list[NDArray[np.int64]] = []
    pending, known = [(node, np.empty(0, dtype=np.int64)) for node in reversed(lengths)], 0
    while pending:
        node, before = pending.pop()
        tokens, branches = node if isinstance(node, tuple | list) and len(node) == 2 else (node, ())
        if not is_count(tokens):
            raise FlexdpoError(
                f"a length must be a whole number above 0, or (tokens, [branches]) of such numbers, got {found(node)}"
            )
        if not isinstance(branches, tuple | list):
            raise FlexdpoError(f"the branches behind {tokens} tokens must be a list of lengths, got {found(branches)}")
        path = np.concatenate((before, np.arange(known, known + int(tokens))))
        known += int(tokens)
        pending += [(branch, path) for branch in reversed(branches)]
        sequences += [] if branches else [path]
    return sequences
