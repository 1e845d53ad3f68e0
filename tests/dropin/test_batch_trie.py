"""The trie of a padded batch, against the definition and against the trie that walks over lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexdpo.dropin import batch_trie
from flexdpo.dropin.batch_trie import BatchTrie
from flexdpo.errors import FlexdpoError
from flexdpo.layout.trie import Trie

SIDES = ["right", "left", "both"]


def random_sequences(seed: int) -> list[list[int]]:
    """Sequences over three tokens, which meet at every depth; some equal, some inside others, one empty."""
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 3, rng.integers(1, 9)).tolist() for _ in range(rng.integers(2, 9))]
    for _ in range(rng.integers(0, 4)):
        known = sequences[rng.integers(len(sequences))]
        sequences.append(known[: rng.integers(1, len(known) + 1)] + rng.integers(0, 3, rng.integers(0, 4)).tolist())
    return [*sequences, []] if seed % 3 == 0 else sequences


def pad(sequences: list[list[int]], side: str, filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and their mask; the filler is a token that sequences use too."""
    columns = max(map(len, sequences)) + 2
    ids = torch.full((len(sequences), columns), filler)
    mask = torch.zeros_like(ids)
    for number, sequence in enumerate(sequences):
        room = columns - len(sequence)
        start = {"right": 0, "left": room, "both": (3 * number) % (room + 1)}[side]
        ids[number, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[number, start : start + len(sequence)] = 1
    return ids, mask


def find_trie(ids: torch.Tensor, mask: torch.Tensor, min_prefix: int = 1) -> BatchTrie:
    batch = batch_trie.sort_batch(ids, batch_trie.row_spans(mask), min_prefix=min_prefix)
    return batch_trie.trie_of(batch, int(batch.num_tokens))


def paths(trie: BatchTrie) -> list[list[int]]:
    """The tokens of each row in the trie, by index."""
    return [row[row >= 0].tolist() for row in trie.nodes]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("seed", range(12))
def test_every_token_sees_the_beginning_of_its_row_and_nothing_else(seed: int, side: str) -> None:
    sequences = random_sequences(seed)
    ids, mask = pad(sequences, side)
    trie = find_trie(ids, mask)
    assert torch.equal(trie.nodes >= 0, mask != 0)
    tokens, ends = ids.reshape(-1)[trie.sources], trie.subtree_end.tolist()
    for sequence, path in zip(sequences, paths(trie), strict=True):
        assert tokens[path].tolist() == sequence
        assert trie.depths[path].tolist() == list(range(len(sequence)))
        for depth, query in enumerate(path):
            assert [key for key in range(len(trie)) if key <= query < ends[key]] == path[: depth + 1]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_trie_of_the_lists(seed: int, side: str) -> None:
    """As many tokens, and two places share one exactly where the other trie has them share one."""
    sequences = random_sequences(seed)
    trie = find_trie(*pad(sequences, side))
    other = Trie.from_sequences([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    assert len(trie) == len(other)
    mine = np.concatenate([np.asarray(path, dtype=np.int64) for path in paths(trie)])
    theirs = np.concatenate(other.paths)
    assert len({*zip(mine.tolist(), theirs.tolist(), strict=True)}) == len(trie)
    counts = np.bincount(theirs, minlength=len(other))
    assert trie.multiplicity[mine].tolist() == counts[theirs].tolist()


def test_a_small_batch_worked_by_hand() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [4, 1, 0, 0]])
    trie = find_trie(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]))
    assert ids.reshape(-1)[trie.sources].tolist() == [4, 1, 5, 6, 7, 8, 9]
    assert trie.depths.tolist() == [0, 1, 0, 1, 2, 3, 2]
    assert trie.subtree_end.tolist() == [2, 2, 7, 7, 6, 6, 7]
    assert trie.multiplicity.tolist() == [1, 1, 2, 2, 1, 1, 1]
    assert trie.nodes.tolist() == [[2, 3, 4, 5], [2, 3, 6, -1], [0, 1, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    ids, mask = pad(random_sequences(1), "left")
    assert torch.equal(find_trie(ids, mask.to(dtype)).nodes, find_trie(ids, mask).nodes)


def test_short_beginnings_are_not_shared() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [1, 8, 9, 9]])
    tries = [find_trie(ids, torch.ones_like(ids), least) for least in (1, 2, 3, 4, 5)]
    assert [len(trie) for trie in tries] == [10, 11, 13, 16, 16]
    trie = tries[2]
    first, second = paths(trie)[:2]
    assert first[:3] == second[:3]
    # no token of the row that shares nothing is seen from elsewhere
    third = paths(trie)[2]
    assert trie.subtree_end[third].tolist() == [third[-1] + 1] * 4


def test_rows_are_compared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = pad(random_sequences(2), "right")
    want = find_trie(ids, mask)
    monkeypatch.setattr(batch_trie, "_COMPARED", 1)
    got = find_trie(ids, mask)
    for name in ("sources", "depths", "subtree_end", "multiplicity", "nodes"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_padding_between_tokens_shows() -> None:
    assert batch_trie.row_spans(torch.tensor([[1, 0, 1], [1, 1, 1]])).gaps
    assert not batch_trie.row_spans(torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]])).gaps


def test_input_ids_of_another_shape() -> None:
    with pytest.raises(FlexdpoError, match=r"input_ids must be \[N, T\] with at least one row, got \[3\]"):
        batch_trie.sort_batch(torch.ones(3, dtype=torch.int64), batch_trie.row_spans(torch.ones(1, 3)))


class Counting(TorchDispatchMode):
    """Counts the operations that reach the device, and how often it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.waits += "local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_the_work_is_whole_tensor_operations() -> None:
    """As many operations for a large batch as for a small one: nothing is done token by token or row by row."""
    counts = []
    for rows, columns in [(3, 8), (24, 300)]:
        ids = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(0))
        with Counting() as counting:
            spans = batch_trie.row_spans(torch.ones_like(ids))
            batch = batch_trie.sort_batch(ids, spans)
            tokens = int(batch.num_tokens)
            batch_trie.trie_of(batch, tokens)
        counts.append(counting.operations)
        assert counting.waits == 1
    assert counts[0] == counts[1]
