"""How much longer a step takes where many processes wait for the slowest of them, with and without balancing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange, reduce
from numpy.typing import NDArray

from flexdpo.data.balance import partition

# steps that are drawn; the mean over them is told
_STEPS = 8


@dataclass(frozen=True)
class Straggler:
    """The slowest of so many processes: what its part of a step costs over the mean of all, as a share of the mean."""

    processes: int
    examples: int  # of all processes in a step
    steps: int  # that were looked at
    unbalanced: float  # as the sampler gives the examples
    balanced: float | None  # with ``balance_processes=True``; ``None`` where the trainer leaves it
    repeats: bool  # whether a step takes more examples than there are, so that some were taken several times


def stragglers_of(
    costs: NDArray[np.float64], processes: Sequence[int], *, per_process: int, balances: bool, seed: int = 0
) -> tuple[Straggler, ...]:
    """Draw steps of the examples in a random order, as the trainer does, and say what their processes wait.

    Args:
        costs: Of each example, from :func:`flexdpo.data.lengths.costs_of`.
        processes: Each number of them to look at.
        per_process: Examples of a process in an optimizer step.
        balances: Whether the trainer balances such data.
        seed: Of the order.
    """
    found = []
    for count in processes:
        examples = count * per_process
        steps = max(1, min(_STEPS, len(costs) // examples))
        rng = np.random.default_rng(seed)
        epochs = -(-steps * examples // len(costs))
        order = np.concatenate([rng.permutation(len(costs)) for _ in range(epochs)])[: steps * examples]
        drawn = rearrange(costs[order], "(step example) -> step example", step=steps)
        in_turn = rearrange(drawn, "step (process example) -> step process example", process=count)
        assigned = np.stack([step[partition(step, count)] for step in drawn]) if balances else None
        balanced = None if assigned is None else _waiting(assigned)
        found.append(Straggler(count, examples, steps, _waiting(in_turn), balanced, epochs > 1))
    return tuple(found)


def _waiting(costs: NDArray[np.float64]) -> float:
    spent = reduce(costs, "step process example -> step process", "sum")
    return float((spent.max(axis=1) / spent.mean(axis=1) - 1).mean())
