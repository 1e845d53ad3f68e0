from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdpo import FlexdpoError, Group, pack
from flexdpo.layout.packing import Buckets, choose_buckets, row_lengths


def padded_total(lengths, buckets) -> int:
    return sum(min(bucket for bucket in buckets if bucket >= length) for length in lengths)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.sampled_from([0.01, 0.1, 0.3]), st.integers(1, 4))
def test_no_fewer_buckets_would_do_and_no_others_would_waste_less(lengths, max_waste, max_buckets) -> None:
    chosen = choose_buckets(lengths, max_waste=max_waste, max_buckets=max_buckets, multiple=4)
    sizes = sorted({-(-length // 4) * 4 for length in lengths})
    best = {
        count: min(padded_total(lengths, [*part, sizes[-1]]) for part in combinations(sizes[:-1], count - 1))
        for count in range(1, min(max_buckets, len(sizes)) + 1)
    }
    total = padded_total(lengths, chosen.lengths)
    assert total == best[len(chosen.lengths)]
    assert chosen.waste == pytest.approx(1 - sum(lengths) / total)
    enough = [count for count in best if 1 - sum(lengths) / best[count] <= max_waste]
    if enough:
        assert len(chosen.lengths) == enough[0]
    else:
        assert total == min(best.values())


def test_rows_filled_to_a_budget_waste_little_in_few_lengths() -> None:
    rng = np.random.default_rng(0)
    # full rows, and the last row of each step
    lengths = [*rng.integers(7900, 8193, 300).tolist(), *rng.integers(500, 8193, 60).tolist()]
    chosen = choose_buckets(lengths)
    assert chosen.waste <= 0.03
    assert len(chosen.lengths) <= 8
    assert all(length % 128 == 0 for length in chosen.lengths)


def test_a_row_longer_than_all_seen_before_still_comes_in_few_lengths() -> None:
    buckets = Buckets((1024, 4096), 128, 0.0)
    assert buckets.length_for(1) == 1024
    assert buckets.length_for(1024) == 1024
    assert buckets.length_for(1025) == 4096
    assert {buckets.length_for(tokens) for tokens in range(4097, 6145)} == {4608, 5120, 5632, 6144}


def test_padding_does_not_exceed_the_budget() -> None:
    buckets = Buckets((1024, 4096), 128, 0.0)
    assert buckets.length_for(1500, most=2000) == 1920
    assert buckets.length_for(1950, most=2000) == 2048


def groups() -> list[Group]:
    rng = np.random.default_rng(3)
    return [Group.from_lists(rng.integers(0, 50, n).tolist(), [[60] * n, [61] * 9]) for n in rng.integers(5, 90, 30)]


def test_rows_are_padded_to_their_bucket() -> None:
    lengths = row_lengths([groups()[:10], groups()[10:]], 512)
    assert lengths == [row.num_tokens for part in (groups()[:10], groups()[10:]) for row in pack(part, 512)]
    buckets = choose_buckets(lengths, max_buckets=2, multiple=32)
    rows = pack(groups(), 512, buckets=buckets)
    assert {row.layout.length for row in rows} <= set(buckets.lengths) | {512}
    assert sum(row.num_tokens for row in rows) == sum(row.num_tokens for row in pack(groups(), 512))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": []}, "needs the lengths of some rows"),
        ({"lengths": [3], "max_waste": 0}, "max_waste, max_buckets and multiple must be above 0, got 0"),
    ],
)
def test_wrong_arguments_raise(arguments, message) -> None:
    with pytest.raises(FlexdpoError, match=message):
        choose_buckets(**arguments)
