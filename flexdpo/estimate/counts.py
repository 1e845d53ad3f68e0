"""What was counted in a dataset, as an estimate reports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flexdpo.estimate.lengths import classes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexdpo.estimate.lengths import RowTokens


@dataclass(frozen=True)
class Spread:
    """How a number is distributed over rows or responses."""

    mean: float
    median: int
    p90: int
    p99: int
    most: int

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> Spread:
        """The spread of at least one value."""
        median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99], method="higher").tolist()
        return cls(float(values.mean()), int(median), int(p90), int(p99), int(values.max()))


@dataclass(frozen=True)
class Lengths:
    """Tokens of the used rows, and how many rows have ``K`` responses.

    ``longest`` is a prompt with its longest response, ``unshared`` a row as an ordinary trainer runs it, its prompt
    once for each response, and ``distinct`` its trie.
    """

    prompt: Spread
    response: Spread
    longest: Spread
    unshared: Spread
    distinct: Spread
    responses: dict[int, int]

    @classmethod
    def of(cls, counted: RowTokens) -> Lengths:
        """The lengths of counted rows."""
        numbers, counts = np.unique(counted.responses, return_counts=True)
        return cls(
            Spread.of(counted.prompts),
            Spread.of(counted.response_tokens),
            Spread.of(counted.longest),
            Spread.of(counted.unshared),
            Spread.of(counted.distinct),
            dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
        )


@dataclass(frozen=True)
class EpochTokens:
    """Tokens of one epoch, in the order of what is saved. All but ``padded`` and ``across`` are exact.

    Attributes:
        padded: As an ordinary trainer runs them in batches padded to their longest.
        unshared: The same without padding: the trainer's ``tokens/unshared``.
        shared: With every group's prompt once: the trainer's ``tokens/run``, under ``sharing="group"``.
        regrouped: With rows that have the same prompt merged (``regroup_prompts=True``).
        across: With common beginnings of the examples of a batch shared as well (``sharing="step"``).
        targets: Distinct response tokens, whose log-probabilities are computed.
    """

    padded: int
    unshared: int
    shared: int
    regrouped: int
    across: int
    targets: int

    @property
    def shared_share(self) -> float:
        """Share of an ordinary trainer's tokens that are never run, padding not counted."""
        return 1 - self.shared / self.unshared


@dataclass(frozen=True)
class RepeatedPrompts:
    """Distinct prompts that occur more than once, the rows that have one, and how many rows have the commonest."""

    prompts: int
    rows: int
    most: int

    @classmethod
    def of(cls, counted: RowTokens) -> RepeatedPrompts:
        """Those of counted rows."""
        _, counts = classes_of(counted.prompt_keys)
        repeated = counts[counts > 1]
        return cls(int(repeated.size), int(repeated.sum()), int(counts.max()))
