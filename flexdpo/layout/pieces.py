"""A row that is longer than memory, cut where its trie branches into pieces that run one after another.

A piece holds whole subtrees, or one unbranched run whose children are pieces of their own. It runs against the keys and
values of the pieces on its path, so what is in memory at a time is the longest path and the piece in hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import Piece, Row
from flexdpo.layout.row_layout import RowLayout
from flexdpo.layout.segments import Segments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


class _Cut(NamedTuple):
    tokens: Ints  # of the row, ascending
    parent: int


def cut_in_pieces(row: Row, most: int, multiple: int = 1, *, name: str = "the row") -> tuple[Piece, ...]:
    """Cut a row on the host so that no path with the piece in hand holds more than ``most`` tokens.

    Pieces are padded to a multiple of ``multiple`` tokens, and padding counts.

    Raises ``FlexdpoError``, saying ``name``, if a single sequence is longer.
    """
    if row.layout.images is not None:
        raise FlexdpoError(
            f"{name} has images and {row.num_tokens} distinct tokens, and rows with images do not run in pieces; raise "
            f"max_tokens_per_row={most} to at least as many, or lower max_length"
        )
    pieces: list[Piece] = []
    for tokens, parent in _cuts(row.layout, most, multiple, name):
        pieces.append(_piece(row, tokens, parent, pieces, multiple))
    return tuple(pieces)


def _cuts(layout: RowLayout, most: int, multiple: int, name: str) -> list[_Cut]:
    segments = Segments.of(layout)
    ends = layout.subtree_end[0].numpy()
    children: dict[int, list[int]] = {}
    for segment, parent in enumerate(segments.parents.tolist()):
        children.setdefault(parent, []).append(segment)
    found: list[_Cut] = []
    # a segment whose children are pieces of their own, the piece before it, and the tokens on the path to it; -1 stands
    # before all that begins a sequence
    stack = [(-1, -1, 0)]
    while stack:
        segment, parent, path = stack.pop()
        if segment >= 0:
            start, stop = int(segments.starts[segment]), int(segments.stops[segment])
            found.append(_Cut(np.arange(start, stop), parent))
            parent, path = len(found) - 1, path + -(-(stop - start) // multiple) * multiple
        room = (most - path) // multiple * multiple
        whole, inner = [], []
        for child in children[segment]:
            start, stop = int(segments.starts[child]), int(segments.stops[child])
            if ends[start] - start <= room:
                whole.append((start, int(ends[start])))
            elif stop - start <= room and child in children:
                inner.append((child, parent, path))
            else:
                raise FlexdpoError(
                    f"{name} has a sequence of {path + stop - start} tokens or more but max_tokens_per_row={most} "
                    f"leaves room for {most // multiple * multiple}; raise max_tokens_per_row or lower max_length"
                )
        found += [_Cut(np.concatenate([np.arange(*run) for run in runs]), parent) for runs in _bins(whole, room)]
        stack.extend(reversed(inner))
    return found


def _bins(runs: list[tuple[int, int]], room: int) -> list[list[tuple[int, int]]]:
    """Neighbouring subtrees together, as many as there is room for: they part last, and see the same keys."""
    bins: list[list[tuple[int, int]]] = []
    left = 0
    for start, stop in runs:
        if stop - start > left:
            bins.append([])
            left = room
        bins[-1].append((start, stop))
        left -= stop - start
    return bins


def _piece(row: Row, tokens: Ints, parent: int, before: list[Piece], multiple: int) -> Piece:
    length = -(-tokens.size // multiple) * multiple
    layout = row.layout
    index = torch.from_numpy(tokens)
    # what is not written over is padding, which stands at position 0 and sees only itself
    places = np.full(layout.length + 1, -1, dtype=np.int64)
    places[tokens] = np.arange(tokens.size)
    ends = torch.arange(1, length + 1, device="cpu")[None]
    # a subtree's last token lies in the piece, or the next piece begins behind it and sees all of this one
    last = places[np.minimum(layout.subtree_end[0].numpy()[tokens], tokens[-1] + 1) - 1]
    ends[0, : tokens.size] = torch.from_numpy(last) + 1
    vectors = layout.vectors_at(index, length - tokens.size)
    own = RowLayout(subtree_end=ends, num_tokens=(tokens.size,), **vectors)
    if parent >= 0:
        own.keys = _behind(before[parent].layout, own)
    predictors = row.predictors.numpy()
    targets = np.flatnonzero(places[predictors] >= 0)
    return Piece.of(
        row,
        own,
        index,
        torch.from_numpy(targets),
        predictors=torch.from_numpy(places[predictors[targets]]),
        parent=parent,
    )


def _behind(path: RowLayout, own: RowLayout) -> RowLayout:
    """The layout of all keys: those on the path to a piece, which all of it descends from, and its own."""
    path = path.keys or path
    # a path does not branch: what reaches as far as its first token is on it, and the rest is padding
    on_path = path.subtree_end == path.subtree_end[:, :1]
    alone = torch.arange(1, path.length + 1, device="cpu")
    ends = torch.where(on_path, path.length + own.num_tokens[0], alone)
    return RowLayout(
        torch.cat([path.position_ids, own.position_ids], dim=1),
        torch.cat([ends, own.subtree_end + path.length], dim=1),
        (path.length + own.num_tokens[0],),
    )
