import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdpo import Group, Row
from flexdpo.attention.mask_mods import CAUSAL, MaskKind, mask_mod_for
from flexdpo.attention.oracle import dense_mask
from flexdpo.attention.query_blocks import Piece, plan_pieces

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
def test_pieces_cover_every_query_once_and_reach_every_key(seed, longest, pad, max_queries, width, kind) -> None:
    layout = random_row(seed, longest, pad).layout
    pieces = plan_pieces(layout, kind, width=width, max_queries=max_queries)
    assert [query for piece in pieces for query in range(piece.start, piece.stop)] == list(range(layout.length))
    assert all(piece.stop - piece.start <= max_queries for piece in pieces)
    mask = dense_mask(mask_mod_for(layout, kind), 1, layout.length)[0]
    for piece in pieces:
        given_keys = torch.zeros(layout.length, dtype=torch.bool)
        for start, stop in piece.key_runs:
            assert start < stop
            assert not given_keys[start:stop].any()
            given_keys[start:stop] = True
        assert not mask[piece.start : piece.stop, ~given_keys].any()
        assert piece.key_runs[-1][1] == piece.stop


def test_a_late_response_skips_its_dead_siblings() -> None:
    row = Row.from_groups([Group.from_lists([1] * 500, [[2] * 400, [3] * 300, [4] * 200])])
    pieces = plan_pieces(row.layout, CAUSAL)
    last = pieces[-1]
    # the prompt, then the third response, without the 700 tokens of the two before it
    assert last.key_runs[0] == (0, 500)
    assert last.key_runs[1][0] == 1200
    assert last.num_keys == 700


def test_a_window_leaves_out_what_is_too_far_away() -> None:
    row = Row.from_groups([Group.from_lists([1] * 2000, [[2], [3]])])
    pieces = plan_pieces(row.layout, MaskKind("sliding", 100))
    assert max(piece.num_keys - (piece.stop - piece.start) for piece in pieces) <= 99


def test_scores_stay_near_the_useful_ones() -> None:
    # a prompt of 600 with two responses of 600: useful are 3 * 600^2 / 2 + 2 * 600^2 scores, dense 1800^2
    row = Row.from_groups([Group.from_lists([1] * 600, [[2] * 600, [3] * 600])])
    pieces = plan_pieces(row.layout, CAUSAL, width=2048)
    assert sum(piece.num_scores for piece in pieces) < 1.2 * 3.5 * 600**2


def test_memory_of_a_piece_is_bounded_on_a_long_row() -> None:
    row = Row.from_groups([Group.from_lists([1] * 65_536, [[2], [3]])])
    pieces = plan_pieces(row.layout, CAUSAL)
    assert max(piece.num_scores for piece in pieces) <= 64 * 65_600 + (1 << 22)


@pytest.mark.parametrize("tokens", [1, 5, 17, 63, 64, 65, 130])
def test_a_row_of_any_length_ends_at_its_end(tokens: int) -> None:
    row = Row.from_groups([Group.from_lists([1] * tokens, [[2], [3]])])
    pieces = plan_pieces(row.layout, CAUSAL)
    assert pieces[0].start == 0
    assert pieces[-1].stop == tokens + 2
    assert all(isinstance(piece, Piece) for piece in pieces)
