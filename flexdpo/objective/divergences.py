"""What an implicit reward is when the policy is held near its reference by another divergence than reverse KL.

Wang et al. 2023, "Beyond Reverse KL" (arXiv:2309.16240): under an f-divergence the reward of a response is
``beta * f'(policy / reference)`` up to a constant of the prompt. The constant cancels in ``chosen - rejected`` only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from flexdpo.errors import FlexdpoError, nearest

if TYPE_CHECKING:
    from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def divergence_scores(logratios: Tensor, f_divergence_type: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """Return ``f'(t)`` for ``log t = logratios``, the reward of each response divided by beta, in their shape.

    A constant is added that makes it 0 where policy and reference agree.
    """
    if f_divergence_type not in F_DIVERGENCES:
        raise FlexdpoError(
            f"unknown f_divergence_type {f_divergence_type!r}{nearest(f_divergence_type, F_DIVERGENCES)}; known: "
            f"{', '.join(F_DIVERGENCES)}"
        )
    if f_divergence_type == "js_divergence":
        # Jensen-Shannon: log(2 t / (1 + t))
        return math.log(2.0) + F.logsigmoid(logratios)
    # the others' score is (t^exponent - 1) / exponent, which tends to log t, ordinary DPO, as the exponent tends to 0
    exponent = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(f_divergence_type, alpha - 1.0)
    return logratios if abs(exponent) < 1e-6 else _bounded_expm1(exponent * logratios, exponent) / exponent


def _bounded_expm1(exponents: Tensor, divisor: float) -> Tensor:
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
