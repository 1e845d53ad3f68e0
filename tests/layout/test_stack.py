"""Rows side by side in one batch."""

from __future__ import annotations

import numpy as np
import torch

from flexdpo import Row, RowLayout
from flexdpo.layout.row import stack_inputs
from tests.conftest import odd_groups


def test_shorter_rows_are_padded_like_any_row(rng: np.random.Generator) -> None:
    groups = odd_groups(rng)
    short, long = Row.from_groups(groups[:1]), Row.from_groups(groups[1:], pad_to_multiple_of=8)
    # what the row would be if it had been padded when it was built
    length = long.layout.length
    padded = Row.from_groups(groups[:1], pad_to_multiple_of=length)
    inputs = stack_inputs([short, long])
    layout: RowLayout = inputs["attention_mask"]
    for name in ("position_ids", "subtree_end", "multiplicity"):
        want = torch.cat([getattr(padded.layout, name), getattr(long.layout, name)])
        assert torch.equal(getattr(layout, name), want), name
    assert torch.equal(inputs["input_ids"], torch.cat([padded.input_ids, long.input_ids]))
    assert torch.equal(inputs["position_ids"], layout.position_ids)
    assert layout.num_tokens == (short.num_tokens, long.num_tokens)
    assert inputs["use_cache"] is False


def test_stacking_leaves_the_rows_alone(rng: np.random.Generator) -> None:
    groups = odd_groups(rng)
    short, long = Row.from_groups(groups[:1]), Row.from_groups(groups[1:])
    before = short.subtree_end.clone()
    RowLayout.stack([short.layout, long.layout])
    assert torch.equal(short.subtree_end, before)


def test_a_layout_without_multiplicities_makes_a_batch_without(rng: np.random.Generator) -> None:
    row = Row.from_groups(odd_groups(rng))
    bare = RowLayout(row.position_ids, row.subtree_end, row.layout.num_tokens)
    assert RowLayout.stack([row.layout, bare]).multiplicity is None
    assert RowLayout.stack([row.layout, row.layout]).multiplicity is not None
