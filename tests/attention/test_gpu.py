"""What only a GPU can show: ``pytest -m gpu``. Values and gradients of the compiled kernels, with error budgets.

A kernel may lose a few times what dense attention loses in the same dtype, measured against a wider one
(:mod:`flexdpo.attention.selftest`, whose power to find wrong kernels is tested on a CPU).
"""

import time

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from flexdpo import Group, Row, RowLayout, pack
from flexdpo.attention import flex, selftest
from flexdpo.attention.block_masks import build_block_mask
from flexdpo.attention.inputs import AttentionCall, Shape
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import Impl, RowMask, row_mask_for
from flexdpo.attention.selftest import compare_kernel
from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from flexdpo.attention.varlen import varlen_attention
from flexdpo.layout.packing import choose_buckets, row_lengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS = {"mha": (8, 8, 64), "gqa": (32, 8, 128), "odd": (15, 5, 64), "one key head": (7, 1, 128), "wide": (4, 2, 256)}
BF16, FP32 = torch.bfloat16, torch.float32
FLASH = {"BACKEND": "FLASH"}


@pytest.fixture(autouse=True)
def fresh_kernels(monkeypatch):
    monkeypatch.setattr(flex, "_kernels", {})
    monkeypatch.setattr(selftest, "_passed", set())
    torch.compiler.reset()


def packed_row(length: int, seed: int = 0, longest: int = 1000) -> Row:
    """Documents of up to ``longest`` tokens with one to four responses, padded to ``length``."""
    rng = np.random.default_rng(seed)
    groups, used = [], 0
    while True:
        sizes = [max(1, int(n)) for n in rng.integers(1, min(longest, max(2, length // 3)), rng.integers(2, 6)) // 2]
        if used + sum(sizes) > length:
            break
        groups.append(Group.from_lists([1] * sizes[0], [[2 + k] * n for k, n in enumerate(sizes[1:])], []))
        used += sum(sizes)
    return Row.from_groups(groups or [Group.from_lists([1], [[2]], [])], pad_to_multiple_of=length)


def mask(length: int, kind: MaskKind = CAUSAL, seed: int = 0, impl: Impl = "flex") -> RowMask:
    row = packed_row(length, seed).to("cuda")
    assert row.layout.length == length
    return row_mask_for(row.layout, kind, impl)


def assert_right(shape: Shape, row_mask: RowMask, **options) -> None:
    kernel = varlen_attention if row_mask.impl == "varlen" else flex.run_flex
    report = compare_kernel(AttentionCall(shape, **options), row_mask, attend=kernel)
    assert report.wrong == []


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_head_count(heads: str, dtype: torch.dtype) -> None:
    query_heads, key_heads, dim = HEADS[heads]
    assert_right(Shape(query_heads, key_heads, dim, dim, dtype), mask(1024))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kind", [CAUSAL, MaskKind("sliding", 200), MaskKind("chunked", 256)], ids=lambda k: k.name)
@pytest.mark.parametrize("extras", [{}, {"softcap": 30.0}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
def test_every_mask_and_score(dtype: torch.dtype, kind: MaskKind, extras: dict) -> None:
    assert_right(Shape(8, 2, 64, 64, dtype), mask(1024, kind), **extras)


@pytest.mark.parametrize("length", [128, 256, 1024, 4096, 8192, 32_768])
def test_every_length(length: int) -> None:
    assert_right(Shape(4, 2, 64, 64, BF16), mask(length))


@pytest.mark.parametrize("length", [2, 127, 129, 1000])
def test_a_row_that_is_no_multiple_of_a_tile(length: int) -> None:
    with kernel_settings_as(KernelSettings(lengths="dynamic")):
        assert_right(Shape(4, 2, 64, 64, BF16), mask(length))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [CAUSAL, MaskKind("sliding", 200)], ids=lambda k: k.name)
@pytest.mark.parametrize("length", [127, 4096])
def test_the_kernel_along_root_paths(heads: str, dtype: torch.dtype, kind: MaskKind, length: int) -> None:
    query_heads, key_heads, dim = HEADS[heads]
    assert_right(Shape(query_heads, key_heads, dim, dim, dtype), mask(length, kind, impl="varlen"))


def test_the_kernel_along_root_paths_waits_for_nothing_and_is_compared_once() -> None:
    rows = [packed_row(length) for length in (1024, 2048)]
    for row in rows:
        moved = row.to("cuda")
        heads = [torch.randn(1, h, row.layout.length, 64, device="cuda", dtype=BF16) for h in (8, 2, 2)]
        row_mask = row_mask_for(moved.layout, CAUSAL, "varlen")
        packed_attention(*heads, row_mask)
        moved.layout.memo.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed_attention(*heads, row_mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(selftest._passed) == 1


@pytest.mark.parametrize("strategy", ["bucket", "dynamic"])
def test_many_steps_with_changing_masks_stay_right_and_compile_nothing(strategy: str) -> None:
    rng = np.random.default_rng(1)

    def ids(most: int) -> list[int]:
        return rng.integers(0, 9, rng.integers(1, most)).tolist()

    data = [[Group.from_lists(ids(700), [ids(200), ids(200)]) for _ in range(4)] for _ in range(50)]
    buckets = choose_buckets(row_lengths(data), max_waste=0.2, max_buckets=2)
    with kernel_settings_as(KernelSettings(lengths=strategy, self_test=False)):  # type: ignore[arg-type]
        rows = [pack(groups, buckets=buckets)[0].to("cuda") for groups in data]
        shape = Shape(4, 2, 64, 64, BF16)
        for length in buckets.lengths:
            row = next(row for row in rows if row.layout.length == length)
            for kind in (CAUSAL, MaskKind("sliding", 64)):
                assert_right(shape, row_mask_for(row.layout, kind, "flex"))
        before = counters["stats"]["unique_graphs"]
        for step, row in enumerate(rows):
            for kind in (CAUSAL, MaskKind("sliding", 100 + step)):
                assert_right(shape, row_mask_for(row.layout, kind, "flex"))
    assert counters["stats"]["unique_graphs"] == before


def test_the_self_test_at_the_first_row_is_quick_once_compiled() -> None:
    row_mask = mask(8192)
    shape = (torch.randn(1, heads, 8192, 128, device="cuda", dtype=BF16, requires_grad=True) for heads in (32, 8, 8))
    query, key, value = shape
    packed_attention(query, key, value, row_mask)
    assert len(selftest._passed) == 1
    selftest._passed.clear()
    torch.cuda.synchronize()
    began = time.perf_counter()
    packed_attention(query, key, value, row_mask)
    torch.cuda.synchronize()
    assert time.perf_counter() - began < 5


def test_masks_are_built_without_waiting_for_the_device() -> None:
    layout = packed_row(8192).to("cuda").layout
    build_block_mask(layout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kind in (CAUSAL, MaskKind("sliding", 100), MaskKind("chunked", 256)):
            fresh = RowLayout(layout.position_ids, layout.subtree_end, layout.num_tokens)
            row_mask_for(fresh, kind)
        pinned = packed_row(1024).pin_memory()
        pinned.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flash_is_right_or_refused() -> None:
    pytest.importorskip("flash_attn.cute", reason="FlashAttention-4 is not installed")
    with kernel_settings_as(KernelSettings(kernel_options=FLASH)):
        row_mask = mask(2048)
        heads = [torch.randn(1, h, 2048, 128, device="cuda", dtype=BF16, requires_grad=True) for h in (8, 2, 2)]
        report = compare_kernel(AttentionCall(Shape(8, 2, 128, 128, BF16)), row_mask)
        if report.wrong:
            with pytest.raises(ValueError, match=r"backend FLASH\) and dense attention disagree"):
                packed_attention(*heads, row_mask)
        else:
            packed_attention(*heads, row_mask)
