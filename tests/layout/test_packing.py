import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexdpo import FlexdpoError, Group, pack_groups
from flexdpo.layout.packing import best_fit_decreasing


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(40, 90))
def test_every_item_lands_in_one_bin_that_holds_it(lengths: list[int], budget: int) -> None:
    bins = best_fit_decreasing(lengths, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= budget for members in bins)
    # two bins that are both at most half full would have been one
    assert sum(sum(lengths[index] for index in members) <= budget // 2 for members in bins) <= 1


def make_group(length: int, name: str = "group") -> Group:
    return Group.from_lists([1] * length, [[2], [3]], name=name)


def test_rows_hold_every_group_once_and_respect_the_budget() -> None:
    groups = [make_group(length) for length in (3, 30, 8, 14, 9, 2, 27)]
    rows = pack_groups(groups, 40, pad_to_multiple_of=8)
    assert sorted(id(group) for row in rows for group in row.groups) == sorted(map(id, groups))
    assert all(row.layout.length <= 40 for row in rows)
    assert len(pack_groups(groups)) == 1
    assert pack_groups([]) == []


def test_a_group_longer_than_the_budget_is_named() -> None:
    with pytest.raises(FlexdpoError, match=r"row 3 has 42 distinct tokens but max_tokens_per_row=41.*room for 40"):
        pack_groups([make_group(40, "row 3")], 41, pad_to_multiple_of=8)
