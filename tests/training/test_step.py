"""Batches of groups: which example is which."""

from __future__ import annotations

import pytest

from flexdpo import Group
from flexdpo.training.batch import PackedBatch


@pytest.mark.parametrize("budget", [None, 8])
@pytest.mark.parametrize("sharing", ["group", "step"])
def test_a_group_that_is_given_twice_is_two_examples(budget: int | None, sharing: str) -> None:
    group, other = (Group.from_lists([1, 5], [[token, 2], [9]]) for token in (6, 7))
    reference = [[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]
    given = [group, other, group]
    batch = PackedBatch.from_groups(given, max_tokens_per_row=budget, sharing=sharing, reference=reference)
    assert batch.reference is not None
    assert batch.members is not None
    assert sorted(number for members in batch.members for number in members) == [0, 1, 2]
    for row, members, values in zip(batch.rows, batch.members, batch.reference, strict=True):
        assert values.sums.tolist() == [value for number in members for value in reference[number]]
        assert all(found is given[number] for found, number in zip(row.groups, members, strict=True))
