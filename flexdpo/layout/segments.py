"""The unbranched runs of packed rows, and what a layer that carries a state needs to know of them.

A *segment* is a run of tokens of which each is the only child of the one before it. A scan along the trie runs each
segment from its parent's final state, one level of the trie after the other. A convolution reads each token's nearest
ancestors. Both follow from the layout's vectors alone. Padding belongs to no segment and has no ancestors.

Shapes: ``B`` rows of ``S`` tokens, numbered through as ``b * S + s``; ``N`` segments, in row order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexdpo.layout.row_layout import RowLayout


@dataclass(frozen=True)
class Segments:
    """All segments of a batch of rows; vectors are ``[N]`` int64 on the host."""

    starts: NDArray[np.int64]  # number of the first token of each
    lengths: NDArray[np.int64]
    parents: NDArray[np.int64]  # the segment that it continues, -1 for those that begin a sequence
    levels: NDArray[np.int64]  # segments before it on its path
    places: int  # ``B * S``

    @classmethod
    def of(cls, layout: RowLayout) -> Segments:
        """Find the segments of a layout; one on a device is looked at through its copy on the host.

        Raises ``FlexdpoError`` if a token's subtree reaches beyond that of its parent.
        """
        if (found := layout.memo.get("segments")) is not None:
            return found  # type: ignore[no-any-return]
        ends = layout.on_host().subtree_end.numpy()
        starts: list[int] = []
        lengths: list[int] = []
        parents: list[int] = []
        levels: list[int] = []
        for row, count in enumerate(layout.num_tokens):
            end = ends[row, :count]
            index = np.arange(1, count)
            # behind a token that has another child, or none, a new segment begins
            begins = np.flatnonzero((end[:-1] <= index) | (end[1:] != end[:-1])) + 1
            first = np.concatenate([[0], begins])[:count]
            open_segments: list[int] = []
            for start, stop in zip(first.tolist(), [*first[1:].tolist(), count], strict=False):
                while open_segments and end[starts[open_segments[-1]] - row * layout.length] <= start:
                    open_segments.pop()
                parent = open_segments[-1] if open_segments else -1
                if parent >= 0 and end[start] > end[starts[parent] - row * layout.length]:
                    raise FlexdpoError(
                        f"the subtree of token {start} of row {row} ends at {end[start]}, beyond that of its parent; "
                        "Row.from_groups makes layouts that are tries"
                    )
                open_segments.append(len(starts))
                starts.append(row * layout.length + start)
                lengths.append(stop - start)
                parents.append(parent)
                levels.append(0 if parent < 0 else levels[parent] + 1)
        first, sizes, above, depths = np.asarray([starts, lengths, parents, levels], dtype=np.int64)
        layout.memo["segments"] = segments = cls(first, sizes, above, depths, layout.batch_size * layout.length)
        return segments

    def __len__(self) -> int:
        return int(self.starts.size)

    @property
    def stops(self) -> NDArray[np.int64]:
        """Number just past the last token of each."""
        return self.starts + self.lengths

    def parent_tokens(self) -> NDArray[np.int64]:
        """The token before each on its path, -1 for those that begin a sequence and for padding, ``[B * S]``."""
        parents = np.full(self.places, -1, dtype=np.int64)
        tokens = self.tokens()
        parents[tokens] = tokens - 1
        parents[self.starts] = np.where(self.parents < 0, -1, self.stops[self.parents] - 1)
        return parents

    def tokens(self) -> NDArray[np.int64]:
        """Numbers of all tokens that are not padding, in row order."""
        return _ranges(self.starts, self.lengths)

    def ancestors(self, count: int) -> NDArray[np.int64]:
        """The nearest ``count`` ancestors of each token, the parent first; -1 where there are no more.

        Returns ``[count, B * S]`` int64.
        """
        parents = self.parent_tokens()
        # a sequence ends before its first token, again and again
        beyond = np.append(parents, -1)
        found = [parents]
        while len(found) < count:
            found.append(beyond[found[-1]])
        return np.stack(found[:count]) if count else np.empty((0, self.places), dtype=np.int64)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``start, start + 1, ...``, ``length`` numbers for each start, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
