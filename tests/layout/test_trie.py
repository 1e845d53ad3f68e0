import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdpo import Trie
from tests.oracle import ancestor_mask

# few distinct tokens, so that sequences share beginnings, end inside one another and repeat
sequences = st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=7)


def build(token_lists: list[list[int]]) -> Trie:
    return Trie.from_sequences([np.array(tokens, dtype=np.int64) for tokens in token_lists])


def test_design_example() -> None:
    trie = build([[10, 11, 12, 20, 21], [10, 11, 12, 30, 31, 32]])
    assert trie.token_ids.tolist() == [10, 11, 12, 20, 21, 30, 31, 32]
    assert trie.subtree_end.tolist() == [8, 8, 8, 5, 5, 8, 8, 8]
    assert trie.depths.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert trie.parents.tolist() == [-1, 0, 1, 2, 3, 2, 5, 6]


@given(sequences)
def test_paths_spell_the_sequences_and_every_prefix_exists_once(token_lists: list[list[int]]) -> None:
    trie = build(token_lists)
    for tokens, path in zip(token_lists, trie.paths, strict=True):
        assert trie.token_ids[path].tolist() == tokens
        assert trie.depths[path].tolist() == list(range(len(tokens)))
        assert trie.parents[path].tolist() == [-1, *path[:-1].tolist()][: len(tokens)]
    prefixes = {tuple(tokens[: n + 1]) for tokens in token_lists for n in range(len(tokens))}
    assert len(trie) == len(prefixes)


@given(sequences)
def test_subtree_end_gives_the_ancestor_mask(token_lists: list[list[int]]) -> None:
    trie = build(token_lists)
    index = np.arange(len(trie))
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < trie.subtree_end[None, :])
    torch.testing.assert_close(torch.from_numpy(mask), ancestor_mask(torch.from_numpy(trie.parents)))


@given(sequences)
def test_siblings_keep_their_order(token_lists: list[list[int]]) -> None:
    trie = build(token_lists)
    first_token = [path[0] for path in trie.paths if path.size]
    seen = list(dict.fromkeys(first_token))
    assert seen == sorted(seen)


def test_a_thousand_nested_prefixes_do_not_recurse() -> None:
    trie = build([[1] * length for length in range(1, 1200)])
    assert len(trie) == 1199
    assert set(trie.subtree_end.tolist()) == {1199}


@pytest.mark.parametrize("token_lists", [[[]], [[], [1]]])
def test_empty_sequences_have_empty_paths(token_lists: list[list[int]]) -> None:
    assert build(token_lists).paths[0].size == 0
