"""Pairs brought together by prompt: every preference kept, every response once, the same gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdpo import FlexdpoError, Row, prepare_model, response_logps
from flexdpo.data.regroup import regroup_by_prompt
from flexdpo.data.tokenize import group_from_row, tokenize_preferences
from flexdpo.objective.batch import BatchTotals
from flexdpo.objective.objective import Objective
from tests.conftest import build_model, preference_rows


def table(*rows: tuple[list[int], list[int], list[int]]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt_ids": prompt, "response_ids": [chosen, rejected], "edges": [[0, 1]], "row": number}
            for number, (prompt, chosen, rejected) in enumerate(rows)
        ]
    )


def preferences_of(dataset: Dataset) -> Counter[Any]:
    """Every preference by its tokens, with how often it stands there."""
    return Counter(
        (tuple(row["prompt_ids"]), tuple(row["response_ids"][chosen]), tuple(row["response_ids"][rejected]))
        for row in dataset
        for chosen, rejected in row["edges"]
    )


def test_rows_with_one_prompt_become_one_group() -> None:
    got = regroup_by_prompt(table(([3], [4], [5]), ([6], [4], [5]), ([3], [5], [7, 8]), ([3], [4], [5])))
    assert got.to_list() == [
        {
            "prompt_ids": [3],
            "response_ids": [[4], [5], [7, 8]],
            "edges": [[0, 1], [1, 2], [0, 1]],
            "row": 0,
            "source_rows": [0, 2, 3],
        },
        {"prompt_ids": [6], "response_ids": [[4], [5]], "edges": [[0, 1]], "row": 1, "source_rows": [1]},
    ]


ids = st.lists(st.integers(3, 5), min_size=1, max_size=2)


@given(
    st.lists(st.tuples(ids, ids, ids).filter(lambda t: t[1] != t[2]), min_size=1, max_size=20),
    st.none() | st.integers(2, 5),
)
@settings(max_examples=40, deadline=None)
def test_no_preference_is_lost_or_invented(rows: list[Any], limit: int | None) -> None:
    before = table(*rows)
    after = regroup_by_prompt(before, max_responses=limit)
    assert preferences_of(after) == preferences_of(before)
    assert sorted(number for row in after for number in row["source_rows"]) == list(range(len(rows)))
    for row in after:
        responses = [tuple(response) for response in row["response_ids"]]
        assert len(set(responses)) == len(responses)
        assert limit is None or len(responses) <= limit
    if limit is None:
        assert len({tuple(row["prompt_ids"]) for row in after}) == len(after)


def test_a_tokenised_dataset_goes_in_and_groups_come_out(tokenizer: Any) -> None:
    rows = preference_rows(5)
    for row in rows[:4]:
        row["prompt"] = rows[0]["prompt"]
    rows[1]["chosen"], rows[3]["rejected"] = rows[0]["chosen"], rows[2]["chosen"]
    before = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None).dataset
    after = regroup_by_prompt(before)
    assert [len(row["response_ids"]) for row in after] == [6, 2]
    groups = [group_from_row(row) for row in after]
    assert sum(len(group.edges) for group in groups) == 5
    assert Row.from_groups(groups).num_tokens < Row.from_groups([group_from_row(row) for row in before]).num_tokens


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_down", "sft", "simpo"])
def test_gradients_are_those_of_the_separate_rows(name: str) -> None:
    before = table(([3, 9], [4, 4, 6], [5]), ([3, 9], [5], [7, 8]), ([3, 9], [4, 4, 6], [7, 8]), ([11], [4], [5, 5]))
    model, reference = (prepare_model(build_model("gpt2", "flexdpo", seed)) for seed in (0, 1))
    objective = Objective((name,))

    def gradients(dataset: Dataset) -> list[torch.Tensor]:
        groups = [group_from_row(row) for row in dataset]
        row, totals = Row.from_groups(groups), BatchTotals.of(groups)
        with torch.no_grad():
            ref = response_logps(reference, row) if objective.needs_reference else None
        objective.loss([response_logps(model, row)], [ref], [row], totals).loss.backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    want = gradients(before)
    scale = max(float(g.abs().max()) for g in want)
    for got, wanted in zip(gradients(regroup_by_prompt(before)), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9 * scale)


def test_what_cannot_be_regrouped() -> None:
    with pytest.raises(
        FlexdpoError, match="needs a tokenised dataset; column 'prompt_ids' is missing among prompt, ch"
    ):
        regroup_by_prompt(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    with pytest.raises(FlexdpoError, match="max_responses must be at least 2, since a pair has two responses; got 1"):
        regroup_by_prompt(table(([3], [4], [5])), max_responses=1)
    with pytest.raises(FlexdpoError, match="row 1: chosen and rejected are the same tokens"):
        regroup_by_prompt(table(([3], [4], [5]), ([3], [4], [4])))
    with pytest.raises(
        FlexdpoError, match="column 'ref_response_logps' holds reference values of the rows as they are"
    ):
        regroup_by_prompt(table(([3], [4], [5])).add_column("ref_response_logps", [[0.0, 0.0]]))
