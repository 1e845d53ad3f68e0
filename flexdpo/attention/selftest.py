"""Compares a kernel with dense attention where it is going to be used: these heads, this dtype, this row's mask.

Compiled attention has been silently wrong before, mostly in the gradients of keys and values under masks of its users'
own making. So the first row that trains is run twice: through the kernel and through the definition, in more precision.
What the definition itself loses in the kernel's dtype is the unit of the error budget.

Shapes: ``B`` rows, ``Hq`` query heads, ``Hkv`` key heads, ``S`` tokens, ``D`` and ``Dv`` head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flexdpo.attention.flex import KernelKey, kernel_key_of, run_flex
from flexdpo.attention.formula import softmax_attention
from flexdpo.attention.pieces import Piece
from flexdpo.attention.piecewise import piece_bias
from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.attention.row_mask import RowMask

# (query, key, value, row mask, scaling, softcap, sinks) -> output
AttentionKernel = Callable[..., Any]

# a kernel may lose this many times what the formula loses in the same dtype, and this share of the largest value
BUDGET_FACTOR, BUDGET_SHARE = 4.0, 1e-5
# scores of the dense version that are held at once
_SCORES_AT_ONCE = 1 << 26


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


def _random_inputs(shape: Shape, row_mask: RowMask, with_sinks: bool) -> _Inputs:
    layout = row_mask.layout
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(layout.device, shape.dtype)

    def heads(count: int, dim: int) -> Tensor:
        # token by token in memory, as a model's projections leave them: other strides would compile another kernel
        return draw(layout.batch_size, layout.length, count, dim).transpose(1, 2)

    return _Inputs(
        heads(shape.query_heads, shape.head_dim),
        heads(shape.key_heads, shape.head_dim),
        heads(shape.key_heads, shape.value_dim),
        draw(shape.query_heads) if with_sinks else None,
        heads(shape.query_heads, shape.value_dim),
    )


def _dense(
    inputs: _Inputs, row_mask: RowMask, scaling: float | None, softcap: float | None, grad: bool
) -> dict[str, Tensor]:
    """Output and gradients by the formula, some queries at a time."""
    query, key, value, sinks, direction = inputs
    batch, heads, length, _ = query.shape
    found = {"output": query.new_empty(batch, heads, length, value.shape[3])}
    if grad:
        found |= {"dQ": torch.empty_like(query), "dK": torch.zeros_like(key), "dV": torch.zeros_like(value)}
        found |= {} if sinks is None else {"dSinks": torch.zeros_like(sinks)}
    step = max(1, _SCORES_AT_ONCE // (length * heads))
    for row in range(batch):
        for start in range(0, length, step):
            queries = slice(start, min(start + step, length))
            bias = piece_bias(row_mask, Piece(row, start, queries.stop, ((0, length),)), query.dtype)
            leaves = [query[row : row + 1, :, queries], key[row : row + 1], value[row : row + 1]]
            leaves = [x.detach().requires_grad_(grad) for x in [*leaves, *([] if sinks is None else [sinks])]]
            sink = None if sinks is None else leaves[3]
            output = softmax_attention(
                leaves[0], leaves[1], leaves[2], bias, scaling=scaling, softcap=softcap, sinks=sink
            )
            found["output"][row : row + 1, :, queries] = output.detach()
            if grad:
                grads = torch.autograd.grad(output, leaves, direction[row : row + 1, :, queries])
                found["dQ"][row : row + 1, :, queries] = grads[0]
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

    The definition runs in float32, and in float64 where the kernel runs in float32.

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
    half = shape.dtype in (torch.bfloat16, torch.float16)
    # a checkpoint around the layer that calls would drop what the comparison saves for its own backward pass
    keep = torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged)
    with torch.autocast(device, enabled=False), torch.set_grad_enabled(grad), keep:
        inputs = _random_inputs(shape, row_mask, sinks)
        exact = _dense(inputs.to(torch.float32 if half else torch.float64), row_mask, scaling, softcap, grad)
        plain = _dense(inputs, row_mask, scaling, softcap, grad)
        found = _kernel_values(inputs, row_mask, scaling, softcap, grad, attend)
    return SelfTestReport(
        shape, row_mask.layout.length, tuple(_compare(name, found[name], plain[name], exact[name]) for name in exact)
    )


def _unchanged(saved: Tensor) -> Tensor:
    return saved


def _kernel_values(
    inputs: _Inputs,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    grad: bool,
    attend: AttentionKernel,
) -> dict[str, Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_(grad) for x in inputs[:4]]
    output = attend(*leaves[:3], row_mask, scaling, softcap, leaves[3])
    found = {"output": output.detach()}
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


def require_correct_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    attend: AttentionKernel = run_flex,
) -> None:
    """Compare the kernel of a call with dense attention the first time it is used, and stop where it is wrong.

    Nothing happens on a CPU, or where the settings ask for no self-test, unless the backend is one that needs it.

    Raises:
        FlexdpoError: naming what is wrong and by how much.
    """
    settings = row_mask.settings
    wanted = settings.self_test and query.device.type == "cuda"
    if not (wanted or (settings.backend == "FLASH" and row_mask.impl != "varlen")):
        return
    kernel_key = kernel_key_of(query, key, value, row_mask, scaling, softcap, sinks is not None)
    shape = Shape.of(query, key, value)
    if (row_mask.impl, kernel_key, shape) in _passed:
        return
    report = compare_kernel(
        shape,
        row_mask,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks is not None,
        grad=kernel_key.grad,
        attend=attend,
    )
    if report.wrong:
        raise FlexdpoError(_complaint(report, row_mask, query.device))
    _passed.add((row_mask.impl, kernel_key, shape))


def _complaint(report: SelfTestReport, row_mask: RowMask, device: torch.device) -> str:
    worst = max(report.wrong, key=lambda found: found.error / max(found.budget, 1e-30))
    shape = report.shape
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    backend = row_mask.settings.backend
    if row_mask.impl == "varlen":
        kernel, way_out = "varlen_attn", "use attn_impl='flex'"
    elif backend != "AUTO":
        kernel, way_out = f"FlexAttention (backend {backend})", "leave BACKEND out of kernel_options"
    else:
        kernel, way_out = f"FlexAttention (backend {backend})", "use another torch, or attn_impl='sdpa'"
    return (
        f"{kernel} is wrong on this device ({name}, torch {torch.__version__}): its "
        f"{worst.name} is off by {worst.error:.2e} where dense attention in {shape.dtype} is off by "
        f"{worst.dense_error:.2e}, at {shape.query_heads} query heads, {shape.key_heads} key heads, head size "
        f"{shape.head_dim}, {report.length} tokens, mask {row_mask.kind.name!r}; " + way_out
    )
