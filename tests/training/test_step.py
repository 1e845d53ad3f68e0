"""Batches of groups: which example is which."""

from __future__ import annotations

import pytest

from flexdpo import Group
from flexdpo.training.batch import PackingCollator


@pytest.mark.parametrize("budget", [None, 8])
@pytest.mark.parametrize("sharing", ["group", "step"])
def test_a_group_that_is_given_twice_is_two_examples(budget: int | None, sharing: str) -> None:
    group, other = (Group.from_lists([1, 5], [[token, 2], [9]]) for token in (6, 7))
    reference = [[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]
    given = [group, other, group]
    batch = PackingCollator(budget, sharing=sharing).packed(given, reference)
    assert batch.reference is not None
    assert sorted(number for row in batch.rows for number in row.numbers) == [0, 1, 2]
    for row, values in zip(batch.rows, batch.reference, strict=True):
        assert values.sums.tolist() == [value for number in row.numbers for value in reference[number]]
        assert all(found is given[number] for found, number in zip(row.groups, row.numbers, strict=True))
