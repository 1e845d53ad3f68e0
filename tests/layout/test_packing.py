from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexdpo import FlexdpoError, Group, pack
from flexdpo.layout.packing import MIN_SHARED, best_fit_decreasing, row_lengths


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
    rows = pack(groups, 40, pad_to_multiple_of=8)
    assert sorted(id(group) for row in rows for group in row.groups) == sorted(map(id, groups))
    assert all(row.layout.length <= 40 for row in rows)
    assert len(pack(groups)) == 1
    assert pack([]) == []


def test_what_is_longer_than_the_budget_is_named() -> None:
    with pytest.raises(FlexdpoError, match=r"row 3 has 42 distinct tokens but max_tokens_per_row=41.*room for 40"):
        pack([make_group(40, "row 3")], 41, pad_to_multiple_of=8, in_pieces=False)
    with pytest.raises(FlexdpoError, match=r"row 3 has a sequence of 41 tokens.*max_tokens_per_row=41.*room for 40"):
        pack([make_group(40, "row 3")], 41, pad_to_multiple_of=8)


# --- sharing across the groups of a step -----------------------------------------------------------------------------


def related(rng: np.random.Generator, stems: int = 2, each: int = 3, stem: int = 130) -> list[Group]:
    """Groups behind a few system prompts, shuffled."""
    beginnings = [rng.integers(0, 50, stem).tolist() for _ in range(stems)]
    groups = []
    for number in range(stems * each):
        prompt = beginnings[number % stems] + rng.integers(0, 50, rng.integers(1, 9)).tolist()
        responses = [rng.integers(0, 50, rng.integers(1, 7)).tolist() for _ in range(2)]
        groups.append(Group.from_lists(prompt, responses, name=f"row {number}"))
    return [groups[i] for i in rng.permutation(len(groups))]


def distinct_tokens(groups: Sequence[Group]) -> int:
    """By definition: the distinct beginnings of all sequences."""
    return len(
        {
            tuple(ids[:end])
            for g in groups
            for s in g.sequences
            for ids in [s.tolist()]
            for end in range(1, len(ids) + 1)
        }
    )


def test_a_step_runs_every_distinct_token_once_where_beginnings_are_long(rng) -> None:
    groups = related(rng)
    (row,) = pack(groups, sharing="step")
    assert row.num_tokens == distinct_tokens(groups)
    assert len(row.documents) == 2
    (apart,) = pack(groups, sharing="group")
    assert apart.num_tokens > 1.8 * row.num_tokens
    assert sorted(map(id, row.groups)) == sorted(map(id, groups))


def test_short_common_beginnings_are_not_shared_among_groups(rng) -> None:
    groups = related(rng, stem=MIN_SHARED - 10)
    (row,) = pack(groups, sharing="step")
    assert len(row.documents) == len(groups)


@pytest.mark.parametrize("budget", [160, 200, 400])
def test_relatives_that_fit_no_row_together_are_split(rng, budget: int) -> None:
    groups = related(rng, stems=2, each=6)
    rows = pack(groups, budget, sharing="step")
    assert sorted(id(group) for row in rows for group in row.groups) == sorted(map(id, groups))
    assert all(row.layout.length <= budget for row in rows)
    assert row_lengths([groups], budget, sharing="step") == [row.num_tokens for row in rows]
    assert sum(row.num_tokens for row in rows) < sum(row.num_tokens for row in pack(groups, budget))


def test_a_relative_longer_than_the_budget_is_named(rng) -> None:
    groups = [*related(rng), make_group(150, "row 77")]
    with pytest.raises(FlexdpoError, match=r"row 77 has 152 distinct tokens but max_tokens_per_row=151"):
        pack(groups, 151, sharing="step", in_pieces=False)


def test_an_unknown_way_of_sharing_is_refused() -> None:
    with pytest.raises(FlexdpoError, match=r"sharing must be one of \('group', 'step'\), got 'stepp'.*'step'"):
        pack([make_group(3)], sharing="stepp")
