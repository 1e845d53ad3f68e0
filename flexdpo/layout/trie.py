"""Sequences to a depth-first token trie, where one integer per token encodes the attention mask.

Laid out depth first, every descendant of a token lies behind it in one contiguous run, so ``subtree_end[i]``, the
index just past the last token that descends from ``i``, says all there is to say about who may look at it::

    query q attends to key kv   <=>   kv <= q < subtree_end[kv]
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flexdpo.errors import FlexdpoError, found
from flexdpo.layout.groups import token_ids_of
from flexdpo.layout.sequences import is_count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Trie:
    """A forest of ``N`` distinct tokens in depth-first order."""

    token_ids: NDArray[np.int64]  # the token at each node, ``[N]`` int64
    # index of the token before it, ``-1`` at a root, ``[N]`` int64; a parent predicts its children
    parents: NDArray[np.int64]
    depths: NDArray[np.int64]  # logical position, 0 at a root, ``[N]`` int64
    subtree_end: NDArray[np.int64]  # index just past the last descendant, ``[N]`` int64
    paths: tuple[NDArray[np.int64], ...]  # for each sequence, in the order given, the node of each of its tokens

    def __len__(self) -> int:
        return int(self.token_ids.size)

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[NDArray[np.int64]], *, limits: Sequence[int] = (), share: bool = True
    ) -> Trie:
        """Merge sequences by their common beginnings; siblings keep the order in which they first appear.

        Equal sequences end at the same node, and a sequence that begins another one ends inside it. Sequences on either
        side of one of the increasing lengths ``limits`` share nothing, since their tokens differ in a model that goes
        by the length; without ``share`` none do. Time and memory are linear in the tokens times the branching depth.
        """
        # arrays may hold images' keys, which are below 0, or nothing
        sequences = [
            each if isinstance(each, np.ndarray) and each.dtype == np.int64 else token_ids_of(each, f"sequence {k}")
            for k, each in enumerate(sequences)
        ]
        counts = isinstance(limits, Sequence) and all(map(is_count, limits))
        if not counts or sorted(limits) != list(limits):
            raise FlexdpoError(f"limits must be increasing numbers of tokens, each at least 1, got {found(limits)}")
        nodes = np.empty((4, sum(sequence.size for sequence in sequences)), dtype=np.int64)
        token_ids, parents, depths, subtree_end = nodes
        paths = tuple(np.empty_like(sequence) for sequence in sequences)
        # only sequences on the same side may share
        sides = [bisect_left(limits, sequence.size) if share else k for k, sequence in enumerate(sequences)]

        def branches(members: Iterable[int], depth: int, parent: int) -> list[tuple[list[int], int, int]]:
            """Sequences that agree on the first ``depth`` tokens, split by their next one, the first to appear last."""
            children: dict[tuple[int, int], list[int]] = {}
            for member in members:
                if sequences[member].size > depth:
                    children.setdefault((sides[member], int(sequences[member][depth])), []).append(member)
            return [(child, depth, parent) for child in reversed(children.values())]

        # runs of unbranched tokens, depth first; a chain of K nested prefixes would recurse K deep without the stack
        runs: list[tuple[int, int, int]] = []
        stack, start = branches(range(len(sequences)), 0, -1), 0
        while stack:
            members, depth, parent = stack.pop()
            first, end = sequences[members[0]], min(sequences[member].size for member in members)
            for member in members[1:]:
                differs = first[depth:end] != sequences[member][depth:end]
                end = depth + int(differs.argmax()) if differs.any() else end
            stop = start + end - depth
            token_ids[start:stop] = first[depth:end]
            depths[start:stop] = np.arange(depth, end)
            parents[start:stop] = np.arange(start - 1, stop - 1)
            parents[start] = parent
            for member in members:
                paths[member][depth:end] = np.arange(start, stop)
            runs.append((start, stop, parent))
            stack += branches(members, end, stop - 1)
            start = stop
        # children come after their parents, and the last one, met first when walking backwards, reaches furthest
        ends: dict[int, int] = {}
        for first_node, stop, parent in reversed(runs):
            subtree_end[first_node:stop] = ends.get(stop - 1, stop)
            ends.setdefault(parent, ends.get(stop - 1, stop))
        return cls(token_ids[:start], parents[:start], depths[:start], subtree_end[:start], paths)
