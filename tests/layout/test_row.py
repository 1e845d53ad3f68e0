import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdpo import FlexdpoError, Group, Row, RowLayout

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)
groups = st.lists(
    st.builds(
        lambda prompt, responses: Group.from_lists(prompt, responses, [(0, k) for k in range(1, len(responses))]),
        tokens,
        st.lists(tokens, min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
)


@given(groups, st.sampled_from([1, 8, 128]))
def test_every_response_lists_its_own_tokens_as_targets(groups: list[Group], multiple: int) -> None:
    row = Row.from_groups(groups, pad_to_multiple_of=multiple)
    responses = [(group, response) for group in groups for response in group.response_ids]
    for number, (group, response) in enumerate(responses):
        targets = row.member_targets[row.member_responses == number]
        assert sorted(row.labels[targets].tolist()) == sorted(response.tolist())
        # in path order: each predictor is the token before, the first of them the prompt's last
        path = torch.from_numpy(row.response_paths[number])
        assert row.input_ids[0, path].tolist() == response.tolist()
        order = targets[row.predictors[targets].argsort()]
        assert row.labels[order].tolist() == response.tolist()
        predicted_from = row.input_ids[0, row.predictors[order]].tolist()
        assert predicted_from == [group.prompt_ids[-1].item(), *response[:-1].tolist()]


@given(groups, st.sampled_from([1, 8, 128]))
def test_padding_sees_only_itself_and_counts_for_nothing(groups: list[Group], multiple: int) -> None:
    row = Row.from_groups(groups, pad_to_multiple_of=multiple)
    length = row.layout.length
    assert length % multiple == 0
    assert length - row.num_tokens < multiple
    assert row.subtree_end[0, row.num_tokens :].tolist() == list(range(row.num_tokens + 1, length + 1))
    assert row.num_tokens <= row.unshared_tokens
    assert row.predictors.max() < row.num_tokens


def test_edges_are_numbered_through_the_row() -> None:
    row = Row.from_groups(
        [Group.from_lists([1], [[2], [3], [4]], [(2, 0)]), Group.from_lists([1], [[2], [3]], [(0, 1), (1, 0)])]
    )
    assert row.edges.tolist() == [[2, 0], [3, 4], [4, 3]]
    assert row.documents == ((0, 4), (4, 7))


def test_a_shared_beginning_is_one_target_listed_twice() -> None:
    row = Row.from_groups([Group.from_lists([1], [[5, 6], [5, 7]])])
    assert row.labels.tolist() == [5, 6, 7]
    assert row.member_targets.tolist() == [0, 1, 0, 2]


def test_rows_travel_to_workers_and_devices() -> None:
    row = Row.from_groups([Group.from_lists([1, 2], [[3], [4]])])
    row.layout.memo["mask"] = object()
    there = row.to("meta")
    assert {there.input_ids.device.type, there.layout.device.type, there.edges.device.type} == {"meta"}
    assert there.layout.memo == {}
    row.layout.memo.clear()
    torch.testing.assert_close(pickle.loads(pickle.dumps(row)).subtree_end, row.subtree_end)


@pytest.mark.parametrize("ask", [lambda x: x.ndim, lambda x: x.shape, lambda x: x[:, 0], lambda x: x.sum()])
def test_a_layout_is_no_mask_for_an_unprepared_model(ask) -> None:
    layout = Row.from_groups([Group.from_lists([1, 2], [[3], [4]])]).layout
    with pytest.raises(FlexdpoError, match=r"call flexdpo.prepare_model\(model\) once after loading"):
        ask(layout)


def test_bad_rows() -> None:
    with pytest.raises(FlexdpoError, match="a row needs at least one group"):
        Row.from_groups([])
    with pytest.raises(FlexdpoError, match="pad_to_multiple_of must be at least 1, got 0"):
        Row.from_groups([Group.from_lists([1], [[2], [3]])], pad_to_multiple_of=0)
    with pytest.raises(FlexdpoError, match=r"must both be \[B, S\], got \(1, 3\) and \(1, 4\)"):
        RowLayout(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), (3,))
    with pytest.raises(FlexdpoError, match="one count for each of 1 rows, got 2"):
        RowLayout(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64), (3, 3))


VECTORS = ("position_ids", "subtree_end", "multiplicity")


def vectors() -> dict[str, torch.Tensor]:
    layout = Row.from_groups([Group.from_lists([1, 2], [[3, 4], [3, 5, 6]])]).layout
    return {name: getattr(layout, name) for name in VECTORS}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_vectors_of_another_dtype_are_refused(name: str, dtype: torch.dtype) -> None:
    changed = {each: vector.to(dtype) if each == name else vector for each, vector in vectors().items()}
    with pytest.raises(FlexdpoError, match=rf"{name} must be int64 on cpu, got {dtype} on cpu; convert it with {name}"):
        RowLayout(**changed, num_tokens=(6,))
    elsewhere = {each: vector.to("meta") if each == name else vector for each, vector in vectors().items()}
    with pytest.raises(FlexdpoError, match=r"must be int64 on (cpu|meta), got torch.int64 on (cpu|meta)"):
        RowLayout(**elsewhere, num_tokens=(6,))


@pytest.mark.parametrize(
    ("name", "token", "value"), [("subtree_end", 2, 2), ("subtree_end", 1, 7), ("position_ids", 3, -1)]
)
def test_vectors_that_are_no_trie_are_refused(name: str, token: int, value: int) -> None:
    changed = vectors()
    changed[name][0, token] = value
    with pytest.raises(FlexdpoError, match=rf"token {token} of row 0 has subtree_end .* within the row's 6 tokens"):
        RowLayout(**changed, num_tokens=(6,))


def test_vectors_are_laid_out_as_masks_read_them() -> None:
    strided = {name: torch.stack([vector, vector], dim=-1)[..., 0] for name, vector in vectors().items()}
    assert not any(vector.is_contiguous() for vector in strided.values())
    layout = RowLayout(**strided, num_tokens=(6,))
    for name, vector in vectors().items():
        assert getattr(layout, name).is_contiguous()
        torch.testing.assert_close(getattr(layout, name), vector, rtol=0, atol=0)
