"""Which groups share a row, and how long rows are: the fewest rows that a token budget allows, and nothing dropped."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.layout.groups import Group, require_groups
from flexdpo.layout.images import ImageKeys
from flexdpo.layout.pieces import cut_in_pieces
from flexdpo.layout.row import TILE, Row
from flexdpo.layout.sequences import require_count
from flexdpo.layout.trie import Trie

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


SHARING = ("group", "step")
# groups that begin alike share a trie only if they do so for a whole tile of attention: merging on less (a BOS token)
# would tie the whole row together and cost more tiles than it saves tokens
MIN_SHARED = TILE
# padding as a share of all tokens run, above which one kernel for all lengths is the better bargain
MAX_WASTE = 0.03


def pack(
    groups: Sequence[Group],
    max_tokens_per_row: int | None = None,
    *,
    pad_to_multiple_of: int = 1,
    buckets: Buckets | None = None,
    sharing: str = "group",
    limits: Sequence[int] = (),
    in_pieces: bool = True,
) -> list[Row]:
    """Lay groups out in as few rows as the budget allows, each in exactly one row.

    Args:
        groups: Those of one optimizer step (or of one forward pass).
        max_tokens_per_row: Longest row, padding included, in tokens; ``None`` puts all groups in one row.
        pad_to_multiple_of: Every row is padded to a multiple of this many tokens.
        buckets: Every row is padded to one of these lengths instead, as far as the budget leaves room for it.
        sharing: ``"group"`` shares tokens among the responses of a group; ``"step"`` also among groups whose prompts
            have at least their first 128 tokens in common (a long system prompt, few-shot examples).
        limits: Increasing lengths at which the model's rotary frequencies change, as
            :func:`flexdpo.hf.row_dependence.length_limits` finds them; sequences on either side share no tokens.
        in_pieces: Give a group that is longer than the budget a row of its own with ``row.pieces``, which
            :func:`flexdpo.response_logps` runs one after another, instead of an error.

    Returns:
        The rows; inside a row the groups keep the order in which they came, relatives side by side, and
        ``row.numbers`` tells which of ``groups`` each of them is.

    Raises:
        FlexdpoError: if a single group, or with ``in_pieces`` a single sequence, is longer than the budget, or
            ``sharing`` is unknown.
    """
    multiple = pad_to_multiple_of if buckets is None else buckets.multiple
    most = sys.maxsize if max_tokens_per_row is None else max_tokens_per_row
    rows = []
    for clusters in _planned(groups, most, multiple, sharing, limits, in_pieces):
        tokens = sum(len(cluster.trie) for cluster in clusters)
        whole = tokens <= most // multiple * multiple
        target = multiple if buckets is None or not whole else buckets.length_for(tokens, most=most)
        numbers = tuple(i for cluster in clusters for i in cluster.members)
        row = Row.from_tries([groups[i] for i in numbers], [each.trie for each in clusters], pad_to_multiple_of=target)
        row.numbers = numbers
        if not whole:
            row.pieces = cut_in_pieces(row, most, multiple, name=row.groups[0].name)
        rows.append(row)
    return rows


def row_lengths(
    batches: Iterable[Sequence[Group]],
    max_tokens_per_row: int | None = None,
    *,
    sharing: str = "group",
    limits: Sequence[int] = (),
) -> list[int]:
    """Lengths of the rows that :func:`pack` makes of some batches, padding not counted; the rows are not made.

    One that would run in pieces counts whole. A few hundred batches are enough for :func:`choose_buckets`.
    """
    most = sys.maxsize if max_tokens_per_row is None else max_tokens_per_row
    rows = [row for groups in batches for row in _planned(groups, most, 1, sharing, limits, True)]
    return [sum(len(cluster.trie) for cluster in clusters) for clusters in rows]


class _Cluster(NamedTuple):
    """Groups, by index, that share one trie."""

    members: list[int]
    trie: Trie


def _planned(
    groups: Sequence[Group], most: int, multiple: int, sharing: str, limits: Sequence[int], in_pieces: bool
) -> list[list[_Cluster]]:
    """The clusters of each row; one that fits none has a row of its own."""
    if sharing not in SHARING:
        raise FlexdpoError(f"sharing must be one of {SHARING}, got {sharing!r}{nearest(str(sharing), SHARING)}")
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Group) for group in groups):
        require_groups(groups)
    for name, value in (("max_tokens_per_row", most), ("pad_to_multiple_of", multiple)):
        if type(value) is not int or value < 1:
            require_count(name, value)
    keys = ImageKeys()

    def cluster_of(members: list[int]) -> _Cluster:
        sequences = [ids for i in members for ids in keys.sequences(groups[i])]
        return _Cluster(members, Trie.from_sequences(sequences, limits=limits))

    relatives: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        may_share = sharing == "step" and group.prompt_ids.size >= MIN_SHARED
        prompt = keys.of_prompt(group) if may_share and group.images else group.prompt_ids
        relatives.setdefault(prompt[:MIN_SHARED].tobytes() if may_share else i, []).append(i)
    clusters = [cluster_of(members) for members in relatives.values()]
    budget = most // multiple * multiple
    fitting: list[_Cluster] = []
    for each in clusters:
        whole = len(each.trie) <= budget
        fitting += [each] if whole else map(cluster_of, _split(each, groups, budget, None if in_pieces else most))
    # what runs in pieces leaves no room in its row
    bins = best_fit_decreasing([min(len(cluster.trie), budget) for cluster in fitting], budget)
    return [[fitting[i] for i in members] for members in bins]


def _split(cluster: _Cluster, groups: Sequence[Group], budget: int, refused: int | None) -> list[list[int]]:
    """Break a cluster that fits no row into as many as needed, nearest relatives together.

    A group that fits none is a part of its own, or with ``refused``, the budget before rounding, an error.
    """
    paths = iter(cluster.trie.paths)
    nodes = {i: np.unique(np.concatenate([next(paths) for _ in groups[i].response_ids])) for i in cluster.members}
    parts: list[list[int]] = []
    covered = np.empty(0, dtype=np.int64)
    # depth-first order puts those side by side that part last
    for i in sorted(cluster.members, key=lambda i: nodes[i].tolist()):
        if nodes[i].size > budget and refused is not None:
            raise FlexdpoError(
                f"{groups[i].name} has {nodes[i].size} distinct tokens but max_tokens_per_row={refused} "
                f"leaves room for {budget}; raise max_tokens_per_row or lower max_length"
            )
        together = np.union1d(covered, nodes[i])
        if parts and together.size <= budget:
            parts[-1].append(i)
            covered = together
        else:
            parts.append([i])
            covered = nodes[i]
    return [sorted(part) for part in parts]


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Place each length, longest first, into the fullest bin with room for it; bins hold their indices in order."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(space, number) for number, space in enumerate(room) if space >= lengths[index]]
        _, number = min(fitting, default=(budget, len(bins)))
        if not fitting:
            bins.append([])
            room.append(budget)
        bins[number].append(index)
        room[number] -= lengths[index]
    return sorted(sorted(members) for members in bins)


@dataclass(frozen=True)
class Buckets:
    """The few lengths that rows are padded to, so that few kernels are compiled."""

    lengths: tuple[int, ...]  # increasing multiples of ``multiple``
    multiple: int  # a tile of FlexAttention, in tokens
    waste: float  # share of padding in all tokens run, on the rows these lengths were chosen for

    def length_for(self, tokens: int, *, most: int | None = None) -> int:
        """The length to pad a row of ``tokens`` to, not beyond ``most``, the token budget.

        A row longer than all buckets is padded to a multiple of an eighth of the longest, so that even surprises come
        in few lengths.
        """
        step = _rounded_up(-(-self.lengths[-1] // 8), self.multiple)
        length = next((each for each in self.lengths if each >= tokens), _rounded_up(tokens, step))
        if most is not None and length > most:
            return max(most // self.multiple * self.multiple, _rounded_up(tokens, self.multiple))
        return length


def choose_buckets(
    lengths: Sequence[int], *, max_waste: float = MAX_WASTE, max_buckets: int = 16, multiple: int = TILE
) -> Buckets:
    """Choose the fewest lengths to pad rows to that keep padding below a share of all tokens.

    Rounding up to whole tiles is waste that no choice avoids; on short rows it alone may exceed ``max_waste``. Then,
    and where ``max_buckets`` lengths are too few, the best choice of ``max_buckets`` lengths is returned, and its
    ``waste`` says what it costs: one kernel for all lengths (``lengths="dynamic"``) is the way out.

    ``lengths`` are those of a sample of rows, as :func:`row_lengths` gives them; the more often one occurs, the more it
    counts, and the longest fits into the last bucket. Each bucket, a multiple of ``multiple`` tokens, compiles kernels
    for about half a minute on a GPU.
    """
    if not lengths or min(lengths) < 1:
        raise FlexdpoError(
            "choose_buckets needs the lengths of some rows, each at least 1 token; got none or an empty row"
        )
    if min(max_waste, max_buckets, multiple) <= 0:
        raise FlexdpoError(
            f"max_waste, max_buckets and multiple must be above 0, got {max_waste}, {max_buckets}, {multiple}"
        )
    rounded = np.asarray([_rounded_up(length, multiple) for length in lengths])
    sizes, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate(([0], np.cumsum(counts)))
    # cost[k][j]: rows of the first j sizes in k + 1 buckets, the last of which is as long as size j - 1
    cost = [np.concatenate(([0], sizes * before[1:]))]
    came: list[NDArray[np.int64]] = [np.zeros(len(sizes) + 1, dtype=np.int64)]
    for _ in range(1, min(max_buckets, len(sizes))):
        best, start = cost[-1].copy(), np.arange(len(sizes) + 1)
        for j in range(1, len(sizes) + 1):
            totals = cost[-1][:j] + sizes[j - 1] * (before[j] - before[:j])
            start[j] = int(totals.argmin())
            best[j] = totals[start[j]]
        cost.append(best)
        came.append(start)
    wastes = [1 - int(sum(lengths)) / int(each[-1]) for each in cost]
    enough = [number for number, waste in enumerate(wastes) if waste <= max_waste]
    number = enough[0] if enough else int(np.argmin(wastes))
    chosen, j = [], len(sizes)
    for starts in came[number::-1]:
        if j > 0:
            chosen.append(int(sizes[j - 1]))
            j = int(starts[j])
    return Buckets(tuple(chosen[::-1]), multiple, wastes[number])


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
