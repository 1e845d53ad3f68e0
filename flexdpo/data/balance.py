"""Which process runs which pairs of a step: the same pairs as ever, dealt out so that all finish together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch.utils.data import DataLoader


class BalancedSampler(Sampler[int]):
    """Reorders examples inside each global batch, so that its parts, one for each process, cost about the same.

    A global batch is ``num_processes`` consecutive batches of ``batch_size``. It keeps its examples; only which process
    runs which of them changes, and a mean over all processes does not ask. The incomplete batch at the end stays as it
    is.

    Args:
        sampler: Gives the order.
        costs: Of each example, ``[N]``.
        batch_size: Examples of a batch of one process.
        num_processes: That take one batch each, in turn.
    """

    def __init__(
        self, sampler: Sampler[int], costs: NDArray[np.float64], *, batch_size: int, num_processes: int
    ) -> None:
        self.sampler = sampler
        self.costs = costs
        self.batch_size = batch_size
        self.num_processes = num_processes

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        window: list[int] = []
        for index in self.sampler:
            window.append(index)
            if len(window) == self.batch_size * self.num_processes:
                for part in partition(self.costs[window], self.num_processes):
                    yield from (window[i] for i in part)
                window = []
        yield from window

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to the sampler that shuffles."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def partition(costs: Sequence[float] | NDArray[np.float64], count: int) -> list[list[int]]:
    """Split items into ``count`` equally large parts of about equal cost: the dearest first, to the cheapest part.

    The number of items is a multiple of ``count``; each part lists its items in increasing order.
    """
    size = len(costs) // count
    parts: list[list[int]] = [[] for _ in range(count)]
    spent = [0.0] * count
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        part = min((p for p in range(count) if len(parts[p]) < size), key=lambda p: (spent[p], p))
        parts[part].append(item)
        spent[part] += float(costs[item])
    return [sorted(part) for part in parts]


def balance(loader: DataLoader[Any], costs: NDArray[np.float64], num_processes: int) -> bool:
    """Put a :class:`BalancedSampler` into a loader that accelerate has prepared for several processes.

    Returns:
        Whether the loader deals out batches of a sampler, and so could be balanced.
    """
    shard = getattr(loader, "batch_sampler", None)
    batches = getattr(shard, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None)
    if sampler is None or batches is None or batches.batch_size is None or getattr(shard, "split_batches", False):
        return False
    batches.sampler = BalancedSampler(sampler, costs, batch_size=batches.batch_size, num_processes=num_processes)
    return True
