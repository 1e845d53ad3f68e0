"""A row whose tokens are dealt to several processes: what each of them runs, and which keys its tokens see.

A row is cut into chunks of equal length, and every process gets as many of them, so that each holds the same share of
the activations. Late tokens see more keys than early ones, so chunks are dealt by what their attention costs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import Row
from flexdpo.layout.row_layout import RowLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# chunks per process that are tried, fewest first, until the busiest process costs at most so much more than the mean
_CHUNKS, _UNEVEN = (2, 4, 8), 1.05


@dataclass(eq=False)
class Share(Row):
    """What one process runs of a row: its tokens, as a row of their own without responses.

    The layout tells their positions and multiplicities; which keys they see, the chunks tell.

    Shapes: ``S`` tokens of the row, ``N`` of them in each share; ``T`` targets of the row, ``L`` of them predicted by
    the share. All tensors are int64.
    """

    tokens: Tensor = field(default_factory=lambda: torch.empty(0))  # where each token stands in the row, ``[N]``
    # where each token of the row stands in all shares, one after the other, ``[S]``
    order: Tensor = field(default_factory=lambda: torch.empty(0))
    chunks: tuple[RowLayout, ...] = ()  # of neighbouring tokens; the ``keys`` of each are the row's up to its end
    targets: Tensor = field(default_factory=lambda: torch.empty(0))  # which of the row's targets these are, ``[L]``
    num_targets: int = 0  # ``T``
    group: Any = None  # the processes that the row was dealt to, a ``torch.distributed.ProcessGroup``

    def _map(self, change: Any) -> Share:
        share = dataclasses.replace(cast("Share", super()._map(change)), chunks=tuple(map(change, self.chunks)))
        share.layout.share = share
        return share


def share_of(row: Row, process: int, processes: int, unit: int) -> Row:
    """Deal a row on the host to several processes, and return it padded, with the share that one of them runs.

    Args:
        row: A row as :func:`flexdpo.pack` makes it.
        process: Whose share, counted from 0.
        processes: Among how many it is dealt.
        unit: A chunk is a multiple of this many tokens.

    Returns:
        The row, alike for all processes but for :attr:`Row.share`.

    Raises:
        FlexdpoError: if the row holds images, whose tokens and features would have to stay together.
    """
    if row.layout.images is not None:
        raise FlexdpoError(
            f"{row.groups[0].name} or an example beside it has images, which cannot be dealt to several processes; "
            "leave context_parallel out, or the images"
        )
    dealt = None
    for each in _CHUNKS:
        length = -(-row.layout.length // (processes * each * unit)) * unit
        costs = _costs(row, length, processes * each)
        hands = _deal(costs, processes)
        loads = [int(costs[hand].sum()) for hand in hands]
        uneven = max(loads) * processes / sum(loads)
        if dealt is None or uneven < dealt[0]:
            dealt = uneven, length, hands
        if uneven <= _UNEVEN:
            break
    assert dealt is not None
    _, length, hands = dealt
    tokens = [np.concatenate([np.arange(chunk * length, (chunk + 1) * length) for chunk in hand]) for hand in hands]
    whole = _padded(row, sum(part.size for part in tokens))
    order = torch.from_numpy(np.argsort(np.concatenate(tokens)))
    return _with_share(whole, tokens[process], order, length)


def _costs(row: Row, length: int, chunks: int) -> NDArray[np.int64]:
    """Keys that the queries of each chunk see, padding included, which sees itself."""
    seen = np.ones(length * chunks, dtype=np.int64)
    seen[: row.layout.length] += row.layout.position_ids[0].numpy()
    costs: NDArray[np.int64] = seen.reshape(chunks, length).sum(axis=1)
    return costs


def _deal(costs: NDArray[np.int64], processes: int) -> list[NDArray[np.int64]]:
    """As many chunks for each, in row order: the costliest first, to whoever has least and still has room."""
    each = costs.size // processes
    hands: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for chunk in np.argsort(-costs, kind="stable").tolist():
        hand = min((k for k in range(processes) if len(hands[k]) < each), key=lambda k: loads[k])
        hands[hand].append(chunk)
        loads[hand] += int(costs[chunk])
    return [np.sort(hand) for hand in hands]


def _padded(row: Row, length: int) -> Row:
    input_ids = torch.nn.functional.pad(row.input_ids, (0, length - row.layout.length))
    return dataclasses.replace(row, input_ids=input_ids, layout=row.layout.padded_to(length))


def _with_share(row: Row, tokens: NDArray[np.int64], order: Tensor, chunk: int) -> Row:
    index = torch.from_numpy(tokens)
    places = np.full(row.layout.length, -1, dtype=np.int64)
    places[tokens] = np.arange(tokens.size)
    predictors = row.predictors.numpy()
    targets = torch.from_numpy(np.flatnonzero(places[predictors] >= 0))
    share = Share.part_of(
        row,
        _only(row.layout, index),
        index,
        targets,
        predictors=torch.from_numpy(places[predictors])[targets],
        order=order,
        chunks=tuple(_chunk(row.layout, start, start + chunk) for start in tokens[::chunk].tolist()),
        num_targets=len(row.labels),
    )
    share.layout.share = share
    return dataclasses.replace(row, share=share)


def _only(layout: RowLayout, tokens: Tensor) -> RowLayout:
    # each of them ends behind itself here: which of the others it sees cannot be said within the share
    alone = torch.arange(1, len(tokens) + 1)[None]
    return RowLayout(subtree_end=alone, num_tokens=(_real(layout, tokens),), **layout.vectors_at(tokens))


def _chunk(layout: RowLayout, start: int, stop: int) -> RowLayout:
    tokens, seen = torch.arange(start, stop), torch.arange(stop)
    ends = layout.subtree_end[:, :stop].clamp(max=stop)
    chunk = RowLayout(
        subtree_end=ends[:, start:] - start, num_tokens=(_real(layout, tokens),), **layout.vectors_at(tokens)
    )
    chunk.keys = RowLayout(subtree_end=ends, num_tokens=(_real(layout, seen),), **layout.vectors_at(seen))
    return chunk


def _real(layout: RowLayout, tokens: Tensor) -> int:
    return int((tokens < layout.num_tokens[0]).sum())
