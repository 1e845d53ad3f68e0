"""A row that several processes run together: what each of them runs, and which keys its tokens see.

A row is cut into chunks of equal length, and every process gets as many of them, so that each holds as many of
the activations. Late tokens see more keys than early ones, so chunks are assigned by what their attention costs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import Row, RowShard
from flexdpo.layout.row_layout import ContextShard, RowLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# chunks per process that are tried, fewest first, until the busiest process costs at most so much more than the mean
_CHUNKS, _UNEVEN = (2, 4, 8), 1.05


def shard_of(row: Row, process: int, processes: int, unit: int, group: Any = None) -> Row:
    """Shard a row on the host over several processes, and return it padded, with the shard that one of them runs.

    Args:
        row: A row as :func:`flexdpo.pack` makes it.
        process: Whose shard, counted from 0.
        processes: How many run the row together.
        unit: A chunk is a multiple of this many tokens.
        group: These processes, a ``torch.distributed.ProcessGroup``, which the attention gathers keys among.

    Returns:
        The row, alike for all processes but for :attr:`Row.shard`.

    Raises:
        FlexdpoError: if the row holds images, whose tokens and features would have to stay together.
    """
    if row.layout.images is not None:
        raise FlexdpoError(
            f"{row.groups[0].name} or an example beside it has images, which several processes cannot run together; "
            "leave context_parallel out, or the images"
        )
    best = None
    for each in _CHUNKS:
        length = -(-row.layout.length // (processes * each * unit)) * unit
        costs = _costs(row, length, processes * each)
        assigned = _assign(costs, processes)
        loads = [int(costs[chunks].sum()) for chunks in assigned]
        uneven = max(loads) * processes / sum(loads)
        if best is None or uneven < best[0]:
            best = uneven, length, assigned
        if uneven <= _UNEVEN:
            break
    assert best is not None
    _, length, assigned = best
    # the tokens of each process, and where they stand when those of all are gathered
    tokens = [rearrange(chunks[:, None] * length + np.arange(length), "c t -> (c t)") for chunks in assigned]
    order = torch.from_numpy(np.argsort(np.concatenate(tokens)))
    missing = order.numel() - row.layout.length
    input_ids, layout = torch.nn.functional.pad(row.input_ids, (0, missing)), row.layout.padded_to(order.numel())
    whole = dataclasses.replace(row, input_ids=input_ids, layout=layout)
    chunks = tuple(_chunk(layout, chunk * length, (chunk + 1) * length) for chunk in assigned[process].tolist())
    return dataclasses.replace(whole, shard=_shard(whole, tokens[process], ContextShard(order, chunks, group)))


def _costs(row: Row, length: int, chunks: int) -> NDArray[np.int64]:
    """Keys that the queries of each chunk see, padding included, which sees itself."""
    seen = np.ones(length * chunks, dtype=np.int64)
    seen[: row.layout.length] += row.layout.position_ids[0].numpy()
    costs: NDArray[np.int64] = seen.reshape(chunks, length).sum(axis=1)
    return costs


def _assign(costs: NDArray[np.int64], processes: int) -> list[NDArray[np.int64]]:
    """As many chunks for each, in row order: the costliest first, to whoever has least and still has room."""
    each = costs.size // processes
    chunks: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for chunk in np.argsort(-costs, kind="stable").tolist():
        least = min((k for k in range(processes) if len(chunks[k]) < each), key=lambda k: loads[k])
        chunks[least].append(chunk)
        loads[least] += int(costs[chunk])
    return [np.sort(own) for own in chunks]


def _shard(row: Row, tokens: NDArray[np.int64], context: ContextShard) -> RowShard:
    index = torch.from_numpy(tokens)
    places = np.full(row.layout.length, -1, dtype=np.int64)
    places[tokens] = np.arange(tokens.size)
    predictors = places[row.predictors.numpy()]
    targets = torch.from_numpy(np.flatnonzero(predictors >= 0))
    # each token ends behind itself here: which of the others it sees cannot be said within the shard
    alone = torch.arange(1, len(index) + 1, device="cpu")[None]
    layout = RowLayout(subtree_end=alone, num_tokens=(_real(row.layout, index),), **row.layout.vectors_at(index))
    layout.shard = context
    return RowShard.of(
        row, layout, index, targets, predictors=torch.from_numpy(predictors)[targets], num_targets=len(row.labels)
    )


def _chunk(layout: RowLayout, start: int, stop: int) -> RowLayout:
    tokens, seen = torch.arange(start, stop, device="cpu"), torch.arange(stop, device="cpu")
    ends = layout.subtree_end[:, :stop].clamp(max=stop)
    chunk = RowLayout(
        subtree_end=ends[:, start:] - start, num_tokens=(_real(layout, tokens),), **layout.vectors_at(tokens)
    )
    chunk.keys = RowLayout(subtree_end=ends, num_tokens=(_real(layout, seen),), **layout.vectors_at(seen))
    return chunk


def _real(layout: RowLayout, tokens: Tensor) -> int:
    return int((tokens < layout.num_tokens[0]).sum())
