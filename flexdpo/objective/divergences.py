"""What an implicit reward is when the policy is held near its reference by another divergence than reverse KL.

Wang et al. 2023, "Beyond Reverse KL" (arXiv:2309.16240): under an f-divergence the reward of a response is
``beta * f'(policy / reference)`` up to a constant of the prompt. The constant cancels in ``chosen - rejected`` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from flexdpo.errors import FlexdpoError, nearest

if TYPE_CHECKING:
    from torch import Tensor


def reverse_kl(logratios: Tensor) -> Tensor:
    """``f(t) = t log t``: the score is ``log t`` (up to a constant), ordinary DPO."""
    return logratios


def forward_kl(logratios: Tensor) -> Tensor:
    """``f(t) = -log t``: the score is ``-1 / t``, here plus 1, so that it is 0 where policy and reference agree."""
    return -_bounded_expm1(-logratios)


def js_divergence(logratios: Tensor) -> Tensor:
    """Jensen-Shannon: the score is ``log(2 t / (1 + t))``."""
    return math.log(2.0) + F.logsigmoid(logratios)


def alpha_divergence(logratios: Tensor, alpha: float) -> Tensor:
    """``f'(t) = (t^(alpha - 1) - 1) / (alpha - 1)``, which tends to ``log t`` as ``alpha`` tends to 1."""
    exponent = alpha - 1.0
    if abs(exponent) < 1e-6:
        return logratios
    return _bounded_expm1(exponent * logratios, divisor=exponent) / exponent


def _bounded_expm1(exponents: Tensor, divisor: float = 1.0) -> Tensor:
    """``exp(x) - 1``, with a value that its dtype holds and a slope that float32 holds.

    The slope reaches the targets, which are float32 even where sums of them are float64: an exponential that only
    float64 holds would turn into infinities there, and into NaN behind them. Half of what a dtype holds is left, so
    that a difference of two such scores still fits.

    ``divisor`` is what the result will be divided by.
    """
    room = math.log(min(1.0, abs(divisor)) / 2)
    largest = math.log(torch.finfo(exponents.dtype).max) + room
    steepest = min(largest, math.log(torch.finfo(torch.float32).max) + room)
    values = torch.expm1(exponents.detach().clamp(max=largest))
    slopes = exponents.detach().clamp(max=steepest).exp()
    return values + slopes * (exponents - exponents.detach())


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
}
F_DIVERGENCES = (*_SCORES, "alpha_divergence")


def divergence_scores(logratios: Tensor, f_divergence_type: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """Return ``f'(t)`` for ``log t = logratios``, the reward of each response divided by beta.

    Returns scores in the shape of ``logratios``; 0 where policy and reference agree.
    """
    if f_divergence_type == "alpha_divergence":
        return alpha_divergence(logratios, alpha)
    if f_divergence_type not in _SCORES:
        raise FlexdpoError(
            f"unknown f_divergence_type {f_divergence_type!r}{nearest(f_divergence_type, F_DIVERGENCES)}; known: "
            f"{', '.join(F_DIVERGENCES)}"
        )
    return _SCORES[f_divergence_type](logratios)
