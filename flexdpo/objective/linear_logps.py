"""Log-probabilities of labels under a linear head, a chunk of targets at a time, forward and backward.

Full logits of ``T`` targets over ``V`` words are the largest tensor of a training step. Here a bounded number of them
exists at a time. The forward pass takes a few targets with all words and keeps one normaliser per target. The backward
pass projects again, a tile of targets and words at a time, words in the outer loop: the weight's gradient, the largest
by far, is finished block by block, where targets in the outer loop would read and write all of it for each of them.
``flexdpo/bench/lm_head.py`` counts what this costs on a GPU.

``torch.nn.functional.linear_cross_entropy`` (torch 2.13) needs as little memory. It is not used: on one CPU
core, with 8192 targets, 131072 words and hidden size 512, it took 102 s, this 41 s and full logits 80 s; and
it knows no softcap.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

# logits held at a time, in elements: enough that products run at full speed, few beside the weight's gradient; meta
# tensors stand for a GPU's where the work is counted
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26, "meta": 2**26}
# devices that multiply half matrices into float32; elsewhere halves are multiplied as float32
_MULTIPLY_HALVES = ("cuda", "meta")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: ``softcap * tanh(scale * logit / softcap)``."""

    scale: float = 1.0  # factor on the logits (Granite, Cohere)
    softcap: float | None = None  # bound of the scaled logits (Gemma); ``None`` leaves them unbounded

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits, differentiably."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


IDENTITY = LogitTransform()


class TargetLogps(NamedTuple):
    """Values of ``T`` targets."""

    logps: Tensor  # log-probability of each label in nats, ``[T]``, float32 or better
    # ``log(sum over words of p^2)`` at each target, ``[T]``, without gradient; ``None`` if not asked
    log_sum_squares: Tensor | None


def logits_logps(logits: Tensor, labels: Tensor, *, with_log_sum_squares: bool = False) -> TargetLogps:
    """Return the log-probability of each label, ``[T]`` int64, under logits that exist already, ``[T, V]``."""
    if logits.shape[0] != labels.shape[0]:
        raise FlexdpoError(f"got {logits.shape[0]} rows of logits for {labels.shape[0]} targets")
    logits = _wide(logits)
    normaliser = logits.logsumexp(dim=1)
    logps = logits.gather(1, labels[:, None])[:, 0] - normaliser
    if not with_log_sum_squares:
        return TargetLogps(logps, None)
    return TargetLogps(logps, (2 * logits.detach()).logsumexp(dim=1) - 2 * normaliser.detach())


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

    Shapes: final hidden states at the predicting positions ``[T, H]``, weight ``[V, H]``, bias ``[V]``, labels ``[T]``
    int64. ``chunk_size`` are the targets per chunk of the forward pass, whose number of logits the backward pass does
    not exceed; by default that number is fixed.

    Returns what is differentiable (once) in ``hidden``, ``weight`` and ``bias``; where these two are frozen, there is
    no second projection. Raises ``FlexdpoError`` if the shapes do not fit.
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

    For heads that are more than a plain matrix: adapters, quantised weights, wrappers. ``head`` maps ``[1, C, H]`` to
    ``[1, C, V]``; the other arguments are those of :func:`linear_logps`.
    """

    def values(states: Tensor, wanted: Tensor) -> TargetLogps:
        return logits_logps(transform(_wide(head(states[None])[0])), wanted, with_log_sum_squares=with_log_sum_squares)

    run = partial(checkpoint, values, use_reentrant=False) if torch.is_grad_enabled() else values
    chunks = _chunks(hidden.shape[0], chunk_size or targets_per_chunk(vocabulary, hidden.device))
    parts: list[Any] = [run(hidden[part], labels[part]) for part in chunks]
    squares = torch.cat([part.log_sum_squares for part in parts]) if with_log_sum_squares else None
    return TargetLogps(torch.cat([part.logps for part in parts]), squares)


def targets_per_chunk(vocabulary: int, device: torch.device) -> int:
    """Targets whose logits are held at once."""
    return max(1, _CHUNK_ELEMENTS.get(device.type, 2**25) // vocabulary)


def tile_shape(targets: int, vocabulary: int, elements: int) -> tuple[int, int]:
    """Targets and words of a tile of at most so many logits, near a square.

    Each product of a tile reads and writes a block of a gradient, ``[targets, H]`` or ``[words, H]``; the longer the
    tile's other side, the less that is beside the multiplications.
    """
    side = max(math.isqrt(elements), elements // vocabulary, 1)
    # all alike, since a last tile of a few targets costs nearly as much as a full one
    rows = -(-targets // max(1, round(targets / side), -(-targets // elements))) or 1
    words = max(1, min(vocabulary, elements // rows))
    # whole tensor-core tiles, and rows that begin at multiples of 16 bytes
    return rows, words if words == vocabulary else words - words % 128 or words


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(total: int, size: int) -> Iterator[slice]:
    """Slices that cover ``total``; one empty slice where that is 0."""
    return (slice(start, min(start + size, total)) for start in range(0, max(total, 1), size))


class _Products:
    """Products with a head's matrix in one dtype, with results in float32 or better, and what follows the head."""

    def __init__(self, dtype: torch.dtype, device: torch.device, transform: LogitTransform) -> None:
        self.wide = torch.promote_types(dtype, torch.float32)  # of the results
        self.half = dtype != self.wide and device.type in _MULTIPLY_HALVES  # the factors stay in half precision
        self.dtype = dtype if self.half else self.wide  # of the factors
        self.transform = transform

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool = False, scale: float = 1.0) -> Tensor:
        """Write ``scale * left @ right`` into ``out``, or add it there."""
        form: dict[str, Any] = {"out_dtype": self.wide} if self.half else {}
        return torch.addmm(out, left, right, beta=int(add), alpha=scale, out=out, **form)

    def logits(self, states: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """Write scaled logits; with a softcap, divided by it and bent."""
        scale = self.transform.scale / (self.transform.softcap or 1.0)
        if bias is not None:
            out.copy_(bias.to(out.dtype) * scale)
        self.multiply(states, matrix.t(), out, add=bias is not None, scale=scale)
        return out if self.transform.softcap is None else out.tanh_()

    def exponents(
        self, states: Tensor, matrix: Tensor, bias: Tensor | None, shift: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits minus ``shift``, ``[T, B]``, and the hyperbolic tangent of a softcap, ``None`` without one."""
        scale, softcap = self.transform.scale, self.transform.softcap
        if softcap is not None:
            bent = self.logits(states, matrix, bias, out)
            return torch.add(-shift[:, None], bent, alpha=softcap), bent
        # written first, so that the product adds itself to it and nothing else goes over the tile
        if bias is None:
            out.copy_(-shift[:, None])
        else:
            torch.sub(bias.to(out.dtype) * scale, shift[:, None], out=out)
        return self.multiply(states, matrix.t(), out, add=True, scale=scale), None

    def error(
        self,
        exponents: Tensor,
        labels: Tensor,
        first_word: int,
        at_labels: Tensor,
        bent: Tensor | None,
        *,
        keep: bool = False,
    ) -> Tensor:
        """Return ``exp(exponents)`` with other values at the labels, times the slope ``1 - bent^2`` of a softcap.

        Labels that are none of the ``B`` words from ``first_word`` on change nothing. The exponents, ``[T, B]``, are
        overwritten where the result has their dtype; it has that of the factors unless ``keep``.
        """
        # the last pass also rounds, which costs nothing there
        rounded = torch.empty_like(exponents, dtype=self.dtype) if self.half and not keep else exponents
        error = torch.exp(exponents, out=rounded if bent is None else exponents)
        columns = (labels[:, None] - first_word).clamp(0, exponents.shape[1] - 1)
        there = labels[:, None] == columns + first_word
        error.scatter_(1, columns, at_labels[:, None].to(error.dtype).where(there, error.gather(1, columns)))
        if bent is not None:
            torch.addcmul(error, error, bent.square_(), value=-1, out=rounded)
        return rounded


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
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        device = hidden.device.type
        if dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        ctx.transform, ctx.elements, ctx.dtype = transform, chunk * len(weight), dtype
        # with a frozen head the gradient of each target is known now, up to the factor that comes from behind
        ctx.direct = ctx.needs_input_grad[0] and not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        with _no_autocast(hidden.device.type):
            products = _Products(dtype, hidden.device, transform)
            matrix = weight.to(products.dtype)
            logps = hidden.new_empty(len(hidden), dtype=products.wide)
            normaliser = torch.empty_like(logps)
            squares = torch.empty_like(logps) if with_squares else logps.new_empty(0)
            slopes = hidden.new_empty(hidden.shape, dtype=products.wide) if ctx.direct else None
            logits, log_p = logps.new_empty(2, min(chunk, len(hidden)), len(weight))
            for part in _chunks(len(hidden), chunk):
                rows = part.stop - part.start
                states, columns = hidden[part].to(products.dtype), labels[part, None]
                scores = products.logits(states, matrix, bias, logits[:rows])
                if transform.softcap is not None:
                    scores.mul_(transform.softcap)
                chosen = torch.log_softmax(scores, dim=1, out=log_p[:rows])
                logps[part] = chosen.gather(1, columns)[:, 0]
                normaliser[part] = scores.gather(1, columns)[:, 0] - logps[part]
                if with_squares:
                    squares[part] = (2 * chosen).logsumexp(dim=1)
                if slopes is not None:
                    bent = None if transform.softcap is None else scores.div_(transform.softcap)
                    error = products.error(chosen, labels[part], 0, logps[part].expm1(), bent)
                    products.multiply(error, matrix, slopes[part])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        elif any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, weight, bias, labels, normaliser, logps)
        ctx.hidden_dtype = hidden.dtype
        ctx.mark_non_differentiable(squares)
        return logps, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # the gradient in the raw logits is this factor times p, or times p - 1 at the label
        factor = -ctx.transform.scale * gradient
        if ctx.direct:
            (slopes,) = ctx.saved_tensors
            return (slopes * factor[:, None]).to(ctx.hidden_dtype), *(None,) * 6
        with _no_autocast(gradient.device.type):
            return *_weighted_gradients(ctx, factor), *(None,) * 4


def _weighted_gradients(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias, tile by tile.

    The factor's size goes into the exponent that makes ``p``, which costs no pass over the tile, and its sign to the
    hidden states, where it is exact in every dtype.
    """
    hidden, weight, bias, labels, normaliser, logps = ctx.saved_tensors
    products = _Products(ctx.dtype, hidden.device, ctx.transform)
    shift, sign = normaliser - factor.abs().log(), factor.sign()[:, None]
    at_labels = logps.expm1() * factor.abs()
    states, signed = hidden.to(products.dtype), (hidden * sign).to(products.dtype)
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    to_hidden = hidden.new_empty(hidden.shape, dtype=products.wide) if wants_hidden else None
    to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wants_weight else None
    to_bias = bias.new_zeros(bias.shape, dtype=products.wide) if wants_bias else None
    height, width = tile_shape(len(hidden), len(weight), ctx.elements)
    memory = normaliser.new_empty(height * width)
    for words in _chunks(len(weight), width):
        matrix = weight[words].to(products.dtype)
        block = None if to_weight is None else to_weight[words]
        if block is not None and block.dtype != products.wide:
            block = torch.empty_like(block, dtype=products.wide)
        for part in _chunks(len(hidden), height):
            rows = part.stop - part.start
            scores = memory[: rows * len(matrix)].view(rows, len(matrix))
            own_bias = None if bias is None else bias[words]
            exponents, bent = products.exponents(states[part], matrix, own_bias, shift[part], scores)
            error = products.error(exponents, labels[part], words.start, at_labels[part], bent, keep=wants_bias)
            if to_bias is not None:
                to_bias[words] += (error * sign[part]).sum(dim=0)
            error = error.to(products.dtype)
            if to_hidden is not None:
                products.multiply(error, matrix, to_hidden[part], add=words.start > 0)
            if block is not None:
                products.multiply(error.t(), signed[part], block, add=part.start > 0)
        if to_weight is not None and block is not None and block.dtype != to_weight.dtype:
            to_weight[words] = block
    return (
        None if to_hidden is None else to_hidden.mul_(sign).to(hidden.dtype),
        to_weight,
        None if to_bias is None else to_bias.to(bias.dtype),
    )


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast, on devices that have it; meta tensors have none."""
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )
