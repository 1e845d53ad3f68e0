"""Which process runs which pairs of a step: the same pairs as ever, assigned so that all finish together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

# a step is balanced once its slowest process is this near to the mean, or so many swaps were made
_NEAR_ENOUGH = 1.003
_SWAPS = 300
# processes with little to do, among which the slowest one looks for somebody to swap with
_PARTNERS = 16


@dataclass(eq=False)
class BalancedSampler(Sampler[int]):
    """Reorders examples inside each optimizer step, so that its parts, one for each process, cost about the same.

    A step is ``accumulation`` times ``num_processes`` consecutive batches of ``batch_size``. It keeps its examples;
    only which process runs which of them changes, and a mean over all processes does not ask. An epoch's last step may
    have fewer batches; what fills none for every process stays where it is.
    """

    sampler: Sampler[int]  # gives the order
    costs: NDArray[np.float64]  # of each example, ``[N]``
    batch_size: int  # examples of a batch of one process
    num_processes: int  # that take one batch each, in turn
    accumulation: int = 1  # batches of a process in a step

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        window: list[int] = []
        for index in self.sampler:
            window.append(index)
            if len(window) == self.batch_size * self.num_processes * self.accumulation:
                yield from self._balanced(window)
                window = []
        yield from self._balanced(window)

    def _balanced(self, window: list[int]) -> Iterator[int]:
        at_once = self.batch_size * self.num_processes
        whole = len(window) // at_once * at_once
        if whole:
            parts = np.asarray(window[:whole])[partition(self.costs[window[:whole]], self.num_processes)]
            # the processes take their batches in turn
            yield from rearrange(parts, "process (turn item) -> (turn process item)", item=self.batch_size).tolist()
        yield from window[whole:]

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to the sampler that shuffles."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def partition(costs: Sequence[float] | NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Split items into ``count`` equally large parts of about equal cost.

    The items go out in turns, the dearest first: in each turn every part gets one, and the part that has the least yet
    gets the dearest. Then the dearest part swaps items with those that have little, as long as this helps.

    Returns:
        The items of each part, in increasing order, ``[count, len(costs) / count]``.
    """
    costs = np.asarray(costs, dtype=np.float64)
    turns = rearrange(np.argsort(-costs, kind="stable"), "(turn part) -> turn part", part=count)
    parts = np.empty(turns.shape[::-1], dtype=np.int64)
    spent = np.zeros(count)
    for turn, items in enumerate(turns):
        least_first = np.argsort(spent, kind="stable")
        parts[least_first, turn] = items
        spent[least_first] += costs[items]
    for _ in range(_SWAPS if count > 1 else 0):
        high = int(spent.argmax())
        if spent[high] <= _NEAR_ENOUGH * spent.mean():
            break
        low = np.argsort(spent, kind="stable")[: min(_PARTNERS, count - 1)]
        # by how much each swap would move cost from the dearest part to another, [item, part, item]
        moved = costs[parts[high]][:, None, None] - costs[parts[low]][None]
        dearer = np.maximum(spent[high] - moved, spent[low][None, :, None] + moved)
        mine, partner, theirs = np.unravel_index(int(dearer.argmin()), dearer.shape)
        if not dearer[mine, partner, theirs] < spent[high]:
            break
        other, cost = low[partner], moved[mine, partner, theirs]
        parts[high, mine], parts[other, theirs] = parts[other, theirs], parts[high, mine]
        spent[high] -= cost
        spent[other] += cost
    return np.sort(parts, axis=1)


def balance(loader: DataLoader[Any], costs: NDArray[np.float64], num_processes: int, accumulation: int = 1) -> bool:
    """Put a :class:`BalancedSampler` into a loader of accelerate's; whether its batches come from a sampler."""
    shard = getattr(loader, "batch_sampler", None)
    batches = getattr(shard, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None)
    if sampler is None or batches is None or batches.batch_size is None or getattr(shard, "split_batches", False):
        return False
    batches.sampler = BalancedSampler(
        sampler, costs, batch_size=batches.batch_size, num_processes=num_processes, accumulation=accumulation
    )
    return True
