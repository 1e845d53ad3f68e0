"""Compares a kernel with dense attention where it is going to be used: these heads, this dtype, this row's mask.

Compiled attention has been silently wrong before, mostly in the gradients of keys and values under masks of its users'
own making. So the first row that trains is run twice: through the kernel and through the definition, in more precision.
What the definition itself loses in the kernel's dtype is the unit of the error budget. A layer that ``torch.compile``
turns into one graph has FlexAttention inside of it, out of reach; there the same kernel, under the same mask and with
the same options, is compared by itself before the layer first runs (:func:`require_correct_call`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from flexdpo.attention.blockwise import bias_between, block_score_mod
from flexdpo.attention.flash import FlashCall, require_flash
from flexdpo.attention.flex import KernelKey, kernel_key_of, run_flex
from flexdpo.attention.formula import softmax_attention
from flexdpo.attention.inputs import AttentionCall, AttentionInputs, Shape, wants_gradients
from flexdpo.attention.row_mask import RowMask
from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import RowLayout

AttentionKernel = Callable[[AttentionInputs, RowMask], Tensor]

# a kernel may lose this many times what the formula loses in the same dtype, and this share of the largest value
BUDGET_FACTOR, BUDGET_SHARE = 4.0, 1e-5
# queries of a row whose output and gradients are compared; in a longer row they are drawn from all of its tiles, and
# the others send no gradient back
COMPARED_QUERIES = 2048
# scores of the dense version that are held at once
_SCORES_AT_ONCE = 1 << 25
_GRADIENTS = ("dQ", "dK", "dV", "dSinks")
# where kernels are compared without being asked
_DEVICES = frozenset({"cuda"})


class Comparison(NamedTuple):
    """One tensor of the kernel against the same of the dense version."""

    name: str  # ``"output"``, ``"dQ"``, ``"dK"``, ``"dV"`` or ``"dSinks"``
    error: float  # largest difference; infinite where the kernel's values are not finite
    dense_error: float  # the same for dense attention in the kernel's dtype
    budget: float  # what the kernel may lose


@dataclass(frozen=True)
class SelfTestReport:
    """How far a kernel is from dense attention."""

    shape: Shape  # heads and dtype
    length: int  # tokens of the row
    comparisons: tuple[Comparison, ...]  # one for each tensor

    @property
    def wrong(self) -> list[Comparison]:
        """The tensors that are over budget."""
        return [found for found in self.comparisons if not found.error <= found.budget]


def _random_inputs(call: AttentionCall, layout: RowLayout, queries: Tensor) -> tuple[AttentionInputs, Tensor]:
    """Inputs drawn on the device, and a gradient of the output that comes from the compared ``queries`` only."""
    shape, generator = call.shape, _generator(layout.device)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=layout.device, dtype=shape.dtype)

    def heads(length: int, count: int, dim: int) -> Tensor:
        # token by token in memory, as a model's projections leave them: other strides would compile another kernel
        return rearrange(draw(layout.batch_size, length, count, dim), "b s h d -> b h s d")

    direction = torch.zeros_like(drawn := heads(layout.length, shape.query_heads, shape.value_dim))
    direction[:, :, queries] = drawn[:, :, queries]
    query, keys = heads(layout.length, shape.query_heads, shape.head_dim), (layout.keys or layout).length
    key, value = heads(keys, shape.key_heads, shape.head_dim), heads(keys, shape.key_heads, shape.value_dim)
    sinks = draw(shape.query_heads) if call.sinks else None
    return AttentionInputs(query, key, value, call.scaling, call.softcap, sinks), direction


def _leaves(
    inputs: AttentionInputs, grad: bool, dtype: torch.dtype | None = None
) -> tuple[AttentionInputs, list[Tensor]]:
    """The same values cut off from what made them, and those of them that gradients are taken in."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_(grad) for x in _tensors(inputs)]
    query, key, value, *sinks = tensors
    return AttentionInputs(query, key, value, inputs.scaling, inputs.softcap, sinks[0] if sinks else None), tensors


def _tensors(inputs: AttentionInputs) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, torch.Tensor)]


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


def _compared_queries(layout: RowLayout) -> Tensor:
    """Row indices of the queries that are compared, ascending int64: one out of each of as many parts of a row."""
    length, device = layout.length, layout.device
    if length <= COMPARED_QUERIES:
        return torch.arange(length, device=device)
    inside = torch.rand(COMPARED_QUERIES, generator=_generator(device), device=device)
    place = (torch.arange(COMPARED_QUERIES, device=device) + inside) * (length / COMPARED_QUERIES)
    queries: Tensor = place.long().clamp(max=length - 1).unique()
    return queries


def _dense(
    inputs: AttentionInputs, direction: Tensor, row_mask: RowMask, queries: Tensor, grad: bool
) -> dict[str, Tensor]:
    """Output at ``queries`` and gradients by the formula, some queries at a time."""
    query, key, value, *_ = inputs
    (batch, heads), length = query.shape[:2], key.shape[2]
    found = {"output": query.new_empty(batch, heads, len(queries), value.shape[3])}
    if grad:
        found |= dict(zip(_GRADIENTS, map(torch.zeros_like, _tensors(inputs)), strict=False))
    keys = torch.arange(length, device=queries.device)
    step = max(1, _SCORES_AT_ONCE // (length * heads))
    for row in range(batch):
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            here = slice(row, row + 1)
            leaves, wanted = _leaves(AttentionInputs(query[here, :, part], key[here], value[here], *inputs[3:]), grad)
            bias = bias_between(row_mask, row, part, keys, query.dtype, heads)
            output = softmax_attention(leaves, bias, score_mod=block_score_mod(row_mask, row, part, keys))
            found["output"][here, :, start : start + step] = output.detach()
            if grad:
                to_query, to_key, to_value, *to_sinks = torch.autograd.grad(output, wanted, direction[here, :, part])
                found["dQ"][here, :, part] = to_query
                found["dK"][here] += to_key
                found["dV"][here] += to_value
                if to_sinks:
                    found["dSinks"] += to_sinks[0]
    return found


def compare_kernel(
    call: AttentionCall, row_mask: RowMask, *, grad: bool = True, attend: AttentionKernel = run_flex
) -> SelfTestReport:
    """Run a kernel and the dense definition on random inputs under a row's own mask, and measure the difference.

    The definition runs in float64, which no setting makes coarser. In rows of more than ``COMPARED_QUERIES`` tokens as
    many queries are compared, from all parts of the row; the gradients of keys and values are theirs, whole.
    """
    device = row_mask.layout.device.type
    # a checkpoint around the layer that calls would drop what the comparison saves for its own backward pass
    keep = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with torch.autocast(device, enabled=False), torch.set_grad_enabled(grad), keep:
        queries = _compared_queries(row_mask.layout)
        inputs, direction = _random_inputs(call, row_mask.layout, queries)
        wide, _ = _leaves(inputs, grad, torch.float64)
        exact = _dense(wide, direction.double(), row_mask, queries, grad)
        plain = _dense(inputs, direction, row_mask, queries, grad)
        leaves, wanted = _leaves(inputs, grad)
        output = attend(leaves, row_mask)
        # what is not compared must be finite all the same
        finite = torch.isfinite(output.detach()).all()
        found = {"output": output.detach()[:, :, queries].masked_fill(~finite, float("nan"))}
        if grad:
            found |= dict(zip(_GRADIENTS, torch.autograd.grad(output, wanted, direction), strict=False))
    comparisons = tuple(_compare(name, found[name], plain[name], exact[name]) for name in exact)
    return SelfTestReport(call.shape, row_mask.layout.length, comparisons)


def _compare(name: str, found: Tensor, plain: Tensor, exact: Tensor) -> Comparison:
    error = (found.to(exact.dtype) - exact).abs().max()
    dense_error = (plain.to(exact.dtype) - exact).abs().max()
    budget = BUDGET_FACTOR * dense_error + BUDGET_SHARE * exact.abs().max()
    finite = bool(torch.isfinite(found).all())
    return Comparison(name, float(error) if finite else float("inf"), float(dense_error), float(budget))


_passed: set[tuple[str, KernelKey, Shape]] = set()


def is_compared(row_mask: RowMask, device: torch.device) -> bool:
    """Whether kernels under a mask are compared on a device: on CUDA unless the settings say no, and FLASH anywhere."""
    settings = row_mask.settings
    flash = row_mask.impl == "flex" and settings.backend == "FLASH"
    return flash or (settings.self_test and device.type in _DEVICES)


def require_correct_kernel(
    inputs: AttentionInputs, row_mask: RowMask, *, attend: AttentionKernel | None = None
) -> None:
    """Compare the kernel of a call as :func:`require_correct_call` does."""
    require_correct_call(AttentionCall.of(inputs), row_mask, grad=wants_gradients(inputs), attend=attend)


def require_correct_call(
    call: AttentionCall, row_mask: RowMask, *, grad: bool, attend: AttentionKernel | None = None
) -> None:
    """Compare the kernel of a call with dense attention the first time it is used, and stop where it is wrong.

    Nothing happens on a CPU, or where the settings ask for no self-test, unless the backend is one that needs it.

    Raises ``FlexdpoError`` naming everything that is wrong and by how much.
    """
    device = row_mask.layout.device
    if not is_compared(row_mask, device):
        return
    shape = call.shape
    key = kernel_key_of(call, row_mask, device.type, grad=grad)
    if (row_mask.impl, key, shape) in _passed:
        return
    if row_mask.impl == "flex" and row_mask.settings.backend == "FLASH" and device.type == "cuda":
        require_flash(FlashCall(shape.head_dim, shape.value_dim, shape.dtype, call.sinks, grad), device)
    report = compare_kernel(call, row_mask, grad=grad, attend=attend or run_flex)
    if report.wrong:
        raise FlexdpoError(_complaint(report, row_mask, device))
    _passed.add((row_mask.impl, key, shape))


def _complaint(report: SelfTestReport, row_mask: RowMask, device: torch.device) -> str:
    shape, backend = report.shape, row_mask.settings.backend
    kernel, way_out = f"FlexAttention (backend {backend})", "Use another torch, or attn_impl='sdpa'"
    if row_mask.impl == "varlen":
        kernel, way_out = "varlen_attn", "Use attn_impl='flex'"
    elif backend != "AUTO":
        way_out = "Leave BACKEND out of kernel_options"
    figures = ", ".join(
        f"{found.name} by {found.error:.2e} (dense attention in {shape.dtype}: {found.dense_error:.2e}, allowed: "
        f"{found.budget:.2e})"
        for found in report.wrong
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return (
        f"{kernel} and dense attention disagree under the mask {row_mask.kind.name!r} of "
        f"this row: {figures}, at {shape.query_heads} query heads, {shape.key_heads} key heads, head sizes "
        f"{shape.head_dim} and {shape.value_dim}, {report.length} tokens. Either the kernel is wrong here ({name}, "
        f"torch {torch.__version__}) or flexdpo's own mask is; nothing was trained. {way_out}, and report this line to "
        "flexdpo's issues"
    )
