"""Compiled attention must not compile again while data changes, and must never turn into its dense version."""

from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from flexdpo import FlexdpoError, Group, pack
from flexdpo.attention import flex
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import row_mask_for
from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from flexdpo.layout.packing import choose_buckets, row_lengths
from tests.oracle import dense_attention, dense_mask

STEPS = 24
# what is compiled is told by its shape: tests with the same one find it in the compiler's cache
HEADS, HEAD_DIM = (4, 2, 2), 8


@pytest.fixture(autouse=True)
def fresh_kernels(monkeypatch):
    monkeypatch.setattr(flex, "_kernels", {})
    torch.compiler.reset()


@pytest.fixture
def traced_only(monkeypatch):
    """Without code made from the graphs: with fixed lengths, what is traced and when is the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def batches(count: int) -> list[list[Group]]:
    rng = np.random.default_rng(0)

    def ids(most: int) -> list[int]:
        return rng.integers(0, 9, rng.integers(1, most)).tolist()

    return [[Group.from_lists(ids(150), [ids(40), ids(40)]) for _ in range(rng.integers(2, 5))] for _ in range(count)]


def attend(row, kind: MaskKind) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, row.layout.length, HEAD_DIM, generator=generator) for heads in HEADS]
    row_mask = row_mask_for(row.layout, kind, "flex")
    with torch.no_grad():
        got = packed_attention(*inputs, row_mask)
    mask = dense_mask(row_mask.block_mask.mask_mod, 1, row.layout.length)
    torch.testing.assert_close(got, dense_attention(*inputs, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced_only")
def test_buckets_compile_once_for_each_length() -> None:
    data = batches(STEPS)
    buckets = choose_buckets(row_lengths(data), max_waste=0.3, max_buckets=2)
    rows = [pack(groups, buckets=buckets)[0] for groups in data]
    with kernel_settings_as(KernelSettings(lengths="bucket")):
        for length in buckets.lengths:
            attend(next(row for row in rows if row.layout.length == length), CAUSAL)
        before = compiled_graphs()
        assert before > 0
        for row in rows:
            attend(row, CAUSAL)
    assert compiled_graphs() == before
    assert {kernel.length for kernel in flex._kernels} == set(buckets.lengths)
    assert len(buckets.lengths) == 2


def test_one_dynamic_kernel_serves_all_lengths_and_windows() -> None:
    # without padding, nearly every row has a length of its own
    rows = sorted((pack(groups)[0] for groups in batches(STEPS)), key=lambda row: row.layout.length)
    assert len({row.layout.length for row in rows}) > STEPS // 2
    several_tiles = [row for row in rows if row.layout.length > 128]
    assert STEPS // 2 < len(several_tiles) < STEPS
    with kernel_settings_as(KernelSettings(lengths="dynamic")):
        # a row of a single tile and one of several are told apart once; this order finds the kernel of other tests
        attend(rows[-1], CAUSAL)
        attend(rows[0], CAUSAL)
        attend(rows[-1], MaskKind("sliding", 11))
        before = compiled_graphs()
        assert before > 0
        for row in rows:
            attend(row, CAUSAL)
        for step, row in enumerate(several_tiles):
            # a window that changes is a tensor in the kernel, not a constant
            attend(row, MaskKind("sliding", 20 + step))
    assert compiled_graphs() == before
    assert len(flex._kernels) == 2


@pytest.mark.usefixtures("traced_only")
def test_one_kernel_more_than_allowed_raises() -> None:
    rows = [pack(groups, pad_to_multiple_of=128 * k)[0] for k, groups in enumerate(batches(2), start=3)]
    with kernel_settings_as(KernelSettings(lengths="bucket", max_kernels=1)):
        attend(rows[0], CAUSAL)
        attend(rows[0], CAUSAL)
        with pytest.raises(
            FlexdpoError,
            match=r"needs FlexAttention kernel number 2, and max_kernels=1 \(lengths so far: \[\d+\]\); pad rows to "
            "fewer lengths, compile one kernel for all of them with lengths='dynamic', or raise max_kernels",
        ):
            attend(rows[1], CAUSAL)


@pytest.mark.usefixtures("traced_only")
def test_the_recompile_limit_raises_instead_of_turning_dense() -> None:
    row = pack(batches(1)[0])[0]
    row_mask = row_mask_for(row.layout, CAUSAL, "flex")
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for number, dtype in enumerate((torch.float32, torch.bfloat16)):
            inputs = [torch.randn(1, heads, row.layout.length, HEAD_DIM, dtype=dtype) for heads in HEADS]
            if number == 0:
                packed_attention(*inputs, row_mask)
            else:
                with pytest.raises(FlexdpoError, match=r"attend_causal_no_grad_dynamic was compiled 1 times"):
                    packed_attention(*inputs, row_mask)


@pytest.mark.parametrize("impl", ["sdpa", "flex"])
def test_autocast_brings_wider_queries_and_keys_down_to_the_values(impl: str) -> None:
    # as after rotary embeddings, which are computed in float32
    row = pack(batches(1)[0])[0]
    query, key, value = (torch.randn(1, heads, row.layout.length, HEAD_DIM) for heads in HEADS)
    value = value.bfloat16()
    row_mask = row_mask_for(row.layout, CAUSAL, impl)  # type: ignore[arg-type]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = packed_attention(query, key, value, row_mask)
    assert got.dtype == torch.bfloat16
    mask = dense_mask(row_mask.block_mask.mask_mod, 1, row.layout.length)
    torch.testing.assert_close(got.float(), dense_attention(query, key, value.float(), mask), rtol=0.05, atol=0.05)
