"""Score functions against their formulas, alone and inside FlexAttention on a packed row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from flexdpo import Row
from flexdpo.attention.block_masks import build_block_mask
from flexdpo.attention.score_mods import ScoreMod, alibi_score_mod, softcap_score_mod
from tests.conftest import odd_groups
from tests.oracle import ancestor_mask

SLOPES = torch.tensor([0.5, 0.25, 0.125])


def attend(row: Row, score_mod: ScoreMod | None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and what FlexAttention makes of them; the values are one-hot, so that it returns the weights."""
    length = row.layout.length
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, len(SLOPES), length, 16, generator=generator, dtype=torch.float64)
    value = torch.eye(length, dtype=torch.float64).expand(1, len(SLOPES), length, length)
    output = flex_attention(query, key, value, score_mod=score_mod, block_mask=build_block_mask(row.layout))
    return query[0], key[0], output[0]


@pytest.fixture
def row(rng: np.random.Generator) -> Row:
    return Row.from_groups(odd_groups(rng), pad_to_multiple_of=8)


def parents(row: Row) -> torch.Tensor:
    """The token before each token, read off the layout: the nearest earlier one that has it as a descendant."""
    ends = row.subtree_end[0]
    found = [max((i for i in range(t) if ends[i] > t), default=-1) for t in range(row.layout.length)]
    return torch.tensor(found)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_softcap(row: Row) -> None:
    query, key, weights = attend(row, softcap_score_mod(0.7))
    scores = 0.7 * torch.tanh(query @ key.transpose(1, 2) / math.sqrt(16) / 0.7)
    want = scores.masked_fill(~ancestor_mask(parents(row)), -math.inf).softmax(-1)
    torch.testing.assert_close(weights, want)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_alibi_counts_logical_distance(row: Row) -> None:
    query, key, weights = attend(row, alibi_score_mod(SLOPES, row.position_ids))
    position = row.position_ids[0].double()
    mask = ancestor_mask(parents(row))

    def expected(where: torch.Tensor) -> torch.Tensor:
        distance = where[:, None] - where[None, :]
        scores = query @ key.transpose(1, 2) / math.sqrt(16) - SLOPES[:, None, None] * distance
        return scores.masked_fill(~mask, -math.inf).softmax(-1)

    torch.testing.assert_close(weights, expected(position))
    # row indices, where a sibling branch lies between, give another result
    assert (weights - expected(torch.arange(row.layout.length).double())).abs().max() > 1e-2


def test_one_softcap_is_one_function() -> None:
    """A new function for every layer would compile a new kernel for every layer."""
    assert softcap_score_mod(30.0) is softcap_score_mod(30.0)
    assert softcap_score_mod(30.0) is not softcap_score_mod(50.0)
