"""Means over pairs and labels, and what of a batch is left without the repeats that fill it up."""

import pytest
import torch
from accelerate import Accelerator

from flexdpo import Group
from flexdpo.training.batch import PackingCollator
from flexdpo.training.step import MeanMetrics


def test_means_are_over_values() -> None:
    metrics = MeanMetrics()
    metrics.add({"kl": torch.tensor([5.0]), "rewards/chosen": torch.tensor([1.0, 9.0]), "logps/chosen": torch.ones(0)})
    metrics.add({"rewards/chosen": torch.tensor([2.0])})
    assert metrics.collect(Accelerator(cpu=True)) == {"kl": 5.0, "rewards/chosen": 4.0}
    assert metrics.collect(Accelerator(cpu=True)) == {}


@pytest.mark.parametrize("budget", [None, 12])
@pytest.mark.parametrize("pairs", [False, True])
def test_some_examples_of_a_batch(budget: int | None, pairs: bool) -> None:
    groups = [
        Group.from_lists([5] * 6, [[6], [7], [8]], [(0, 1), (0, 2)]),
        Group.from_lists([9], [[6], [7]], [(0, 1)]),
        Group.from_lists([10] * 7, [[6], [7]], [(1, 0)]),
    ]
    reference = [[1.0, 2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    of_pairs = [[[1.0, 2.0], [1.0, 3.0]], [[4.0, 5.0]], [[7.0, 6.0]]] if pairs else None
    collator = PackingCollator(max_tokens_per_row=budget)
    whole = collator.packed(groups, reference, of_pairs)
    kept, values, kept_pairs = whole.only([0, 2])
    assert [group.prompt_ids.tolist() for group in kept] == [[5] * 6, [10] * 7]
    assert values == [reference[0], reference[2]]
    assert kept_pairs == (None if of_pairs is None else [of_pairs[0], of_pairs[2]])
    again = collator.packed(kept, values, kept_pairs)
    assert again.totals.pairs == 3
    assert torch.cat([part.sums for part in again.reference or ()]).sum() == 19
