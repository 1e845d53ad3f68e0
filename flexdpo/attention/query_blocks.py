"""Cuts packed rows into runs of queries and finds the keys that each of them can see, for kernels without tiles.

A dense kernel pays for every query times every key it is given. So a row is cut where that product is small: behind a
prompt, between siblings, and within long runs, whose early queries see few keys. Keys that nothing in a block can see
are left out: other documents, and the dead siblings that stand between a prompt and a late response.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexdpo.attention.mask_mods import MaskKind
from flexdpo.layout.row import RowLayout

Ints = NDArray[np.int64]

# longest block: its scores of one head stay in a core's cache
MAX_QUERIES = 512
# most scores of a block, so that memory grows with a row's length and not with its square
MAX_SCORES = 1 << 22
# reading keys and adding up their gradients costs about as much as this many queries more
REREAD_QUERIES = 32
# what starting one block costs, in multiplications of scores; divided by heads times head size it is in scores
START_COST = 1 << 21
# places where a row may be cut: every so many tokens of an unbranched run, and not closer than this
_GRID, _CLOSEST = 64, 16


class QueryBlock(NamedTuple):
    """Queries ``[start, stop)`` of one row and the runs of keys some of them see.

    The last run ends at ``stop``, or where the images end that the queries stand in, if these see themselves both ways.
    Keys of the path to a piece stand before the row's own, and all are counted through.
    """

    row: int
    start: int  # the first query, among all keys
    stop: int  # just past the last query
    key_runs: tuple[tuple[int, int], ...]
    before: int = 0  # keys before the row's own

    @property
    def num_keys(self) -> int:
        """Keys in all runs."""
        return sum(stop - start for start, stop in self.key_runs)

    @property
    def num_scores(self) -> int:
        """Queries times keys."""
        return (self.stop - self.start) * self.num_keys


def plan_query_blocks(
    layout: RowLayout, kind: MaskKind, *, width: int = 512, max_queries: int = MAX_QUERIES
) -> list[QueryBlock]:
    """Cut a batch of rows into blocks, so that queries times keys and the number of blocks are small together.

    ``width`` is query heads times head size: the wider, the less does starting a block matter. The layout is copied to
    the host. Returns blocks that cover every query once, in order, in time linear in the tokens of the batch for
    documents of bounded length.
    """
    seen = layout.keys or layout
    ends, positions = seen.subtree_end.cpu().numpy(), seen.position_ids.cpu().numpy()
    before = seen.position_ids.shape[1] - layout.position_ids.shape[1]
    ahead = layout.block_end().cpu().numpy() if kind.blocks else None
    blocks = []
    for row in range(len(ends)):
        cuts = _cuts(ends[row], seen.num_tokens[row], max_queries, before)
        ended = np.cumsum(np.bincount(ends[row], minlength=ends[row].size + 1))
        # how many earlier tokens the token behind each cut sees: those begun and not yet ended
        live = np.asarray(cuts) - ended[cuts]
        live = np.minimum(live, kind.size) if kind.size else live
        # for each token, the first of its document: nothing before that reaches beyond
        index = np.arange(ends[row].size)
        reach = np.concatenate(([0], np.maximum.accumulate(ends[row])[:-1]))
        document = np.maximum.accumulate(np.where(reach <= index, index, 0))
        for start, stop in pairwise(_cheapest(cuts, live.tolist(), START_COST // width, max_queries)):
            behind = slice(document[start], start)
            # what some query sees, as far as branches and distance tell
            visible = ends[row, behind] > start
            if kind.size:
                near = int(positions[row, start:stop].min())
                oldest = near // kind.size * kind.size if kind.name == "chunked" else near - kind.size + 1
                visible &= positions[row, behind] >= oldest
            last = stop if ahead is None else int(ahead[row, start:stop].max())
            keys = np.concatenate((np.flatnonzero(visible) + document[start], np.arange(start, last)))
            runs = np.split(keys, np.flatnonzero(np.diff(keys) > 1) + 1)
            blocks.append(QueryBlock(row, start, stop, tuple((int(run[0]), int(run[-1]) + 1) for run in runs), before))
    return blocks


def _cuts(ends: Ints, num_tokens: int, max_queries: int, before: int) -> list[int]:
    """Where a row behind ``before`` keys may be cut, both ends included: at branches, and on a grid between."""
    closest = max(1, min(_CLOSEST, max_queries // 2))
    grid = min(_GRID, max_queries - closest + 1)
    branches = np.flatnonzero(np.diff(ends[before:num_tokens])) + before + 1
    cuts, length = [before], ends.size
    for place in (*branches.tolist(), num_tokens, length):
        cuts.extend(range(cuts[-1] + grid, place - closest + 1, grid))
        if place - cuts[-1] >= closest:
            cuts.append(place)
    if cuts[-1] < length and len(cuts) > 1 and length - cuts[-2] <= max_queries:
        cuts.pop()
    return cuts if cuts[-1] == length else [*cuts, length]


def _cheapest(cuts: list[int], earlier: list[int], start_cost: int, max_queries: int) -> list[int]:
    """The subset of ``cuts`` with the least cost in all, by dynamic programming over the last block."""
    best, came_from = [0], [0]
    for stop in range(1, len(cuts)):
        found = []
        # from the cut before, always, and from those that a block may reach up from
        for start in range(stop - 1, -1, -1):
            queries = cuts[stop] - cuts[start]
            scores = queries * (queries + earlier[start])
            if start < stop - 1 and (queries > max_queries or scores > MAX_SCORES):
                break
            cost = (queries + REREAD_QUERIES) * (queries + earlier[start])
            found.append((best[start] + cost + start_cost, start))
        cost, begin = min(found)
        best.append(cost)
        came_from.append(begin)
    chosen = [len(cuts) - 1]
    while chosen[-1] > 0:
        chosen.append(came_from[chosen[-1]])
    return [cuts[index] for index in reversed(chosen)]
