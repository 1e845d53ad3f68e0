"""What a scan along the trie runs, and in which order: as little as can be, padding included.

A scan computes whole chunks of tokens. Where a segment ends inside a chunk, either the rest of the chunk is padding, or
the tokens behind its last whole chunk run at the beginning of each segment that continues it. What is cheaper is
counted for every row, and so are the batches that similar lengths run in.

Shapes: ``B`` rows of ``S`` tokens, numbered through as ``b * S + s``; ``R`` runs of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from flexdpo.layout.segments import Segments


class ScanCost(NamedTuple):
    """What a kernel costs, all in the same unit."""

    chunk: int = 1  # tokens that are computed at once; every run is padded to whole chunks
    place: float = 1.0  # for each token of a padded batch
    step: float = 0.0  # for each chunk of a batch, however many runs it holds
    call: float = 1000.0  # for each batch


class Bucket(NamedTuple):
    """Runs of tokens that are scanned as one padded batch of ``M`` rows of ``L`` places."""

    members: NDArray[np.int64]  # which runs these are, ``[M]``
    tokens: NDArray[np.int64]  # number of the token at each place, -1 at padding, ``[M, L]``
    needs_final_state: bool  # whether a later level begins where one of them ends


class ScanPlan(NamedTuple):
    """Batches of runs, level by level; a run begins with the final state of another, which ran a level before it."""

    levels: list[list[Bucket]]
    parents: NDArray[np.int64]  # the run that each continues, -1 for those that begin a sequence, ``[R]``
    cost: float  # of all batches
    chunk: int  # for which it was made

    @property
    def tokens(self) -> int:
        """Tokens that are scanned, those that run more than once counted as often."""
        return sum(int((bucket.tokens >= 0).sum()) for level in self.levels for bucket in level)


class _Runs(NamedTuple):
    """Runs, each behind the one that it continues: the tokens that end a path somewhere in a segment."""

    segments: list[int]
    ends: list[int]  # tokens of that segment up to the end
    sizes: list[int]
    parents: list[int]

    def add(self, segment: int, end: int, size: int, parent: int) -> int:
        """Add one, and return its number."""
        for values, value in zip(self, (segment, end, size, parent), strict=True):
            values.append(value)
        return len(self.sizes) - 1


def scan_plan(segments: Segments, costs: Sequence[ScanCost]) -> ScanPlan:
    """The cheapest plan for a kernel that takes a state to begin with, of what it costs with chunks of each length."""
    lengths = segments.lengths.tolist()
    children: list[list[int]] = [[] for _ in lengths]
    for segment, parent in enumerate(segments.parents.tolist()):
        if parent >= 0:
            children[parent].append(segment)
    offers = []
    for cost in costs:
        for tie in (0, 1):
            runs = _runs(lengths, children, cost.chunk, _cuts(lengths, children, cost.chunk, tie))
            offers.append((runs, cost, _levels(runs, cost)))
    return _plan(segments, *min(offers, key=lambda offer: sum(spent for _, spent in offer[2])))


def path_plan(segments: Segments, cost: ScanCost) -> ScanPlan:
    """The plan for what takes no state: the whole path to each leaf.

    A token that several paths hold counts in the first of them; the others hold it as what came before.
    """
    upto = segments.lengths.tolist()
    for segment, parent in enumerate(segments.parents.tolist()):
        upto[segment] += upto[parent] if parent >= 0 else 0
    runs = _Runs([], [], [], [])
    for leaf in np.setdiff1d(np.arange(len(segments)), segments.parents).tolist():
        runs.add(leaf, int(segments.lengths[leaf]), upto[leaf], -1)
    return _plan(segments, runs, cost, _levels(runs, cost))


def _cuts(lengths: list[int], children: list[list[int]], chunk: int, tie: int) -> list[dict[int, bool]]:
    """Whether each segment runs whole chunks only and leaves the rest to its children, by the tokens left to itself.

    The fewest chunks in all; where that is the same, no token runs twice (``tie`` 0), or no chunk is padded.
    """
    tails: list[set[int]] = [{0} for _ in lengths]
    for segment, below in enumerate(children):
        for child in below:
            tails[child].update((tail + lengths[segment]) % chunk for tail in tails[segment])
    fewest: list[dict[int, int]] = [{} for _ in lengths]
    cuts: list[dict[int, bool]] = [{} for _ in lengths]
    for segment in reversed(range(len(lengths))):
        afresh = sum(fewest[child][0] for child in children[segment])
        for tail in tails[segment]:
            chunks, rest = divmod(tail + lengths[segment], chunk)
            whole = chunks + (rest > 0) + afresh
            left = chunks + sum(fewest[child][rest] for child in children[segment])
            cuts[segment][tail] = bool(children[segment]) and rest > 0 and left < whole + tie
            fewest[segment][tail] = left if cuts[segment][tail] else whole
    return cuts


def _runs(lengths: list[int], children: list[list[int]], chunk: int, cuts: list[dict[int, bool]]) -> _Runs:
    runs = _Runs([], [], [], [])
    tails, begins = [0] * len(lengths), [-1] * len(lengths)
    for segment, below in enumerate(children):
        tail, last = tails[segment], begins[segment]
        size = tail + lengths[segment]
        rest = size % chunk if cuts[segment][tail] else 0
        # what was left to the segment is less than a chunk, so that a run ends in the segment itself
        if size > rest:
            last = runs.add(segment, lengths[segment] - rest, size - rest, last)
        for child in below:
            tails[child], begins[child] = rest, last
    return runs


def _levels(runs: _Runs, cost: ScanCost) -> list[tuple[list[NDArray[np.int64]], float]]:
    """The batches of each level, and what they cost."""
    levels: list[int] = []
    for parent in runs.parents:
        levels.append(0 if parent < 0 else levels[parent] + 1)
    of_level, sizes = np.asarray(levels), np.asarray(runs.sizes)
    everywhere = range(max(levels, default=-1) + 1)
    return [_batches(here, sizes[here], cost) for here in (np.flatnonzero(of_level == level) for level in everywhere)]


def _batches(
    members: NDArray[np.int64], lengths: NDArray[np.int64], cost: ScanCost
) -> tuple[list[NDArray[np.int64]], float]:
    """Split ``members`` into the batches that cost the least, and say what they cost."""
    order = np.argsort(lengths, kind="stable")
    members, chunks = members[order], -(-lengths[order] // cost.chunk)
    # batches end where the number of chunks changes
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(chunks)) + 1, [len(members)]])
    best, begins = np.zeros(len(cuts)), np.zeros(len(cuts), dtype=np.int64)
    for end in range(1, len(cuts)):
        longest = chunks[cuts[end] - 1]
        of_runs = (cuts[end] - cuts[:end]) * (longest * cost.chunk * cost.place)
        offers = best[:end] + of_runs + (longest * cost.step + cost.call)
        begins[end] = offers.argmin()
        best[end] = offers.min()
    found, end = [], len(cuts) - 1
    while end > 0:
        found.append(members[cuts[begins[end]] : cuts[end]])
        end = int(begins[end])
    return found[::-1], float(best[-1])


def _plan(
    segments: Segments, runs: _Runs, cost: ScanCost, levels: list[tuple[list[NDArray[np.int64]], float]]
) -> ScanPlan:
    parents = np.asarray(runs.parents, dtype=np.int64)
    buckets = [[_bucket(members, segments, runs, parents) for members in batches] for batches, _ in levels]
    return ScanPlan(buckets, parents, sum(spent for _, spent in levels), cost.chunk)


def _bucket(members: NDArray[np.int64], segments: Segments, runs: _Runs, parents: NDArray[np.int64]) -> Bucket:
    """Put runs of tokens below each other, padded on the right to the longest."""
    tokens = np.full((len(members), max(runs.sizes[member] for member in members)), -1, dtype=np.int64)
    for line, member in zip(tokens, members.tolist(), strict=True):
        segment, stop, end = runs.segments[member], runs.sizes[member], runs.ends[member]
        while stop:
            start = max(stop - end, 0)
            last = segments.starts[segment] + end
            line[start:stop] = np.arange(last - (stop - start), last)
            stop, segment = start, int(segments.parents[segment])
            end = int(segments.lengths[segment])
    return Bucket(members, tokens, bool(np.isin(members, parents).any()))
