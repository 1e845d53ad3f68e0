"""Token ids as a caller has them, and ids to stand for tokens of which only the number is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.errors import FlexdpoError, found

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def token_ids_of(sequence: Any, name: str) -> NDArray[np.int64]:
    """One sequence's ids, ``[L]`` int64; ``FlexdpoError`` if it is empty, or anything in it is no token id."""
    ids = np.asarray(sequence)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu" or int(ids.min()) < 0:
        raise FlexdpoError(
            f"{name} must be one list of token ids, at least one and none below 0, got {found(sequence)}"
        )
    return ids.astype(np.int64)


def numbered_sequences(lengths: Sequence[Any]) -> list[NDArray[np.int64]]:
    """Every path from root to leaf of a forest (:meth:`flexdpo.Row.from_lengths`), its tokens numbered depth first."""
    sequences: list[NDArray[np.int64]] = []
    pending, known = [(node, np.empty(0, dtype=np.int64)) for node in reversed(lengths)], 0
    while pending:
        node, before = pending.pop()
        tokens, branches = node if isinstance(node, tuple | list) and len(node) == 2 else (node, ())
        if isinstance(tokens, bool) or not isinstance(tokens, int | np.integer) or tokens < 1:
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
