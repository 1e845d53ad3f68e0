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
    """Tokens of the used rows, and how many rows have ``K`` responses."""

    prompt: Spread
    response: Spread
    longest: Spread  # a prompt with its longest response
    unshared: Spread  # a row as an ordinary trainer runs it, its prompt once for each response
    distinct: Spread  # its trie
    responses: dict[int, int]

    @classmethod
    def of(cls, counted: RowTokens) -> Lengths:
        """The lengths of counted rows."""
        columns = (counted.prompts, counted.response_tokens, counted.longest, counted.unshared, counted.distinct)
        prompt, response, longest, unshared, distinct = map(Spread.of, columns)
        numbers, counts = np.unique(counted.responses, return_counts=True)
        responses = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        return cls(prompt, response, longest, unshared, distinct, responses)


@dataclass(frozen=True)
class EpochTokens:
    """Tokens of one epoch, in the order of what is saved. All but ``padded`` and ``across`` are exact."""

    padded: int  # as an ordinary trainer runs them in batches padded to their longest
    unshared: int  # the same without padding: the trainer's ``tokens/unshared``
    shared: int  # with every group's prompt once: the trainer's ``tokens/run``, under ``sharing="group"``
    regrouped: int  # with rows that have the same prompt merged (``regroup_prompts=True``)
    across: int  # with common beginnings of the examples of a batch shared as well (``sharing="step"``)
    targets: int  # distinct response tokens, whose log-probabilities are computed

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
