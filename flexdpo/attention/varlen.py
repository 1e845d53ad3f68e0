"""Attention over packed rows by a variable-length kernel: each leaf's own queries against all keys of its root path.

A run of the row that ends at a leaf of the trie continues one root path, so its queries are the last ones of that path
and see it causally, whatever branches stand between its tokens in the row. With the path's keys and values gathered,
that is causal attention of sequences with fewer queries than keys, aligned at their ends, which FlashAttention computes
and trains: no tiles, nothing to compile. The price are the gathered keys and values, as many tokens as the ordinary run
has, and adding their gradients up again.

Shapes: ``B`` rows, ``Hq`` query heads, ``Hkv`` key heads, ``S`` tokens, ``D`` head size; ``N`` sequences, ``Tq`` and
``Tk`` their queries and keys, one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexdpo.attention.inputs import AttentionInputs
from flexdpo.attention.row_mask import RowMask
from flexdpo.attention.torch_varlen import WAY_OUT, Sequences, require_flash, torch_varlen
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.layout.row import RowLayout, on_device

Ints = NDArray[np.int64]


class VarlenPlan(NamedTuple):
    """The sequences of a batch of rows."""

    # for each row, the tokens at its beginning that are run; those behind see nothing but themselves
    counts: tuple[int, ...]
    # which tokens of the batch stand in each sequence's root path, counted through all rows, ``[Tk]`` int64
    keys: Tensor
    sequences: Sequences
    consecutive: bool  # whether every root path stands at consecutive positions, as a window needs


def varlen_attention(inputs: AttentionInputs, row_mask: RowMask) -> Tensor:
    """Attend leaf by leaf; see :func:`flexdpo.attention.kernels.packed_attention`.

    Raises ``UnsupportedModelError`` if the model needs what the kernel cannot do, naming it.
    """
    require_varlen(inputs, row_mask)
    query, key, value = inputs[:3]
    plan = plan_for(row_mask.layout)
    window = row_mask.kind.size if row_mask.kind.name == "sliding" else 0
    if window and not plan.consecutive:
        raise FlexdpoError(
            "impl='varlen' counts a sliding window in tokens of a root path, and the position_ids of this row do not "
            f"rise by one along its paths; {WAY_OUT}"
        )
    batch, heads = query.shape[0], query.shape[1]
    flat_query, flat_key, flat_value = (rearrange(x, "b h s d -> (b s) h d") for x in (query, key, value))
    if not plan.keys.numel():
        # every token of the batch is alone
        return _own_values(value, heads)
    output = torch_varlen(
        _joined(flat_query, plan, batch),
        _Gather.apply(flat_key, plan.keys),
        _Gather.apply(flat_value, plan.keys),
        plan.sequences,
        window=window,
        scaling=inputs.scaling,
    )
    return _with_lone_tokens(output, value, plan, heads)


def require_varlen(inputs: AttentionInputs, row_mask: RowMask) -> None:
    """Raise where the kernel cannot do what the model needs, or cannot run at all."""
    obstacle = _obstacle(inputs, row_mask)
    if obstacle is not None:
        raise UnsupportedModelError(f"impl='varlen' cannot run this model: {obstacle}; {WAY_OUT}")
    require_flash(inputs.query)


def _obstacle(inputs: AttentionInputs, row_mask: RowMask) -> str | None:
    """Why the kernel cannot give the model's result, or ``None``."""
    kind = row_mask.kind
    if inputs.softcap is not None:
        return f"it bounds its attention scores (softcap {inputs.softcap:g})"
    if inputs.sinks is not None:
        return "its attention has sinks"
    if row_mask.score_mod is not None:
        return "it changes its attention scores (score_mod)"
    if kind.blocks or kind.name not in ("causal", "sliding"):
        mask = f"in chunks of {kind.size} positions" if kind.name == "chunked" else "a function of its own"
        mask = "the tokens of an image see each other both ways" if kind.blocks else mask
        return f"its mask is not causal or a sliding window ({mask})"
    head_dim, value_dim = inputs.query.shape[-1], inputs.value.shape[-1]
    if head_dim != value_dim:
        return f"its queries have head size {head_dim} and its values {value_dim}"
    return None


class _Gather(torch.autograd.Function):
    """``x[index]``. A shared token's gradients are added up in float32 or better: half would round at each addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=gradient.device)
        return total.index_add_(0, index, gradient.to(wide)).to(gradient.dtype), None


def _joined(flat: Tensor, plan: VarlenPlan, batch: int) -> Tensor:
    """The tokens that are run, of all rows: ``[B * S, ...]`` to ``[Tq, ...]``."""
    length = flat.shape[0] // batch
    if all(count == length for count in plan.counts):
        return flat.contiguous()
    return torch.cat([flat[row * length : row * length + count] for row, count in enumerate(plan.counts)])


def _with_lone_tokens(output: Tensor, value: Tensor, plan: VarlenPlan, heads: int) -> Tensor:
    """Put what was computed, ``[Tq, Hq, D]``, into its rows; a token that sees only itself gets its own value."""
    batch, _, length, _ = value.shape
    if all(count == length for count in plan.counts):
        return rearrange(output, "(b s) h d -> b h s d", b=batch)
    parts = []
    for row, run in enumerate(output.split(list(plan.counts))):
        alone = _own_values(value[row : row + 1, :, plan.counts[row] :], heads)
        parts += [run, rearrange(alone, "1 h s d -> s h d")]
    return rearrange(torch.cat(parts), "(b s) h d -> b h s d", b=batch)


def _own_values(value: Tensor, heads: int) -> Tensor:
    return value.repeat_interleave(heads // value.shape[1], dim=1)


def plan_for(layout: RowLayout) -> VarlenPlan:
    """The sequences of a layout, found once, on the host; a layout that was moved to its device is not waited for."""
    if "varlen" not in layout.memo:
        layout.memo["varlen"] = plan_sequences(layout)
    plan: VarlenPlan = layout.memo["varlen"]
    return plan


def plan_sequences(layout: RowLayout) -> VarlenPlan:
    """Cut a batch of rows into one sequence for each leaf of its tries.

    Time and memory are linear in the root paths of all leaves, which are the tokens of the ordinary run.
    """
    host = layout.on_host()
    ends, positions = host.subtree_end.numpy(), host.position_ids.numpy()
    counts, keys, num_queries, consecutive = [], [], [], True
    for row in range(layout.batch_size):
        counts.append(_count_before_lone(ends[row]))
        for start, stop, path in _leaves(ends[row], counts[-1]):
            keys.append(path + row * layout.length)
            num_queries.append(stop - start)
            consecutive = consecutive and bool((np.diff(positions[row, path]) == 1).all())
    num_keys = [path.size for path in keys]
    indices = on_device(np.concatenate(keys) if keys else (), torch.int64, layout.device)
    query_starts, key_starts = (
        on_device([0, *accumulate(sizes)], torch.int32, layout.device) for sizes in (num_queries, num_keys)
    )
    sequences = Sequences(query_starts, key_starts, max(num_queries, default=0), max(num_keys, default=0))
    return VarlenPlan(tuple(counts), indices, sequences, consecutive)


def _count_before_lone(ends: Ints) -> int:
    """Tokens up to the last that sees another or is seen: padding lies behind, and a kernel would start for each."""
    index = np.arange(ends.size)
    reach = np.concatenate(([0], np.maximum.accumulate(ends)[:-1]))
    together = np.flatnonzero((reach > index) | (ends > index + 1))
    return int(together[-1]) + 1 if together.size else 0


def _leaves(ends: Ints, count: int) -> Iterator[tuple[int, int, Ints]]:
    """For each leaf: the run of the row that ends there, start and stop, and the tokens of its whole root path."""
    if not count:
        return
    # behind a leaf begins another branch or document
    leaves = np.flatnonzero(ends[:count] == np.arange(1, count + 1)) + 1
    path: Ints = np.empty(0, np.int64)
    for start, stop in pairwise([0, *leaves.tolist()]):
        ancestors = path[ends[path] > start]
        path = np.concatenate([ancestors, np.arange(start, stop)])
        yield start, stop, path
