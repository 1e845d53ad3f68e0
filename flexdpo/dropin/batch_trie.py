"""The token trie of a padded batch, found on the device where the batch lies.

:mod:`flexdpo.layout.trie` walks over lists of sequences. Here rows of a padded tensor are sorted, so that those with
equal beginnings stand next to each other; a row then adds to the trie what it does not have in common with the row
above it. Read row by row, the added tokens are the trie in depth-first order.

Shapes: ``N`` rows, ``T`` places per row, ``S`` distinct tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flexdpo.errors import FlexdpoError

# tokens compared with each other at once: bounds the memory of comparing every row with every other
_COMPARED = 1 << 25


class RowSpans(NamedTuple):
    """Where the real tokens of each row stand."""

    starts: Tensor  # column of the first real token, 0 in a row without any, ``[N]`` int64
    lengths: Tensor  # real tokens, ``[N]`` int64
    gaps: Tensor  # whether padding stands between two real tokens of some row; a 0-d bool tensor


@dataclass(frozen=True, eq=False)
class BatchTrie:
    """The distinct tokens of a padded batch in depth-first order, and where every place of the batch finds its own."""

    sources: Tensor  # for each token a place of the flattened batch, ``n * T + t``, that holds it, ``[S]`` int64
    depths: Tensor  # tokens before it in its rows, ``[S]`` int64
    subtree_end: Tensor  # index just past the last descendant, ``[S]`` int64
    multiplicity: Tensor  # how many rows contain it, ``[S]`` int64
    nodes: Tensor  # for each place of the batch the index of its token, -1 at padding, ``[N, T]`` int64

    def __len__(self) -> int:
        return int(self.sources.shape[0])

    def elsewhere(self, places: Tensor, shape: tuple[int, int]) -> BatchTrie:
        """The same trie for a batch of another ``shape``, where each place of this one stands at ``places``."""
        nodes = torch.full((shape[0] * shape[1] + 1,), -1, device=places.device)
        # what stands nowhere is written into one slot more
        nodes[torch.where(places < 0, nodes.numel() - 1, places)] = self.nodes
        return replace(self, sources=places.reshape(-1)[self.sources], nodes=nodes[:-1].reshape(shape))


def row_spans(attention_mask: Tensor) -> RowSpans:
    """Find the real tokens of each row, at which ``attention_mask``, ``[N, T]`` of any dtype, is nonzero."""
    real = attention_mask != 0
    lengths = real.sum(dim=1)
    # the first of several equal maxima
    starts = real.byte().argmax(dim=1)
    column = torch.arange(real.shape[1], device=real.device)
    inside = (column >= starts[:, None]) & (column < (starts + lengths)[:, None])
    return RowSpans(starts, lengths, (real != inside).any())


def sequence_places(position_ids: Tensor) -> Tensor:
    """Where the sequences stand that rows of a batch hold one behind the other.

    One begins where ``position_ids``, ``[N, T]``, do not go on by one, as in ``transformers.masking_utils``. Returns
    places of the flattened batch, ``n * T + t``, a row per sequence and -1 behind its end, ``[M, L]`` int64.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    starts = begins.flatten().nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([position_ids.numel()]))
    column = torch.arange(int(lengths.max()), device=starts.device)
    return torch.where(column < lengths[:, None], starts[:, None] + column, -1)


class SortedBatch(NamedTuple):
    """A padded batch with its rows moved to the left and sorted, ready to be read as a trie."""

    order: Tensor  # number of the row that stands at each rank, ``[N]`` int64
    starts: Tensor  # column of its first real token, ``[N]`` int64
    lengths: Tensor  # its real tokens, ``[N]`` int64
    shared: Tensor  # tokens at its beginning that it has in common with the rank above, 0 at rank 0, ``[N]`` int64
    columns: int  # places per row, ``T``

    @property
    def num_tokens(self) -> Tensor:
        """Distinct tokens, ``S``; a 0-d tensor, so that reading it can wait."""
        return (self.lengths - self.shared).sum()


def sort_batch(input_ids: Tensor, spans: RowSpans, *, min_prefix: int = 1) -> SortedBatch:
    """Sort the rows of a padded batch, so that those with equal beginnings stand together.

    ``input_ids`` are ``[N, T]`` int64, not negative, without gaps; or keys that hold each token with its position, so
    that equal tokens at different positions are not merged. Rows that have fewer than ``min_prefix`` tokens in common
    share none of them. Work is ``N * N * T`` comparisons, memory is bounded.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] == 0:
        raise FlexdpoError(f"input_ids must be [N, T] with at least one row, got {list(input_ids.shape)}")
    columns = input_ids.shape[1]
    column = torch.arange(columns, device=input_ids.device)
    moved = input_ids.gather(1, (column + spans.starts[:, None]).clamp_(max=columns - 1))
    # behind its end a row holds what is less than every token, so that a beginning of another row comes before it
    moved = torch.where(column < spans.lengths[:, None], moved, -1)
    # for every pair of rows the first column where they differ, ``T`` where none does, ``[N, N]``
    differences = []
    for some in moved.split(max(1, _COMPARED // moved.numel())):
        differs = (some[:, None, :] != moved[None, :, :]).byte()
        differences.append(torch.where(differs.amax(dim=2) > 0, differs.argmax(dim=2), columns))
    first_difference = torch.cat(differences)
    number = torch.arange(len(moved), device=moved.device)
    at = first_difference.clamp(max=columns - 1)
    mine, other = moved.gather(1, at), moved.T.gather(0, at)
    comes_before = torch.where(first_difference == columns, number < number[:, None], other < mine)
    order = comes_before.sum(dim=1).argsort()
    lengths = spans.lengths[order]
    shared = torch.minimum(first_difference[order, order.roll(1)], lengths)
    # nothing stands above the first rank
    shared = torch.where((number == 0) | (shared < min_prefix), 0, shared)
    return SortedBatch(order, spans.starts[order], lengths, shared, columns)


def trie_of(batch: SortedBatch, num_tokens: int) -> BatchTrie:
    """Read a sorted batch as a trie. Given ``int(batch.num_tokens)``, no operation here waits for the device."""
    order, starts, lengths, shared, columns = batch
    device = order.device
    column = torch.arange(columns, device=device)
    real = column < lengths[:, None]
    added = real & (column >= shared[:, None])
    counts = lengths - shared
    first = counts.cumsum(0) - counts
    own = torch.where(added, first[:, None] + column - shared[:, None], -1)
    # what a row shares, it shares with the last row above that added a token at this column
    nodes = own.cummax(dim=0).values

    # a subtree ends where a row below no longer shares the column
    ends = torch.where(shared[:, None] <= column, first[:, None], num_tokens)[1:]
    ends = torch.cat([ends, ends.new_full((1, columns), num_tokens)]).flip(0).cummin(dim=0).values.flip(0)

    place = order[:, None] * columns + starts[:, None] + column
    # places that add nothing write into one slot more, which is left out
    slot = torch.where(added, own, num_tokens).reshape(-1)

    def collected(values: Tensor) -> Tensor:
        room = torch.zeros(num_tokens + 1, dtype=torch.int64, device=device)
        return room.scatter_(0, slot, values.expand(len(order), columns).reshape(-1))[:num_tokens]

    members = torch.zeros(num_tokens + 1, dtype=torch.int64, device=device)
    members.scatter_add_(0, torch.where(real, nodes, num_tokens).reshape(-1), torch.ones_like(slot))
    # undoes the sorting and the moving to the left
    back = column - starts[:, None]
    inside = (back >= 0) & (back < lengths[:, None])
    moved = torch.where(inside, nodes.gather(1, back.clamp(0, columns - 1)), -1)
    placed = torch.empty_like(moved).index_copy_(0, order, moved)
    return BatchTrie(collected(place), collected(column), collected(ends), members[:num_tokens], placed)
