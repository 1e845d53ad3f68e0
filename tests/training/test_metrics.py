"""Means over pairs and labels, without the repeats that fill up a last batch."""

import pytest
import torch
from accelerate import Accelerator

from flexdpo import Group
from flexdpo.objective.unpaired import LabelledGroup, with_unrelated_responses
from flexdpo.training.metrics import MeanMetrics
from flexdpo.training.step import PackedBatch


def test_values_of_repeats_do_not_count() -> None:
    metrics = MeanMetrics()
    values = {"kl": torch.tensor([5.0]), "rewards/chosen": torch.tensor([1.0, 9.0]), "logps/rejected": torch.ones(3)}
    metrics.add(values, {"chosen": torch.tensor([True, False]), "rejected": torch.tensor([False, False, True])})
    assert metrics.collect(Accelerator(cpu=True)) == {"kl": 5.0, "rewards/chosen": 1.0, "logps/rejected": 1.0}


@pytest.mark.parametrize("budget", [None, 12])
def test_each_logged_value_knows_its_example(budget: int | None) -> None:
    pairs = [
        Group.from_lists([5] * 6, [[6], [7], [8]], [(0, 1), (0, 2)]),
        Group.from_lists([9], [[6], [7]], [(0, 1)]),
        Group.from_lists([10] * 7, [[6], [7]], [(1, 0)]),
    ]
    batch = PackedBatch.from_groups(pairs, max_tokens_per_row=budget)
    number_of = {id(group): number for number, group in enumerate(pairs)}
    order = [number_of[id(group)] for row in batch.rows for group in row.groups for _ in group.edges]
    assert batch.logged_examples(by_label=False)["margins"] == order
    labelled = [
        LabelledGroup(group.prompt_ids, group.response_ids[:1], (), f"row {number}", (number != 1,))
        for number, group in enumerate(pairs)
    ]
    labels = PackedBatch.from_groups(with_unrelated_responses(labelled), max_tokens_per_row=budget)
    found = labels.logged_examples(by_label=True)
    assert sorted(found["chosen"]) == [0, 2]
    assert found["rejected"] == [1]
    assert "kl" not in found
