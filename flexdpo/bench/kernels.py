"""One attention layer alone: its forward and backward time, shared and not, and the time its mask takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.attention.row_mask import Impl, row_mask_for
from flexdpo.attention.varlen import plan_for
from flexdpo.bench.timing import timed
from flexdpo.bench.variants import pack_pairs
from flexdpo.bench.varlen import document_bounds, within_documents
from flexdpo.layout.groups import Group
from flexdpo.layout.row import Row
from flexdpo.layout.row_layout import RowLayout
from flexdpo.training.model_size import ModelSize

_REPEATS = 5


def kernel_times(
    pairs: Sequence[Group],
    shape: ModelSize,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_tokens_per_row: int | None,
    pad_to_multiple_of: int,
) -> list[dict[str, Any]]:
    """Time one layer on the first row of ``pairs``, shared and not; on CUDA in half precision by varlen_attn too.

    ``block_mask_ms`` is the time to make the BlockMask, or the plan of root paths, once per step; ``None`` where there
    is neither.
    """
    with_varlen = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    counts = (shape.heads, shape.key_heads, shape.key_heads)
    found = []
    for layout in ("packed", "shared"):
        row = pack_pairs(pairs, layout == "shared", max_tokens_per_row, pad_to_multiple_of)[0].to(device)
        # token by token in memory, as a projection leaves them
        made = [torch.randn(1, row.layout.length, n, shape.head_dim, device=device, dtype=dtype) for n in counts]
        heads = [x.transpose(1, 2).requires_grad_() for x in made]
        kernels: list[tuple[str, Callable[..., Tensor], Callable[[RowLayout], Any] | None]] = [
            ("flexdpo", _own_layer(row, "auto"), lambda layout: row_mask_for(layout, CAUSAL))
        ]
        if with_varlen and layout == "packed":
            kernels.insert(0, ("varlen_attn", _documents_layer(row), None))
        elif with_varlen:
            kernels.append(("varlen_attn", _own_layer(row, "varlen"), plan_for))
        for kernel, layer, make_mask in kernels:
            forward_ms, backward_ms = layer_times(layer, heads, device)
            bare = partial(lambda row: (row.layout.without_masks(),), row)
            mask_ms = None if make_mask is None else _milliseconds(make_mask, device, before=bare)
            times = {"forward_ms": forward_ms, "backward_ms": backward_ms, "block_mask_ms": mask_ms}
            found.append({"layout": layout, "kernel": kernel, "tokens": row.num_tokens, **times})
    return found


def _own_layer(row: Row, impl: Impl) -> Callable[..., Tensor]:
    row_mask = row_mask_for(row.layout, CAUSAL, impl)
    return lambda query, key, value: packed_attention(query, key, value, row_mask)


def _documents_layer(row: Row) -> Callable[..., Tensor]:
    documents = document_bounds(row)

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = within_documents(query, key, value, documents)
        return rearrange(output, "1 token head size -> 1 head token size")

    return layer


def layer_times(layer: Callable[..., Tensor], heads: list[Tensor], device: torch.device) -> tuple[float, float]:
    """Milliseconds of a layer's forward pass with gradients on, and of its backward pass."""
    direction = torch.randn_like(layer(*heads))

    def backward(output: Tensor) -> None:
        # once for each forward: a compiled kernel gives its buffers away in the first backward
        torch.autograd.grad(output, heads, direction)

    forward_ms = _milliseconds(lambda: layer(*heads), device)
    return forward_ms, _milliseconds(backward, device, before=lambda: (layer(*heads),))


def _milliseconds(
    run: Callable[..., Any], device: torch.device, before: Callable[[], tuple[Any, ...]] = tuple
) -> float:
    """Median time of a call, after one to warm up; ``before`` makes its arguments and is not timed."""
    run(*before())
    return 1e3 * median(timed(partial(run, *before()), device)[1] for _ in range(_REPEATS))
