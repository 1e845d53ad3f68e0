import pytest

from flexdpo import FlexdpoError, Group


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
