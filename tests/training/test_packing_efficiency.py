"""How much of the rows is padding, over the length profiles of six preference datasets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from flexdpo.bench.profiles import load_profiles
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import MAX_WASTE, Buckets, choose_buckets, pack, row_lengths
from flexdpo.training.run_data import FEW_LENGTHS

PAIRS = 8
BUDGETS = [None, 8192, 16384]


@cache
def batches_of(profile: str, part: int, count: int = 32) -> tuple[Sequence[Group], ...]:
    """Batches of eight pairs; another part is another draw."""
    draw = np.random.default_rng((20260, part))
    return tuple(load_profiles()[profile].pairs(PAIRS, draw, 1000) for _ in range(count))


def real_share(
    batches: Sequence[Sequence[Group]], budget: int | None, multiple: int = 1, buckets: Buckets | None = None
) -> float:
    """Real tokens as a share of the slots of all rows that are run, counted in the rows themselves."""
    rows = [row for batch in batches for row in pack(batch, budget, pad_to_multiple_of=multiple, buckets=buckets)]
    # a padding token belongs to no sequence
    real = sum(int((row.layout.multiplicity > 0).sum()) for row in rows if row.layout.multiplicity is not None)
    assert real == sum(row.num_tokens for row in rows)
    assert sum(len(row.groups) for row in rows) == PAIRS * len(batches)
    return real / sum(row.input_ids.numel() for row in rows)


@pytest.mark.parametrize("profile", load_profiles())
@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_are_filled_at_the_default_settings(profile: str, budget: int | None) -> None:
    batches = batches_of(profile, 0)
    # on a CPU rows end with their last token, on a GPU they fill whole tiles of 128
    assert real_share(batches, budget) == 1
    assert 0.97 <= real_share(batches, budget, multiple=128) < 1


@pytest.mark.parametrize("profile", load_profiles())
@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_of_few_lengths_are_filled(profile: str, budget: int | None) -> None:
    """Lengths that were chosen on a sample, as large as a run takes, hold on other batches what they promise."""
    sample = row_lengths(batches_of(profile, 1, 256), budget)
    # four lengths are not enough for any of the profiles, so a run that is not asked pads to tiles instead
    assert choose_buckets(sample, max_waste=MAX_WASTE, max_buckets=FEW_LENGTHS).waste > MAX_WASTE
    buckets = choose_buckets(sample, max_waste=MAX_WASTE)
    padded = [buckets.length_for(length, most=budget) for length in sample]
    assert 0.97 <= sum(sample) / sum(padded) == pytest.approx(1 - buckets.waste, abs=1e-3)
    # other batches bring a few rows that are longer than any of the sample
    assert real_share(batches_of(profile, 0), budget, buckets=buckets) >= 0.94
