"""Sequences to a depth-first token trie, where one integer per token encodes the attention mask.

Laid out depth first, every descendant of a token lies behind it in one contiguous run, so ``subtree_end[i]``, the
index just past the last token that descends from ``i``, says all there is to say about who may look at it::

    query q attends to key kv   <=>   kv <= q < subtree_end[kv]
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Trie:
    """A forest of distinct tokens in depth-first order.

    Shapes: ``N`` distinct tokens.
    """

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

        Equal sequences end at the same node, and a sequence that begins another one ends inside it.

        Sequences ``[L_i]`` on either side of one of the increasing lengths ``limits`` share nothing, since their tokens
        differ in a model that goes by the length. Without ``share`` none do, and the forest has a tree for each.

        Returns the trie. Time and memory are linear in the number of tokens times the branching depth.
        """
        return _TrieBuilder(sequences, limits, share=share).build()


class _TrieBuilder:
    """Walks the sequences depth first and writes one run of unbranched tokens at a time."""

    def __init__(self, sequences: Sequence[NDArray[np.int64]], limits: Sequence[int], *, share: bool) -> None:
        self.sequences = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        total = sum(sequence.size for sequence in self.sequences)
        self.token_ids = np.empty(total, dtype=np.int64)
        self.parents = np.empty(total, dtype=np.int64)
        self.depths = np.empty(total, dtype=np.int64)
        self.subtree_end = np.empty(total, dtype=np.int64)
        self.paths = [np.empty(sequence.size, dtype=np.int64) for sequence in self.sequences]
        # only sequences on the same side may share
        self.sides = list(range(len(self.sequences)))
        if share:
            self.sides = [bisect_left(limits, sequence.size) for sequence in self.sequences]
        self.size = 0

    def build(self) -> Trie:
        # an explicit stack: a chain of K nested prefixes would otherwise recurse K deep
        stack: list[tuple[list[int], int, int]] = [
            (members, 0, -1) for members in reversed(self._children(list(range(len(self.sequences))), 0))
        ]
        runs: list[tuple[int, int, int]] = []
        while stack:
            members, depth, parent = stack.pop()
            start, stop, end_depth = self._write_run(members, depth, parent)
            runs.append((start, stop, parent))
            stack.extend((child, end_depth, stop - 1) for child in reversed(self._children(members, end_depth)))
        self._close_runs(runs)
        kept = slice(0, self.size)
        return Trie(
            self.token_ids[kept],
            self.parents[kept],
            self.depths[kept],
            self.subtree_end[kept],
            tuple(self.paths),
        )

    def _children(self, members: list[int], depth: int) -> list[list[int]]:
        """Split sequences that agree on the first ``depth`` tokens by their next one, in order of appearance."""
        children: dict[tuple[int, int], list[int]] = {}
        for member in members:
            sequence = self.sequences[member]
            if sequence.size > depth:
                children.setdefault((self.sides[member], int(sequence[depth])), []).append(member)
        return list(children.values())

    def _write_run(self, members: list[int], depth: int, parent: int) -> tuple[int, int, int]:
        """Write the tokens from ``depth`` up to where the members part or the shortest of them ends."""
        first = self.sequences[members[0]]
        end_depth = min(self.sequences[member].size for member in members)
        for member in members[1:]:
            differs = first[depth:end_depth] != self.sequences[member][depth:end_depth]
            if differs.any():
                end_depth = depth + int(differs.argmax())
        start, stop = self.size, self.size + end_depth - depth
        self.token_ids[start:stop] = first[depth:end_depth]
        self.depths[start:stop] = np.arange(depth, end_depth)
        self.parents[start:stop] = np.arange(start - 1, stop - 1)
        self.parents[start] = parent
        for member in members:
            self.paths[member][depth:end_depth] = np.arange(start, stop)
        self.size = stop
        return start, stop, end_depth

    def _close_runs(self, runs: list[tuple[int, int, int]]) -> None:
        """Set ``subtree_end``: children come after their parents, so one pass backwards sees each child first."""
        end_of_last: dict[int, int] = {}
        for start, stop, parent in reversed(runs):
            end = end_of_last.get(stop - 1, stop)
            self.subtree_end[start:stop] = end
            # the last child, met first when walking backwards, reaches furthest
            end_of_last.setdefault(parent, end)
