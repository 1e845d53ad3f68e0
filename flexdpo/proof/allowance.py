"""What a proof may cost, counted in passes of tokens through the model, and which sequences that leaves time for.

A forward pass of a token counts 1, a backward pass to the activations 1, one to all weights 1 more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from flexdpo.hf.row_dependence import LengthLimits
from flexdpo.layout.row import Row
from flexdpo.proof.probe import path_of

# tokens of a padded batch that are worth one call of the model; more only where a packed row has as many
_SHORT_BATCH = 1024


@dataclass(frozen=True)
class Allowance:
    """Passes of tokens that may be spent in all, and those that a token of a row takes anyway."""

    passes: float = math.inf
    backward: int = 1  # 2 where checkpointing runs the forward pass again
    reference: int = 0  # 1 where the reference runs the rows too


UNLIMITED = Allowance()


@dataclass(frozen=True)
class Plan:
    """What runs unpacked."""

    responses: list[list[int]]  # of each row, those whose sequences run unpacked too
    gradients: bool  # whether there is a backward pass, packed and unpacked
    beside: bool = True  # whether the noise of a sequence that ran alone is measured beside another one

    def cost(self, rows: Sequence[Row], limits: LengthLimits, allowance: Allowance) -> int:
        """Passes of tokens, padding included."""
        passes = 1 + self.gradients * allowance.backward
        packed = sum(row.layout.length for row in rows)
        together = [
            [len(path_of(row, response)) for response in batch]
            for row, responses in zip(rows, self.responses, strict=True)
            for batch in batches_of(row, responses, limits)
        ]
        unpacked = sum(max(lengths) * len(lengths) for lengths in together)
        shortest = min(together, key=min)
        noise = min(shortest) * (2 if self.beside and len(shortest) == 1 else 1)
        return (passes + allowance.reference) * packed + passes * unpacked + noise


def planned(rows: Sequence[Row], limits: LengthLimits, allowance: Allowance, *, gradients: bool) -> Plan:
    """As many sequences as the allowance covers, one at least; gradients where it covers those of one."""
    one, *others = _order(rows, limits)
    plan = _with(Plan([[] for _ in rows], gradients), *one)
    if plan.cost(rows, limits, allowance) > allowance.passes:
        plan = replace(plan, beside=False)
    if plan.cost(rows, limits, allowance) > allowance.passes:
        plan = replace(plan, gradients=False)
    for each in others:
        more = _with(plan, *each)
        if more.cost(rows, limits, allowance) <= allowance.passes:
            plan = more
    return plan


def _order(rows: Sequence[Row], limits: LengthLimits) -> list[tuple[int, int]]:
    """Rows in turn, and sides of limits; the last response first, since what leaks flows towards it."""
    queues: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, row in enumerate(rows):
        for response in reversed(range(row.num_responses)):
            side = limits.side(len(path_of(row, response)))
            queues.setdefault((number, side), []).append((number, response))
    return [each for turn in zip_longest(*queues.values()) for each in turn if each is not None]


def _with(plan: Plan, row: int, response: int) -> Plan:
    responses = [sorted([*each, response]) if number == row else each for number, each in enumerate(plan.responses)]
    return replace(plan, responses=responses)


def batches_of(row: Row, responses: Sequence[int], limits: LengthLimits) -> list[list[int]]:
    """Responses whose sequences may run together: on the same side of every limit, and in no more memory."""
    room = max(row.num_tokens, _SHORT_BATCH)
    lengths = {response: len(path_of(row, response)) for response in responses}
    batches: list[list[int]] = []
    for response in sorted(responses, key=lambda each: -lengths[each]):
        longest = lengths[batches[-1][0]] if batches else room
        alike = limits.side(lengths[response]) == limits.side(longest)
        if alike and batches and (len(batches[-1]) + 1) * longest <= room:
            batches[-1].append(response)
        else:
            batches.append([response])
    return batches
