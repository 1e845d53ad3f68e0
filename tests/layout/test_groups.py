from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flexdpo import FlexdpoError, Group, Row, Trie, pack, prove, response_logps


def test_a_pair_is_the_default() -> None:
    group = Group.from_lists([1, 2, 3], [[4], [5, 6]])
    assert group.edges == ((0, 1),)
    assert group.unshared_tokens == 4 + 5
    assert [sequence.tolist() for sequence in group.sequences] == [[1, 2, 3, 4], [1, 2, 3, 5, 6]]


@pytest.mark.parametrize(
    ("prompt", "responses", "edges", "message"),
    [
        ([], [[1], [2]], [(0, 1)], r"row 7: the prompt has no tokens; give it at least a BOS token"),
        ([1], [], [], r"row 7: a group needs at least one response"),
        ([1], [[1], []], [(0, 1)], r"row 7: response 1 has no tokens"),
        ([1], [[1], [2]], [(0, 2)], r"row 7: edge \(0, 2\) names response 2, but the group has responses 0 to 1"),
        ([1], [[1], [2]], [(-1, 0)], r"row 7: edge \(-1, 0\) names response -1"),
        ([1], [[1], [2]], [(1, 1)], r"row 7: edge \(1, 1\) prefers a response to itself"),
    ],
)
def test_bad_groups_are_named(prompt: list, responses: list, edges: list, message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        Group.from_lists(prompt, responses, edges, name="row 7")


# what numpy would make other tokens of, or takes for none
NO_IDS = [
    [1, -3], [1.9], [1.0], [float("nan")], [2**63], [2**64], np.array([2**63], dtype=np.uint64), [True, False], ["7"],
    [None], [[1, 2]], [[1], [2, 3]], np.array([[1, 2]]), "text", None, 5, {1: 2}, [1j], torch.ones(2),
    torch.ones(2, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("ids", NO_IDS, ids=str)
@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda ids: Group.from_lists(ids, [[1], [2]], name="row 7"), "row 7: the prompt"),
        (lambda ids: Group.from_lists([1], [[1], ids], name="row 7"), "row 7: response 1"),
        (lambda ids: Group(ids, (np.array([1]),)), "group: the prompt"),
        (lambda ids: Row.from_sequences([[1], ids]), "sequence 1"),
        (lambda ids: Row.from_documents([ids]), "document 0"),
    ],
    ids=["prompt", "response", "itself", "sequences", "documents"],
)
def test_no_token_becomes_another(make: Callable[[Any], Any], place: str, ids: Any) -> None:
    with pytest.raises(FlexdpoError, match=f"{place} must be one list of token ids, whole numbers from 0 on, got"):
        make(ids)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "uint64"])
def test_ids_of_every_whole_type_are_themselves(dtype: str) -> None:
    group = Group.from_lists(np.array([1, 2], dtype=dtype), [torch.tensor([3]), range(4, 6)])  # type: ignore[arg-type]
    assert Row.from_groups([group]).input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert all(ids.dtype == np.int64 for ids in (group.prompt_ids, *group.response_ids))
    with pytest.raises(FlexdpoError, match="sequence 0 must be one list of token ids"):
        Trie.from_sequences([[1.9]])  # type: ignore[list-item]


GROUP = Group.from_lists([1], [[2], [3]])
anything: Any = None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Group.from_lists([1], anything), "response 0 and further ones must be given as a list, got NoneType"),
        *((lambda e=edges: Group.from_lists([1], [[2], [3]], e), r"edges must be pairs \(chosen, rejected\)")
          for edges in ([0, 1], None, 3, [(0, 1, 1)], [(0, 0.5)], ["ab"])),
        *((lambda g=groups, call=call: call(g), r"expected a list of flexdpo\.Group, got")
          for groups in ("x", GROUP, None, 3, [GROUP, None], [[1, 2]])
          for call in (Row.from_groups, pack, lambda groups: prove(anything, groups))),
        (lambda: prove(anything, []), "prove needs at least one group, got none"),
        (lambda: response_logps(anything, anything), r"takes one flexdpo\.Row, .* got NoneType"),
        (lambda: response_logps(anything, GROUP), r"takes one flexdpo\.Row, .* got Group"),  # type: ignore[arg-type]
        *((lambda m=multiple, call=call: call([GROUP], pad_to_multiple_of=m), "pad_to_multiple_of must be a whole")
          for multiple in (8.0, None, "8", True) for call in (Row.from_groups, pack)),
        (lambda: pack([GROUP], pad_to_multiple_of=0), "pad_to_multiple_of must be at least 1, got 0"),
        (lambda: pack([GROUP], 2.5), r"max_tokens_per_row must be a whole number, at least 1, got float \(2\.5\)"),
        *((lambda v=limits, call=call: call([GROUP], limits=v), "limits must be increasing numbers of tokens")
          for limits in (2, ["x"], None, [8, 4], [0], [2.5], "ab") for call in (Row.from_groups, pack)),
        *((lambda v=lengths: Row.from_lengths(v), "lengths must be a list, one for each document")
          for lengths in (5, None, {1: 2})),
        (lambda: Row.from_sequences(anything), "sequence 0 and further ones must be given as a list, got NoneType"),
    ],
)  # fmt: skip
def test_one_clear_error(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        wrong()
