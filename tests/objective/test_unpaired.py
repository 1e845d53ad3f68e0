"""Labels one by one, and responses to other prompts for the KL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexdpo import FlexdpoError, Group, Row
from flexdpo.objective.unpaired import LabelledGroup, labelled_responses, labels_of, with_unrelated_responses

PAIR = Group.from_lists([3], [[4], [5, 5]], name="row 0")
SINGLE = LabelledGroup(np.array([6]), (np.array([7, 7]),), labels=(False,), name="row 1")


def test_edges_label_both_of_their_ends() -> None:
    assert labels_of(PAIR) == [(0, True), (1, False)]
    assert labels_of(SINGLE) == [(0, False)]
    twice = Group.from_lists([3], [[4], [5], [6]], [(0, 1), (0, 2)])
    assert labels_of(twice) == [(0, True), (1, False), (0, True), (2, False)]


def test_every_prompt_gets_responses_to_others_and_shares_its_own() -> None:
    groups = with_unrelated_responses([PAIR, SINGLE])
    assert [[response.tolist() for response in group.response_ids] for group in groups] == [
        [[4], [5, 5], [7, 7], [7, 7]],
        [[7, 7], [5, 5]],
    ]
    assert [group.unrelated for group in groups] == [(2, 3), (1,)]
    assert groups[0].edges == ((0, 1),)
    assert groups[1].labels == (False, None)
    row = Row.from_groups(groups)
    assert row.num_tokens == (1 + 1 + 2 + 2) + (1 + 2 + 2)
    # the nearest before it, the one before that, and from the first on to the last
    three = [Group.from_lists([n], [[10 * n], [10 * n + 1]]) for n in (1, 2, 3)]
    added = [[r.tolist() for r in group.response_ids[2:]] for group in with_unrelated_responses(three)]
    assert added == [[[31], [30]], [[11], [10]], [[21], [20]]]
    found = labelled_responses(row.groups, row.edges.device)
    assert found.responses.tolist() == [0, 1, 4]
    assert found.desirable.tolist() == [True, False, False]
    assert (found.chosen.tolist(), found.rejected.tolist()) == ([0], [1, 4])
    assert found.unrelated.tolist() == [2, 3, 5]


@pytest.mark.parametrize("batch", [[SINGLE], [PAIR], [SINGLE, SINGLE]])
def test_responses_to_the_same_prompt_are_not_unrelated(batch: list[Group]) -> None:
    with pytest.raises(FlexdpoError, match="labelled responses answer the same prompt; use a larger per_device_train"):
        with_unrelated_responses(batch)


def test_another_row_of_the_same_prompt_is_passed_over() -> None:
    rows = [
        LabelledGroup(np.array([prompt]), (np.array([response]),), labels=(good,))
        for prompt, response, good in ((1, 10, True), (2, 20, True), (2, 21, False), (2, 22, True))
    ]
    added = [group.response_ids[1].tolist() for group in with_unrelated_responses(rows)]
    assert added == [[22], [10], [10], [10]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": (True, False)}, "row 3: 2 labels for 1 responses; give one for each"),
        ({"unrelated": (1,)}, "row 3: unrelated response 1 is missing, the group has responses 0 to 0"),
        ({"labels": (True,), "unrelated": (0,)}, "row 3: response 0 is unrelated to the prompt and labelled"),
    ],
)
def test_labels_that_do_not_fit(fields: Any, message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        LabelledGroup(np.array([3]), (np.array([4]),), name="row 3", **fields)


def test_labels_and_edges_exclude_each_other() -> None:
    with pytest.raises(FlexdpoError, match="row 3: has both labels and preferences; keep one of them"):
        LabelledGroup(np.array([3]), (np.array([4]), np.array([5])), ((0, 1),), "row 3", labels=(True, False))
