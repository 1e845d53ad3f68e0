from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flexdpo import FlexdpoError, Row, RowLayout
from flexdpo.layout.segments import Segments


def random_row(rng: np.random.Generator, pad_to: int = 1) -> Row:
    """Few tokens and many sequences: tries of several levels, one-token segments, sequences that end inside others."""
    sequences = [rng.integers(0, 3, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 9))]
    return Row.from_sequences(sequences, pad_to_multiple_of=pad_to)


def random_layouts() -> list[RowLayout]:
    rng = np.random.default_rng(3)
    single = [random_row(rng, pad_to).layout for pad_to in (1, 16) for _ in range(20)]
    return [*single, RowLayout.stack(single[:3]), RowLayout.stack(single[18:23])]


def parents_by_definition(layout: RowLayout) -> list[int]:
    """The last token before each whose subtree holds it."""
    found = []
    for row, count in enumerate(layout.num_tokens):
        ends = layout.subtree_end[row].tolist()
        for i in range(layout.length):
            above = [j for j in range(i) if ends[j] > i]
            found.append(row * layout.length + above[-1] if above and i < count else -1)
    return found


@pytest.mark.parametrize("layout", random_layouts())
def test_segments_are_the_unbranched_runs(layout: RowLayout) -> None:
    parents, segments = parents_by_definition(layout), Segments.of(layout)
    assert segments.parent_tokens().tolist() == parents
    real = [b * layout.length + s for b, count in enumerate(layout.num_tokens) for s in range(count)]
    assert segments.tokens().tolist() == real
    children = {i: [j for j in real if parents[j] == i] for i in real}
    for number, (start, length) in enumerate(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)):
        for token in range(start, start + length - 1):
            assert children[token] == [token + 1]
        # and no longer run is one
        assert len(children[start + length - 1]) != 1
        above, parent = parents[start], int(segments.parents[number])
        assert (above, parent) == (-1, -1) or above == segments.stops[parent] - 1
        assert segments.levels[number] == (0 if parent < 0 else segments.levels[parent] + 1)


@pytest.mark.parametrize("layout", random_layouts()[::3])
def test_ancestors(layout: RowLayout) -> None:
    parents = parents_by_definition(layout)
    found = Segments.of(layout).ancestors(4)
    for token in range(len(parents)):
        above = token
        for line in found:
            above = parents[above] if above >= 0 else -1
            assert line[token] == above
    assert Segments.of(layout).ancestors(0).shape == (0, len(parents))


def test_a_row_that_sees_everything_is_one_segment() -> None:
    """The wrong layout by which the probe knows how large an error is."""
    row = random_row(np.random.default_rng(0), 16)
    ends = torch.full_like(row.subtree_end, row.layout.length)
    assert len(Segments.of(RowLayout(row.position_ids, ends, row.layout.num_tokens))) == 1


def test_a_child_that_reaches_beyond_its_parent() -> None:
    layout: Any = RowLayout(torch.tensor([[0, 1, 2, 1]]), torch.tensor([[4, 3, 4, 4]]), (4,))
    with pytest.raises(FlexdpoError, match=r"token 2 of row 0 ends at 4, beyond that of its parent"):
        Segments.of(layout)
