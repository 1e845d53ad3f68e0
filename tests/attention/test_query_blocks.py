import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdpo import Group, Row
from flexdpo.attention.mask_mods import CAUSAL, MaskKind, mask_mod_for
from flexdpo.attention.query_blocks import QueryBlock, plan_query_blocks
from tests.oracle import dense_mask

KINDS = [
    CAUSAL,
    MaskKind("sliding", 7),
    MaskKind("chunked", 9),
    MaskKind("other", function=lambda b, h, q, kv: (q - kv) % 5 != 1),
    MaskKind("other", 6, function=lambda b, h, q, kv: (q - kv < 6) & ((q + kv) % 2 == 0)),
]


def random_row(seed: int, longest: int, pad: int) -> Row:
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return rng.integers(0, 3, rng.integers(1, longest + 1)).tolist()

    groups = [Group.from_lists(ids(), [ids() for _ in range(rng.integers(1, 5))], []) for _ in range(3)]
    return Row.from_groups(groups, pad_to_multiple_of=pad)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    longest=st.sampled_from([3, 40, 300]),
    pad=st.sampled_from([1, 128]),
    max_queries=st.sampled_from([1, 7, 64, 512]),
    width=st.sampled_from([16, 512, 8192]),
    kind=st.sampled_from(KINDS),
)
def test_blocks_cover_every_query_once_and_reach_every_key(seed, longest, pad, max_queries, width, kind) -> None:
    layout = random_row(seed, longest, pad).layout
    blocks = plan_query_blocks(layout, kind, width=width, max_queries=max_queries)
    assert [query for block in blocks for query in range(block.start, block.stop)] == list(range(layout.length))
    assert all(block.stop - block.start <= max_queries for block in blocks)
    mask = dense_mask(mask_mod_for(layout, kind), 1, layout.length)[0]
    for block in blocks:
        given_keys = torch.zeros(layout.length, dtype=torch.bool)
        for start, stop in block.key_runs:
            assert start < stop
            assert not given_keys[start:stop].any()
            given_keys[start:stop] = True
        assert not mask[block.start : block.stop, ~given_keys].any()
        assert block.key_runs[-1][1] == block.stop


def test_a_late_response_skips_its_dead_siblings() -> None:
    row = Row.from_groups([Group.from_lists([1] * 500, [[2] * 400, [3] * 300, [4] * 200])])
    blocks = plan_query_blocks(row.layout, CAUSAL)
    last = blocks[-1]
    # the prompt, then the third response, without the 700 tokens of the two before it
    assert last.key_runs[0] == (0, 500)
    assert last.key_runs[1][0] == 1200
    assert last.num_keys == 700


def test_a_window_leaves_out_what_is_too_far_away() -> None:
    row = Row.from_groups([Group.from_lists([1] * 2000, [[2], [3]])])
    blocks = plan_query_blocks(row.layout, MaskKind("sliding", 100))
    assert max(block.num_keys - (block.stop - block.start) for block in blocks) <= 99


def test_scores_stay_near_the_useful_ones() -> None:
    # a prompt of 600 with two responses of 600: useful are 3 * 600^2 / 2 + 2 * 600^2 scores, dense 1800^2
    row = Row.from_groups([Group.from_lists([1] * 600, [[2] * 600, [3] * 600])])
    blocks = plan_query_blocks(row.layout, CAUSAL, width=2048)
    assert sum(block.num_scores for block in blocks) < 1.2 * 3.5 * 600**2


def test_memory_of_a_block_is_bounded_on_a_long_row() -> None:
    row = Row.from_groups([Group.from_lists([1] * 65_536, [[2], [3]])])
    blocks = plan_query_blocks(row.layout, CAUSAL)
    assert max(block.num_scores for block in blocks) <= 64 * 65_600 + (1 << 22)


@pytest.mark.parametrize("tokens", [1, 5, 17, 63, 64, 65, 130])
def test_a_row_of_any_length_ends_at_its_end(tokens: int) -> None:
    row = Row.from_groups([Group.from_lists([1] * tokens, [[2], [3]])])
    blocks = plan_query_blocks(row.layout, CAUSAL)
    assert blocks[0].start == 0
    assert blocks[-1].stop == tokens + 2
    assert all(isinstance(block, QueryBlock) for block in blocks)
