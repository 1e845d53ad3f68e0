"""Log-probabilities of labels under a linear head, a chunk of targets at a time, forward and backward.

Full logits of ``T`` targets over ``V`` words are the largest tensor of a training step. Here they exist for one chunk
of targets only: the forward pass keeps one normaliser per target, and the backward pass projects each chunk again.
Memory beyond inputs and gradients is one chunk, whatever ``T * V`` is.

``torch.nn.functional.linear_cross_entropy`` (torch 2.13) needs as little memory. It is not used: on one CPU
core, with 8192 targets, 131072 words and hidden size 512, it took 102 s, this 41 s and full logits 80 s; and
it knows no softcap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

# logits of one chunk, in elements: enough that the projection runs at full speed, few beside the weight's gradient
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: ``softcap * tanh(scale * logit / softcap)``.

    Attributes:
        scale: Factor on the logits (Granite, Cohere).
        softcap: Bound of the scaled logits (Gemma); ``None`` leaves them unbounded.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform logits in place, and return them."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits, differentiably."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, transformed: Tensor) -> Tensor | None:
        """Derivative at given transformed logits; ``None`` where it is 1 everywhere."""
        if self.softcap is not None:
            return (1 - (transformed / self.softcap).square_()).mul_(self.scale)
        return transformed.new_tensor(self.scale) if self.scale != 1.0 else None


IDENTITY = LogitTransform()


class TargetLogps(NamedTuple):
    """Values of ``T`` targets.

    Attributes:
        logps: Log-probability of each label in nats, ``[T]``, float32 or better.
        log_sum_squares: ``log(sum over words of p^2)`` at each target, ``[T]``, without gradient; ``None`` if not
            asked.
    """

    logps: Tensor
    log_sum_squares: Tensor | None


def logits_logps(logits: Tensor, labels: Tensor, *, with_log_sum_squares: bool = False) -> TargetLogps:
    """Return the log-probability of each label under logits that exist already.

    Args:
        logits: ``[T, V]``, any float dtype.
        labels: ``[T]`` int64.
        with_log_sum_squares: Also return ``log(sum p^2)``.
    """
    if logits.shape[0] != labels.shape[0]:
        raise FlexdpoError(f"got {logits.shape[0]} rows of logits for {labels.shape[0]} targets")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = logits.logsumexp(dim=1)
    logps = logits.gather(1, labels[:, None])[:, 0] - normaliser
    squares = None
    if with_log_sum_squares:
        squares = (2 * logits.detach()).logsumexp(dim=1) - 2 * normaliser.detach()
    return TargetLogps(logps, squares)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    transform: LogitTransform = IDENTITY,
    with_log_sum_squares: bool = False,
    chunk_size: int | None = None,
) -> TargetLogps:
    """Return the log-probability of each label under a linear head, without ever holding all logits.

    Half inputs are multiplied with float32 accumulation and everything after the projection is float32; float64 stays
    float64. Under autocast on CUDA the projection takes autocast's dtype, as ``torch.nn.Linear`` does; elsewhere
    float32 weights are multiplied as they are.

    Shapes: ``T`` targets, ``H`` hidden size, ``V`` vocabulary.

    Args:
        hidden: Final hidden states at the predicting positions, ``[T, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or ``None``.
        labels: ``[T]`` int64.
        transform: What follows the projection.
        with_log_sum_squares: Also return ``log(sum p^2)``.
        chunk_size: Targets per chunk; by default as many as keep a chunk's logits at a fixed size.

    Returns:
        Differentiable (once) in ``hidden``, ``weight`` and ``bias``. Frozen weight and bias save the second projection.

    Raises:
        FlexdpoError: if the shapes do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise FlexdpoError(f"hidden [T, H] and weight [V, H] do not fit: {list(hidden.shape)}, {list(weight.shape)}")
    if hidden.shape[0] != labels.shape[0]:
        raise FlexdpoError(f"got {hidden.shape[0]} hidden states for {labels.shape[0]} targets")
    chunk = chunk_size or targets_per_chunk(weight.shape[0], hidden.device)
    # an empty tensor stands for the squares that were not asked for
    logps, squares = _LinearLogps.apply(hidden, weight, bias, labels, transform, chunk, with_log_sum_squares)
    return TargetLogps(logps, squares if with_log_sum_squares else None)


def module_logps(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    transform: LogitTransform = IDENTITY,
    with_log_sum_squares: bool = False,
    chunk_size: int | None = None,
) -> TargetLogps:
    """Return the log-probability of each label under any head, each chunk of targets recomputed in the backward pass.

    For heads that are more than a plain matrix: adapters, quantised weights, wrappers.

    Args:
        head: Maps ``[1, C, H]`` to logits ``[1, C, V]``.
        hidden: ``[T, H]``.
        labels: ``[T]`` int64.
        vocabulary: ``V``, which decides the size of a chunk.
        transform: What follows the head.
        with_log_sum_squares: Also return ``log(sum p^2)``.
        chunk_size: Targets per chunk.
    """

    def values(states: Tensor, wanted: Tensor) -> TargetLogps:
        return logits_logps(transform(_wide(head(states[None])[0])), wanted, with_log_sum_squares=with_log_sum_squares)

    parts = []
    for part in _chunks(hidden.shape[0], chunk_size or targets_per_chunk(vocabulary, hidden.device)):
        if torch.is_grad_enabled():
            parts.append(checkpoint(values, hidden[part], labels[part], use_reentrant=False))
        else:
            parts.append(values(hidden[part], labels[part]))
    squares = torch.cat([part.log_sum_squares for part in parts]) if with_log_sum_squares else None
    return TargetLogps(torch.cat([part.logps for part in parts]), squares)


def targets_per_chunk(vocabulary: int, device: torch.device) -> int:
    """Targets whose logits are held at once."""
    return max(1, _CHUNK_ELEMENTS.get(device.type, 2**25) // vocabulary)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class _Projection:
    """The head's matrix in the dtype it is multiplied in, and the products that forward and backward need of it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, transform: LogitTransform) -> None:
        self.wide = torch.promote_types(dtype, torch.float32)
        # only CUDA multiplies half matrices into float32; elsewhere one float32 copy serves the whole pass
        self.half = dtype != self.wide and weight.device.type == "cuda"
        self.dtype = dtype if self.half else self.wide
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.wide)
        self.transform = transform
        self._buffer: Tensor | None = None

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """A product in float32 or better, ``[M, K] x [K, N]``."""
        left, right = left.to(self.dtype), right.to(self.dtype)
        return torch.mm(left, right, out_dtype=torch.float32) if self.half else torch.mm(left, right)

    def logits(self, states: Tensor) -> Tensor:
        """Transformed logits of a chunk, ``[C, V]``; the memory is used again by the next call."""
        if self.half:
            logits = self.multiply(states, self.weight.t())
        else:
            if self._buffer is None or len(self._buffer) < len(states):
                self._buffer = states.new_empty(len(states), len(self.weight), dtype=self.wide)
            logits = torch.mm(states.to(self.dtype), self.weight.t(), out=self._buffer[: len(states)])
        if self.bias is not None:
            logits.add_(self.bias)
        return self.transform.apply_(logits)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        chunk: int,
        with_squares: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        ctx.transform, ctx.chunk, ctx.dtype = transform, chunk, dtype
        # with a frozen head the gradient of each target is known now, up to the factor that comes from behind
        ctx.direct = ctx.needs_input_grad[0] and not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        with torch.autocast(device, enabled=False):
            projection = _Projection(weight, bias, dtype, transform)
            logps = hidden.new_empty(len(hidden), dtype=projection.wide)
            normaliser = torch.empty_like(logps)
            squares = torch.empty_like(logps) if with_squares else logps.new_empty(0)
            slopes = hidden.new_empty(hidden.shape, dtype=projection.wide) if ctx.direct else None
            for part in _chunks(len(hidden), chunk):
                logits = projection.logits(hidden[part])
                normaliser[part] = logits.logsumexp(dim=1)
                logps[part] = logits.gather(1, labels[part, None])[:, 0] - normaliser[part]
                if with_squares:
                    squares[part] = (2 * logits).logsumexp(dim=1) - 2 * normaliser[part]
                if slopes is not None:
                    error = _logit_gradient_(logits, normaliser[part], labels[part], None, transform)
                    slopes[part] = projection.multiply(error, projection.weight)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        elif any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, weight, bias, labels, normaliser)
        ctx.hidden_dtype = hidden.dtype
        ctx.mark_non_differentiable(squares)
        return logps, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.direct:
            (slopes,) = ctx.saved_tensors
            return (slopes * gradient[:, None]).to(ctx.hidden_dtype), None, None, None, None, None, None
        hidden, weight, bias, labels, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            projection = _Projection(weight, bias, ctx.dtype, ctx.transform)
            wide = projection.wide
            to_hidden = hidden.new_empty(hidden.shape) if wants_hidden else None
            to_weight = weight.new_zeros(weight.shape, dtype=wide) if wants_weight else None
            to_bias = bias.new_zeros(bias.shape, dtype=wide) if wants_bias else None
            for part in _chunks(len(hidden), ctx.chunk):
                states = hidden[part]
                logits = projection.logits(states)
                error = _logit_gradient_(logits, normaliser[part], labels[part], gradient[part], ctx.transform)
                if to_hidden is not None:
                    to_hidden[part] = projection.multiply(error, projection.weight)
                if to_weight is not None:
                    _add_product_(to_weight, error.t(), states, projection)
                if to_bias is not None:
                    to_bias += error.sum(dim=0)
        return (
            to_hidden,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _logit_gradient_(
    logits: Tensor, normaliser: Tensor, labels: Tensor, gradient: Tensor | None, transform: LogitTransform
) -> Tensor:
    """Gradient of ``logps * gradient`` in the head's raw output, written over the transformed ``logits``."""
    slope = transform.slope(logits)
    error = logits.sub_(normaliser[:, None]).exp_()
    rows = torch.arange(len(labels), device=labels.device)
    if gradient is None:
        error.neg_()
        error[rows, labels] += 1
    else:
        error.mul_(-gradient[:, None])
        error[rows, labels] += gradient
    return error if slope is None else error.mul_(slope)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, projection: _Projection) -> None:
    if projection.half:
        total += projection.multiply(left, right)
    else:
        total.addmm_(left, right.to(projection.dtype))
