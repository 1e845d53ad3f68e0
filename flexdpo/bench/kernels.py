"""One attention layer alone: its forward and backward time, shared and not, and the time its mask takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.attention.row_mask import Impl, row_mask_for
from flexdpo.attention.varlen import plan_for
from flexdpo.bench.timing import timed
from flexdpo.bench.variants import pack_pairs
from flexdpo.bench.varlen import Documents, within_documents

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row
    from flexdpo.training.memory import ModelSize


@dataclass(frozen=True)
class KernelRow:
    """Times of one attention layer on one row.

    Attributes:
        layout: ``"shared"`` or ``"packed"``.
        kernel: ``"flexdpo"``, or on CUDA ``"varlen_attn"``: within documents where nothing is shared, along root paths
            where prompts are.
        tokens: Tokens of the row.
        forward_ms: Forward with gradients on.
        backward_ms: Backward.
        block_mask_ms: Making the BlockMask, or the plan of root paths, once per step; ``None`` where there is neither.
    """

    layout: str
    kernel: str
    tokens: int
    forward_ms: float
    backward_ms: float
    block_mask_ms: float | None


def kernel_rows(
    pairs: Sequence[Group],
    shape: ModelSize,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_tokens_per_row: int | None,
    pad_to_multiple_of: int,
    repeats: int = 5,
) -> list[KernelRow]:
    """Time one layer on the first row of ``pairs``, shared and not; on CUDA in half precision by varlen_attn too."""
    found = []
    with_varlen = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    for layout in ("packed", "shared"):
        row = pack_pairs(pairs, layout == "shared", max_tokens_per_row, pad_to_multiple_of)[0].to(device)
        heads = _heads(shape, row, device, dtype)
        if with_varlen and layout == "packed":
            times = _layer_times(_varlen_layer(row), heads, device, repeats)
            found.append(KernelRow(layout, "varlen_attn", row.num_tokens, *times, None))
        times = _layer_times(_own_layer(row, "auto"), heads, device, repeats)
        mask = _milliseconds(lambda row=row: row_mask_for(row.layout.without_masks(), CAUSAL), device, repeats)
        found.append(KernelRow(layout, "flexdpo", row.num_tokens, *times, mask))
        if with_varlen and layout == "shared":
            times = _layer_times(_own_layer(row, "varlen"), heads, device, repeats)
            plan = _milliseconds(lambda row=row: plan_for(row.layout.without_masks()), device, repeats)
            found.append(KernelRow(layout, "varlen_attn", row.num_tokens, *times, plan))
    return found


def _own_layer(row: Row, impl: Impl) -> Callable[..., Tensor]:
    row_mask = row_mask_for(row.layout, CAUSAL, impl)
    return lambda query, key, value: packed_attention(query, key, value, row_mask)


def _varlen_layer(row: Row) -> Callable[..., Tensor]:
    documents = Documents.of(row)

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        return within_documents(query, key, value, documents, None).transpose(0, 1)[None]

    return layer


def _heads(shape: ModelSize, row: Row, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    length = row.input_ids.shape[1]
    counts = (shape.heads, shape.key_heads, shape.key_heads)
    # token by token in memory, as a projection leaves them
    made = [torch.randn(1, length, heads, shape.head_dim, device=device, dtype=dtype) for heads in counts]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def _layer_times(
    layer: Callable[..., Tensor], heads: list[Tensor], device: torch.device, repeats: int
) -> tuple[float, float]:
    direction = torch.randn_like(layer(*heads))

    def backward(output: Tensor) -> None:
        # once for each forward: a compiled kernel gives its buffers away in the first backward
        torch.autograd.grad(output, heads, direction)

    forward_ms = _milliseconds(lambda: layer(*heads), device, repeats)
    return forward_ms, _milliseconds(backward, device, repeats, before=lambda: (layer(*heads),))


def _milliseconds(
    run: Callable[..., Any], device: torch.device, repeats: int, before: Callable[[], tuple[Any, ...]] = tuple
) -> float:
    """Median time of a call, after one to warm up; ``before`` makes its arguments and is not timed."""
    run(*before())
    return 1e3 * median(timed(partial(run, *before()), device)[1] for _ in range(repeats))
