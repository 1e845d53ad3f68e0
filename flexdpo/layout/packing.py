"""Which groups share a row: the fewest rows that a token budget allows, and nothing dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import Row
from flexdpo.layout.trie import Trie

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexdpo.layout.groups import Group


def pack_groups(
    groups: Sequence[Group], max_tokens_per_row: int | None = None, *, pad_to_multiple_of: int = 1
) -> list[Row]:
    """Lay groups out in as few rows as the budget allows.

    Packing decides how the work is laid out, never what is learned: every group lands in exactly one row.

    Args:
        groups: The groups of one optimizer step (or of one forward pass).
        max_tokens_per_row: Longest row, padding included, in tokens; ``None`` puts all groups in one row.
        pad_to_multiple_of: Every row is padded to a multiple of this many tokens.

    Returns:
        The rows; inside a row the groups keep the order in which they came.

    Raises:
        FlexdpoError: if a single group is longer than the budget.
    """
    tries = [Trie.from_sequences(group.sequences) for group in groups]
    lengths = [len(trie) for trie in tries]
    if max_tokens_per_row is None:
        bins = [list(range(len(groups)))] if groups else []
    else:
        budget = max_tokens_per_row // pad_to_multiple_of * pad_to_multiple_of
        for group, length in zip(groups, lengths, strict=True):
            if length > budget:
                raise FlexdpoError(
                    f"{group.name} has {length} distinct tokens but max_tokens_per_row={max_tokens_per_row} leaves "
                    f"room for {budget}; raise max_tokens_per_row or lower max_length"
                )
        bins = best_fit_decreasing(lengths, budget)
    return [
        Row.from_tries([groups[i] for i in members], [tries[i] for i in members], pad_to_multiple_of=pad_to_multiple_of)
        for members in bins
    ]


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Place each length, longest first, into the fullest bin that still has room for it.

    Args:
        lengths: Sizes of the items, each at most ``budget``.
        budget: Size of a bin.

    Returns:
        The indices in each bin, in increasing order; bins ordered by their first index.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(space, number) for number, space in enumerate(room) if space >= lengths[index]]
        if fitting:
            _, number = min(fitting)
            bins[number].append(index)
            room[number] -= lengths[index]
        else:
            bins.append([index])
            room.append(budget - lengths[index])
    return sorted(sorted(members) for members in bins)
