"""One attention kernel after another, interpreted and held against dense float64; and kernels with a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from flexdpo import Group, Row, RowLayout
from flexdpo.attention import flex
from flexdpo.attention.inputs import AttentionCall, Shape
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import RowMask, row_mask_for
from flexdpo.attention.selftest import compare_kernel
from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from tests.codegen.as_if_cuda import Recording

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# fp32 kernels take 16 x 16 backward tiles by default, which an interpreter would run for minutes
TILES_OF_64 = dict.fromkeys(("BLOCK_M", "BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 64)


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for, and the row it runs on."""

    dtype: torch.dtype
    kind: MaskKind = CAUSAL
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 32
    softcap: float | None = None
    sinks: bool = False
    pad_to_multiple_of: int = 128
    dynamic: bool = False
    batch_size: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    fault: Callable[[RowMask], None] | None = None

    def __call__(self, recording: Recording) -> dict[str, Any]:
        flex._kernels.clear()
        torch._dynamo.reset()
        options = self.options | (TILES_OF_64 if self.dtype == FP32 else {})
        settings = KernelSettings(lengths="dynamic" if self.dynamic else "bucket", kernel_options=options)
        with kernel_settings_as(settings):
            row_mask = row_mask_for(self._layout(), self.kind, "flex")
        if self.fault is not None:
            self.fault(row_mask)
        shape = Shape(*self.heads, self.head_dim, self.head_dim, self.dtype)
        report = compare_kernel(AttentionCall(shape, None, self.softcap, self.sinks), row_mask)
        mask = row_mask.block_mask
        return {
            "tokens": report.length,
            "partial": int(mask.kv_num_blocks.sum()),
            "full": int(mask.full_kv_num_blocks.sum()),
            "compared": [found.name for found in report.comparisons],
            "wrong": {found.name: f"off by {found.error:.1e}, budget {found.budget:.1e}" for found in report.wrong},
        }

    def _layout(self) -> RowLayout:
        pad = self.pad_to_multiple_of
        rows = [two_documents(pad), one_document(pad)][: self.batch_size]
        return RowLayout.stack([row.layout for row in rows])


def two_documents(pad_to_multiple_of: int) -> Row:
    """407 tokens: a trie of depth two whose first key tile has a full and a skipped query tile, and a short triple."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(0, 1000, count).tolist()

    stem = ids(150)
    deep = Group.from_lists(ids(140), [stem, stem[:20] + ids(40)])
    triple = Group.from_lists(ids(30), [ids(10), ids(12), ids(25)])
    return Row.from_groups([deep, triple], pad_to_multiple_of=pad_to_multiple_of)


def one_document(pad_to_multiple_of: int) -> Row:
    """370 tokens of one pair."""
    pair = Group.from_lists(list(range(90)), [list(range(100, 330)), list(range(400, 450))])
    return Row.from_groups([pair], pad_to_multiple_of=pad_to_multiple_of)


def nearer_than_50(batch: Any, head: Any, q: Any, kv: Any) -> Any:
    return q - kv < 50


# --- faults ----------------------------------------------------------------------------------------------------------


def transposed_lists(row_mask: RowMask) -> None:
    """Lists of queries that lie in memory as those of keys do."""
    mask = row_mask.block_mask
    mask.q_indices, mask.full_q_indices = (
        x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (mask.q_indices, mask.full_q_indices)
    )


def short_query_list(row_mask: RowMask) -> None:
    mask = row_mask.block_mask
    mask.q_num_blocks = (mask.q_num_blocks - 1).clamp(min=0)


def all_tiles_full(row_mask: RowMask) -> None:
    mask = row_mask.block_mask
    mask.full_kv_num_blocks, mask.full_kv_indices = mask.kv_num_blocks.clone(), mask.kv_indices.clone()
    mask.kv_num_blocks = torch.zeros_like(mask.kv_num_blocks)


def missing_tile(row_mask: RowMask) -> None:
    mask = row_mask.block_mask
    mask.kv_num_blocks = mask.kv_num_blocks.clone()
    mask.kv_num_blocks[..., -1] -= 1


def broken_promise(row_mask: RowMask) -> None:
    # KernelSettings refuses it, so it comes in behind its back
    row_mask.settings.kernel_options["ROWS_GUARANTEED_SAFE"] = True  # type: ignore[index]


_PLAIN, _HALF = Case(FP32), Case(FP16)
_SLIDING = MaskKind("sliding", 50)
KERNELS = {
    "fp32": _PLAIN,
    "fp16": _HALF,
    "bf16": Case(BF16),
    "fp16 ragged": replace(_HALF, pad_to_multiple_of=1),
    "fp16 dynamic": replace(_HALF, pad_to_multiple_of=1, dynamic=True),
    "fp16 chunked": replace(_HALF, kind=MaskKind("chunked", 64)),
    "fp16 other": replace(_HALF, kind=MaskKind("other", function=nearer_than_50)),
    "fp32 softcap": replace(_PLAIN, softcap=5.0),
    "fp32 sinks": replace(_PLAIN, sinks=True),
    "fp16 sliding softcap": replace(_HALF, kind=_SLIDING, softcap=5.0),
    "fp16 sliding sinks": replace(_HALF, kind=_SLIDING, sinks=True),
    "bf16 sliding sinks": Case(BF16, kind=_SLIDING, sinks=True),
    "fp16 head size 80": replace(_HALF, head_dim=80),
    "fp16 head size 128": replace(_HALF, head_dim=128),
    "fp32 three queries a key": replace(_PLAIN, heads=(3, 1)),
    "fp32 two rows": replace(_PLAIN, batch_size=2),
}
FAULTS = {
    "transposed lists": replace(_PLAIN, fault=transposed_lists),
    "short query list": replace(_PLAIN, fault=short_query_list),
    "all tiles full": replace(_PLAIN, fault=all_tiles_full),
    "missing tile": replace(_PLAIN, fault=missing_tile),
    "broken promise": replace(_PLAIN, fault=broken_promise),
}


CASES = KERNELS | FAULTS
