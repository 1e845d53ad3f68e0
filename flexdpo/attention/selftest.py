"""Compares a kernel with dense attention where it is going to be used: these heads, this dtype, this row's mask.

Compiled attention has been silently wrong before, mostly in the gradients of keys and values under masks of its users'
own making. So the first row that trains is run twice: through the kernel and through the definition, in more precision.
What the definition itself loses in the kernel's dtype is the unit of the error budget. A layer that ``torch.compile``
turns into one graph has FlexAttention inside of it, out of reach; there the same kernel, under the same mask and with
the same options, is compared by itself before the layer first runs (:func:`require_correct_call`).

Shapes: ``B`` rows, ``Hq`` query heads, ``Hkv`` key heads, ``S`` tokens, ``D`` and ``Dv`` head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flexdpo.attention.blockwise import bias_between, block_score_mod
from flexdpo.attention.flash import FlashCall, require_flash
from flexdpo.attention.flex import KernelKey, kernel_key_of, run_flex, wants_gradients
from flexdpo.attention.formula import softmax_attention
from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.attention.row_mask import RowMask
    from flexdpo.layout.row import RowLayout

# (query, key, value, row mask, scaling, softcap, sinks) -> output
AttentionKernel = Callable[..., Any]

# a kernel may lose this many times what the formula loses in the same dtype, and this share of the largest value
BUDGET_FACTOR, BUDGET_SHARE = 4.0, 1e-5
# queries of a row whose output and gradients are compared; in a longer row they are drawn from all of its tiles, and
# the others send no gradient back
COMPARED_QUERIES = 2048
# scores of the dense version that are held at once
_SCORES_AT_ONCE = 1 << 25
# where kernels are compared without being asked
_DEVICES = frozenset({"cuda"})


class Shape(NamedTuple):
    """What a kernel is compiled for, besides its mask.

    Attributes:
        query_heads: ``Hq``.
        key_heads: ``Hkv``.
        head_dim: ``D``.
        value_dim: ``Dv``.
        dtype: Of the inputs.
    """

    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Shape:
        """The shape of a call."""
        return cls(query.shape[1], key.shape[1], query.shape[3], value.shape[3], query.dtype)


class AttentionCall(NamedTuple):
    """What a layer asks of its attention, besides the mask.

    Attributes:
        shape: Heads and dtype.
        scaling: Factor on the scores.
        softcap: Bound of the scores.
        sinks: Whether every head has a sink.
    """

    shape: Shape
    scaling: float | None
    softcap: float | None
    sinks: bool


class Comparison(NamedTuple):
    """One tensor of the kernel against the same of the dense version.

    Attributes:
        name: ``"output"``, ``"dQ"``, ``"dK"``, ``"dV"`` or ``"dSinks"``.
        error: Largest difference; infinite where the kernel's values are not finite.
        dense_error: The same for dense attention in the kernel's dtype.
        budget: What the kernel may lose.
    """

    name: str
    error: float
    dense_error: float
    budget: float


@dataclass(frozen=True)
class SelfTestReport:
    """How far a kernel is from dense attention.

    Attributes:
        shape: Heads and dtype.
        length: Tokens of the row.
        comparisons: One for each tensor.
    """

    shape: Shape
    length: int
    comparisons: tuple[Comparison, ...]

    @property
    def wrong(self) -> list[Comparison]:
        """The tensors that are over budget."""
        return [found for found in self.comparisons if not found.error <= found.budget]


# --- the dense version -----------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    direction: Tensor

    def to(self, dtype: torch.dtype) -> _Inputs:
        return _Inputs(*(None if x is None else x.to(dtype) for x in self))  # type: ignore[arg-type]


def _random_inputs(shape: Shape, row_mask: RowMask, with_sinks: bool, queries: Tensor) -> _Inputs:
    """Inputs drawn on the device, with a gradient that comes back from the compared ``queries`` only."""
    layout = row_mask.layout
    generator = _generator(layout.device)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=layout.device, dtype=shape.dtype)

    def heads(count: int, dim: int) -> Tensor:
        # token by token in memory, as a model's projections leave them: other strides would compile another kernel
        return draw(layout.batch_size, layout.length, count, dim).transpose(1, 2)

    direction = torch.zeros_like(drawn := heads(shape.query_heads, shape.value_dim))
    direction[:, :, queries] = drawn[:, :, queries]
    return _Inputs(
        heads(shape.query_heads, shape.head_dim),
        heads(shape.key_heads, shape.head_dim),
        heads(shape.key_heads, shape.value_dim),
        draw(shape.query_heads) if with_sinks else None,
        direction,
    )


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
    inputs: _Inputs, row_mask: RowMask, queries: Tensor, scaling: float | None, softcap: float | None, grad: bool
) -> dict[str, Tensor]:
    """Output at ``queries`` and gradients by the formula, some queries at a time."""
    query, key, value, sinks, direction = inputs
    batch, heads, length, _ = query.shape
    found = {"output": query.new_empty(batch, heads, len(queries), value.shape[3])}
    if grad:
        found |= {"dQ": torch.zeros_like(query), "dK": torch.zeros_like(key), "dV": torch.zeros_like(value)}
        found |= {} if sinks is None else {"dSinks": torch.zeros_like(sinks)}
    keys = torch.arange(length, device=queries.device)
    step = max(1, _SCORES_AT_ONCE // (length * heads))
    for row in range(batch):
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            bias = bias_between(row_mask, row, part, keys, query.dtype, heads)
            leaves = [query[row : row + 1, :, part], key[row : row + 1], value[row : row + 1]]
            leaves = [x.detach().requires_grad_(grad) for x in [*leaves, *([] if sinks is None else [sinks])]]
            sink = None if sinks is None else leaves[3]
            score_mod = block_score_mod(row_mask, row, part, keys)
            output = softmax_attention(
                leaves[0], leaves[1], leaves[2], bias, scaling=scaling, softcap=softcap, sinks=sink, score_mod=score_mod
            )
            found["output"][row : row + 1, :, start : start + step] = output.detach()
            if grad:
                grads = torch.autograd.grad(output, leaves, direction[row : row + 1, :, part])
                found["dQ"][row : row + 1, :, part] = grads[0]
                found["dK"][row] += grads[1][0]
                found["dV"][row] += grads[2][0]
                if sinks is not None:
                    found["dSinks"] += grads[3]
    return found


# --- the comparison --------------------------------------------------------------------------------------------------


def compare_kernel(
    shape: Shape,
    row_mask: RowMask,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    grad: bool = True,
    attend: AttentionKernel = run_flex,
) -> SelfTestReport:
    """Run a kernel and the dense definition on random inputs under a row's own mask, and measure the difference.

    The definition runs in float64, which no setting makes coarser. In rows of more than ``COMPARED_QUERIES`` tokens as
    many queries are compared, from all parts of the row; the gradients of keys and values are theirs, whole.

    Args:
        shape: Heads and dtype.
        row_mask: The mask, on the device to be tested.
        scaling: Factor on the scores.
        softcap: Bound of the scores.
        sinks: Whether every head has a sink.
        grad: Also compare the gradients.
        attend: The kernel: takes what :func:`flexdpo.attention.flex.run_flex` takes.

    Returns:
        Errors and budgets of the output and, with ``grad``, of the gradients.
    """
    device = row_mask.layout.device.type
    # a checkpoint around the layer that calls would drop what the comparison saves for its own backward pass
    keep = torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged)
    with torch.autocast(device, enabled=False), torch.set_grad_enabled(grad), keep:
        queries = _compared_queries(row_mask.layout)
        inputs = _random_inputs(shape, row_mask, sinks, queries)
        exact = _dense(inputs.to(torch.float64), row_mask, queries, scaling, softcap, grad)
        plain = _dense(inputs, row_mask, queries, scaling, softcap, grad)
        found = _kernel_values(inputs, row_mask, queries, scaling, softcap, grad, attend)
    return SelfTestReport(
        shape, row_mask.layout.length, tuple(_compare(name, found[name], plain[name], exact[name]) for name in exact)
    )


def _unchanged(saved: Tensor) -> Tensor:
    return saved


def _kernel_values(
    inputs: _Inputs,
    row_mask: RowMask,
    queries: Tensor,
    scaling: float | None,
    softcap: float | None,
    grad: bool,
    attend: AttentionKernel,
) -> dict[str, Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_(grad) for x in inputs[:4]]
    output = attend(*leaves[:3], row_mask, scaling, softcap, leaves[3])
    # what is not compared must be finite all the same
    finite = torch.isfinite(output.detach()).all()
    found = {"output": output.detach()[:, :, queries].masked_fill(~finite, float("nan"))}
    if grad:
        names = ("dQ", "dK", "dV", "dSinks")
        wanted = [x for x in leaves if x is not None]
        found |= dict(zip(names, torch.autograd.grad(output, wanted, inputs.direction), strict=False))
    return found


def _compare(name: str, found: Tensor, plain: Tensor, exact: Tensor) -> Comparison:
    error = (found.to(exact.dtype) - exact).abs().max()
    dense_error = (plain.to(exact.dtype) - exact).abs().max()
    budget = BUDGET_FACTOR * dense_error + BUDGET_SHARE * exact.abs().max()
    finite = bool(torch.isfinite(found).all())
    return Comparison(name, float(error) if finite else float("inf"), float(dense_error), float(budget))


# --- at the first row that trains ------------------------------------------------------------------------------------

_passed: set[tuple[str, KernelKey, Shape]] = set()


def is_compared(row_mask: RowMask, device: torch.device) -> bool:
    """Whether kernels under a mask are compared on a device: on CUDA unless the settings say no, and FLASH anywhere."""
    settings = row_mask.settings
    flash = row_mask.impl == "flex" and settings.backend == "FLASH"
    return flash or (settings.self_test and device.type in _DEVICES)


def require_correct_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    attend: AttentionKernel | None = None,
) -> None:
    """Compare the kernel of a call as :func:`require_correct_call` does."""
    call = AttentionCall(Shape.of(query, key, value), scaling, softcap, sinks is not None)
    require_correct_call(call, row_mask, grad=wants_gradients(query, key, value), attend=attend)


def require_correct_call(
    call: AttentionCall, row_mask: RowMask, *, grad: bool, attend: AttentionKernel | None = None
) -> None:
    """Compare the kernel of a call with dense attention the first time it is used, and stop where it is wrong.

    Nothing happens on a CPU, or where the settings ask for no self-test, unless the backend is one that needs it.

    Args:
        call: What is asked of the kernel.
        row_mask: The mask, on the device where the kernel runs.
        grad: Whether a backward follows.
        attend: The kernel, :func:`flexdpo.attention.flex.run_flex` by default.

    Raises:
        FlexdpoError: naming everything that is wrong and by how much.
    """
    device = row_mask.layout.device
    if not is_compared(row_mask, device):
        return
    shape, scaling, softcap, sinks = call
    key = kernel_key_of(row_mask, device.type, grad=grad, scaling=scaling, softcap=softcap, sinks=sinks)
    if (row_mask.impl, key, shape) in _passed:
        return
    if row_mask.impl == "flex" and row_mask.settings.backend == "FLASH" and device.type == "cuda":
        require_flash(FlashCall(shape.head_dim, shape.value_dim, shape.dtype, sinks, grad), device)
    report = compare_kernel(
        shape, row_mask, scaling=scaling, softcap=softcap, sinks=sinks, grad=grad, attend=attend or run_flex
    )
    if report.wrong:
        raise FlexdpoError(_complaint(report, row_mask, device))
    _passed.add((row_mask.impl, key, shape))


def _complaint(report: SelfTestReport, row_mask: RowMask, device: torch.device) -> str:
    shape, backend = report.shape, row_mask.settings.backend
    if row_mask.impl == "varlen":
        kernel, way_out = "varlen_attn", "Use attn_impl='flex'"
    else:
        kernel = f"FlexAttention (backend {backend})"
        way_out = "Use another torch, or attn_impl='sdpa'"
        way_out = way_out if backend == "AUTO" else "Leave BACKEND out of kernel_options"
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
