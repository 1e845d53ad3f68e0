import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flexdpo import Group, Row, RowLayout
from flexdpo.attention.block_masks import build_block_mask, classify_tiles
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from tests.oracle import dense_mask

FIELDS = [
    f"{full}{axis}_{what}" for full in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
]


@st.composite
def rows(draw: st.DrawFn) -> Row:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    longest = draw(st.sampled_from([4, 40, 300]))

    def ids() -> list[int]:
        return rng.integers(0, draw(st.sampled_from([2, 50])), rng.integers(1, longest + 1)).tolist()

    groups = [
        Group.from_lists(ids(), [ids() for _ in range(draw(st.integers(2, 4)))]) for _ in range(draw(st.integers(1, 4)))
    ]
    return Row.from_groups(groups, pad_to_multiple_of=draw(st.sampled_from([1, 16, 128])))


@settings(max_examples=100, deadline=None)
@given(rows(), st.sampled_from([16, 128]))
def test_the_direct_mask_is_create_block_mask(row: Row, block_size: int) -> None:
    require_the_mask_of_torch(row, block_size)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(rows(), st.sampled_from([16, 128]))
def test_the_direct_mask_is_create_block_mask_over_more_rows(row: Row, block_size: int) -> None:
    require_the_mask_of_torch(row, block_size)


def require_the_mask_of_torch(row: Row, block_size: int) -> None:
    got = build_block_mask(row.layout, block_size=block_size)
    length = row.layout.length
    want = create_block_mask(got.mask_mod, 1, 1, length, length, device="cpu", BLOCK_SIZE=block_size)
    assert got.seq_lengths == want.seq_lengths
    assert got.BLOCK_SIZE == want.BLOCK_SIZE
    for field in FIELDS:
        torch.testing.assert_close(getattr(got, field), getattr(want, field), msg=field)
    assert_same_layout(got, want)


KINDS = {
    "causal": CAUSAL,
    "sliding": MaskKind("sliding", 20),
    "chunked": MaskKind("chunked", 32),
    "other": MaskKind("other", function=lambda b, h, q, kv: (q + kv) % 3 > 0),
    "other with a reach": MaskKind("other", 40, function=lambda b, h, q, kv: q - kv < 40),
}


def assert_same_layout(got: BlockMask, want: BlockMask) -> None:
    """Dtype, shape and strides: kernels read the lists with the strides that torch's own builder gives them."""
    for field in FIELDS:
        ours, torchs = getattr(got, field), getattr(want, field)
        assert (ours.dtype, ours.shape, ours.stride()) == (torchs.dtype, torchs.shape, torchs.stride()), field
        assert ours.is_contiguous(), field


def stacked(rows: int, padding: int) -> RowLayout:
    rng = np.random.default_rng(rows)
    return RowLayout.stack(
        [
            Row.from_groups(
                [Group.from_lists(rng.integers(0, 9, 60 + 70 * row).tolist(), [[2] * 150, [3] * (90 + row)])],
                pad_to_multiple_of=padding,
            ).layout
            for row in range(rows)
        ]
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("padding", [1, 128], ids=["ragged", "whole tiles"])
def test_the_lists_lie_in_memory_as_torch_lays_them(kind: MaskKind, rows: int, padding: int) -> None:
    layout = stacked(rows, padding)
    got = build_block_mask(layout, kind, block_size=32)
    want = create_block_mask(got.mask_mod, rows, 1, layout.length, layout.length, device="cpu", BLOCK_SIZE=32)
    assert_same_layout(got, want)
    # with a window, a tile may count as partial without a pair in it; each list must name each tile once all the same
    for name in ("", "full_"):
        keys = tiles_of(getattr(got, f"{name}kv_num_blocks"), getattr(got, f"{name}kv_indices"))
        queries = tiles_of(getattr(got, f"{name}q_num_blocks"), getattr(got, f"{name}q_indices"))
        torch.testing.assert_close(keys, queries.transpose(-1, -2))
        assert (tiles_of(getattr(want, f"{name}kv_num_blocks"), getattr(want, f"{name}kv_indices")) <= keys).all() or (
            name == "full_" and kind.name != "causal"
        )


def tiles_of(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The tiles that a kernel would visit, which reads the lists with a stride of one."""
    columns = indices.shape[-1]
    read = indices.as_strided(indices.shape, torch.empty(indices.shape).stride())
    listed = torch.arange(columns) < counts[..., None]
    return torch.zeros(*indices.shape, dtype=torch.bool).scatter_(-1, read.long(), listed)


def test_a_row_of_transposed_vectors_gives_the_same_lists() -> None:
    layout = stacked(3, 1)
    turned = RowLayout(layout.position_ids, layout.subtree_end, layout.num_tokens)
    # past the constructor, which would lay them out
    turned.position_ids, turned.subtree_end = layout.position_ids.T.contiguous().T, layout.subtree_end.T.contiguous().T
    assert not turned.subtree_end.is_contiguous()
    for kind in KINDS.values():
        got, want = build_block_mask(turned, kind), build_block_mask(layout, kind)
        assert_same_layout(got, want)
        for field in FIELDS:
            torch.testing.assert_close(getattr(got, field), getattr(want, field), msg=field)


@settings(max_examples=100, deadline=None)
@given(rows(), st.sampled_from(["sliding", "chunked"]), st.integers(1, 60))
def test_windowed_tiles_miss_nothing_and_full_means_full(row: Row, name, size: int) -> None:
    kind, block = MaskKind(name, size), 16
    tiles = classify_tiles(row.layout, kind, block)
    length = row.layout.length
    mask = dense_mask(build_block_mask(row.layout, kind).mask_mod, 1, length)[0]
    missing = -length % block
    padded = torch.nn.functional.pad(mask, (0, missing, 0, missing))
    cells = padded.view(len(padded) // block, block, -1, block).transpose(1, 2)
    some, every = cells.any(-1).any(-1), cells.all(-1).all(-1)
    assert not (some & ~tiles.non_empty[0]).any()
    torch.testing.assert_close(tiles.full[0], every)


def test_an_unknown_mask_function_is_evaluated_everywhere() -> None:
    row = Row.from_groups([Group.from_lists([1] * 300, [[2] * 40, [3] * 50])])
    kind = MaskKind("other", function=lambda b, h, q, kv: (q + kv) % 2 == 0)
    causal, other = build_block_mask(row.layout), build_block_mask(row.layout, kind)
    assert other.full_kv_num_blocks.sum() == 0
    torch.testing.assert_close(other.kv_num_blocks, causal.kv_num_blocks + causal.full_kv_num_blocks)


def test_rows_of_a_batch_have_their_own_tiles() -> None:
    first = Row.from_groups([Group.from_lists([1] * 200, [[2] * 20, [3] * 30])], pad_to_multiple_of=256)
    second = Row.from_groups([Group.from_lists([1] * 20, [[2] * 20, [3] * 30])], pad_to_multiple_of=256)
    layout = RowLayout(
        torch.cat([first.position_ids, second.position_ids]),
        torch.cat([first.subtree_end, second.subtree_end]),
        (first.num_tokens, second.num_tokens),
    )
    both = build_block_mask(layout)
    for number, row in enumerate((first, second)):
        alone = build_block_mask(row.layout)
        for field in FIELDS:
            torch.testing.assert_close(getattr(both, field)[number], getattr(alone, field)[0], msg=field)


# both lengths in one process, most of whose time goes into imports
MEMORY_PROBE = """
import torch
from flexdpo import RowLayout
from flexdpo.attention.block_masks import build_block_mask
small = RowLayout(torch.arange(1024)[None], torch.full((1, 1024), 1024), (1024,))
build_block_mask(small)
def peak():  # of this process alone: getrusage would start from the peak of the one that started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
for length in (32_768, 65_536):
    end = ((torch.arange(length) // 1024 + 1) * 1024).clamp(max=length)[None]
    layout = RowLayout(torch.arange(length)[None] % 1024, end, (length,))
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = peak()
    build_block_mask(layout)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    # a byte for every pair of 32k tokens would be 1 GB
    run = subprocess.run([sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True, check=True)
    shorter, longer = map(float, run.stdout.split())
    assert 1 < shorter < 50
    assert 1 < longer < 80


def test_the_causal_kind_is_the_default() -> None:
    layout = Row.from_groups([Group.from_lists([1], [[2], [3]])]).layout
    torch.testing.assert_close(build_block_mask(layout).kv_indices, build_block_mask(layout, CAUSAL).kv_indices)


@pytest.mark.parametrize("size", [(256, 128), (64, 128), (32, 48)], ids=str)
@pytest.mark.parametrize("kind", [CAUSAL, MaskKind("sliding", 40), MaskKind("chunked", 64)], ids=lambda kind: kind.name)
def test_tiles_of_more_queries_than_keys(size: tuple[int, int], kind: MaskKind) -> None:
    groups = [
        Group.from_lists([1] * 150, [[2] * 60 + [3] * 30, [2] * 60 + [4] * 90, [5] * 70]),
        Group.from_lists([6] * 70, [[7] * 20, [8] * 130]),
    ]
    layout = Row.from_groups(groups, pad_to_multiple_of=7).layout
    tiles = classify_tiles(layout, kind, size)
    block_mask = build_block_mask(layout, kind, block_size=size)
    assert size == block_mask.BLOCK_SIZE
    dense = dense_mask(block_mask.mask_mod, 1, layout.length)[0]
    for i in range(tiles.full.shape[1]):
        for j in range(tiles.full.shape[2]):
            tile = dense[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
            allowed, everything = bool(tile.any()), bool(tile.all()) and len(tile) == size[0]
            # windows and chunks are judged by ranges, which may keep a tile that holds nothing
            assert tiles.non_empty[0, i, j] or not allowed
            assert everything or not tiles.full[0, i, j]
            if kind is CAUSAL:
                assert bool(tiles.non_empty[0, i, j]) == allowed
    want = create_block_mask(block_mask.mask_mod, 1, None, layout.length, layout.length, "cpu", BLOCK_SIZE=size)
    for name in ("kv_num_blocks", "kv_indices", "q_indices", "full_q_indices"):
        got = getattr(block_mask, name)
        assert (got.shape, got.stride(), got.dtype) == (
            getattr(want, name).shape,
            getattr(want, name).stride(),
            getattr(want, name).dtype,
        )
