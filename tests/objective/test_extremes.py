"""Log-ratios far beyond any sane run: losses and slopes are finite, or so large that the step is stopped; never NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flexdpo.objective import listwise, unpaired
from flexdpo.objective.divergences import F_DIVERGENCES, divergence_scores
from flexdpo.objective.loss_types import _TAKES_DIVERGENCE, PAIR_LOSSES, pair_loss
from flexdpo.objective.losses import Pairs
from flexdpo.objective.objective import Objective

LOG_RATIOS = [0.0, *(sign * size for size in (1.0, 50.0, 88.0, 100.0, 1e3, 1e4) for sign in (1, -1))]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ALPHAS = (-1.0, 0.01, 0.5, 1.001, 2.0)
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1, "sigmoid": 0.1, "aot": 0.1, "simpo": 0.1, "cpo": 0.1}
FAMILY = [(name, alpha) for name in F_DIVERGENCES for alpha in (ALPHAS if name == "alpha_divergence" else (0.5,))]
CASES = [(loss, *family) for loss in PAIR_LOSSES for family in (FAMILY if loss in _TAKES_DIVERGENCE else FAMILY[:1])]


def pairs_of_all(dtype: torch.dtype, divergence: str = "reverse_kl", alpha: float = 0.5, *, negative: bool = False):
    chosen, rejected = torch.tensor(list(itertools.product(LOG_RATIOS, LOG_RATIOS)), dtype=dtype).unbind(1)
    if negative:
        # without a reference these are log-probabilities
        chosen, rejected = -chosen.abs(), -rejected.abs()
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    logps = torch.stack([chosen, rejected])
    return Pairs(logps, torch.zeros_like(logps), torch.tensor([[3], [4]]).expand_as(logps), divergence, alpha)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_losses(dtype: torch.dtype) -> None:
    for loss, divergence, alpha in CASES:
        pairs = pairs_of_all(dtype, divergence, alpha, negative=loss in ("simpo", "cpo", "orpo"))
        objective = Objective(
            (loss,),
            label_smoothing=SMOOTHED.get(loss, 0.0),
            f_divergence_type=divergence,
            f_alpha_divergence_coef=alpha,
        )
        values = pair_loss(loss, pairs, objective)
        (gradients,) = torch.autograd.grad(values.sum(), [pairs.logps])
        # targets are float32 even where sums are float64
        slopes = gradients.to(torch.float32)
        assert not torch.isnan(values).any(), (loss, divergence)
        assert not torch.isnan(slopes).any(), (loss, divergence)
        # squared, an exponential no longer fits; both loss and slope say so
        if loss == "ipo" and divergence in ("forward_kl", "alpha_divergence"):
            continue
        assert torch.isfinite(values).all(), (loss, divergence, alpha)
        assert torch.isfinite(slopes).all(), (loss, divergence, alpha)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_labels_and_rankings(dtype: torch.dtype) -> None:
    ratios = torch.tensor(LOG_RATIOS, dtype=dtype, requires_grad=True)
    desirable = torch.arange(len(ratios)) % 2 == 0
    kto, apo = (
        unpaired.kto_loss(ratios, desirable, kl, 0.1, (1.0, 1.0)) for kl in (unpaired.kto_kl(ratios).clamp(min=0), 0.0)
    )
    rankings = torch.tensor(list(itertools.permutations(range(len(ratios)), 3)))
    for values in (
        kto,
        apo,
        listwise.plackett_luce_loss(0.1 * ratios[rankings].to(torch.promote_types(dtype, torch.float32))),
    ):
        (slopes,) = torch.autograd.grad(values.sum(), [ratios])
        assert torch.isfinite(values).all()
        assert torch.isfinite(slopes.to(torch.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("divergence", "alpha"), FAMILY)
def test_scores_are_exact_wherever_they_fit(divergence: str, alpha: float, dtype: torch.dtype) -> None:
    """Value and slope against the definition in float64, in as many digits as the dtype has."""
    exact = torch.tensor(LOG_RATIOS, dtype=torch.float64, requires_grad=True)
    power = {"forward_kl": -1.0}.get(divergence, alpha - 1.0)
    want = {
        "reverse_kl": lambda: exact,
        "js_divergence": lambda: math.log(2.0) - torch.log1p(torch.exp(-exact)),
    }.get(divergence, lambda: torch.expm1(power * exact) / power)()
    ratios = torch.tensor(LOG_RATIOS, dtype=dtype, requires_grad=True)
    got = divergence_scores(ratios, divergence, alpha)
    (slope,) = torch.autograd.grad(got.sum(), [ratios])
    exponents = power * exact.detach()
    # an exponent that is rounded is off by so much in the exponential
    error = torch.finfo(dtype).eps * (2 + exponents.abs())
    fits = want.detach().abs() <= torch.finfo(dtype).max / 2
    assert fits.sum() >= 7
    off = (got.detach().double() - want.detach()).abs()
    assert (off <= error * want.detach().abs() + 4 * torch.finfo(dtype).eps)[fits].all()
    assert torch.isfinite(got).all()
    assert torch.isfinite(slope.to(torch.float32)).all()
    if divergence in ("forward_kl", "alpha_divergence"):
        in_float32 = exponents <= 80
        off = (slope.double() - exponents.exp()).abs()
        assert (off <= error * exponents.exp() + torch.finfo(dtype).smallest_normal)[in_float32].all()


def test_discopop_against_its_definition() -> None:
    """As written in the paper wherever that does not end in 0 times infinity."""
    pairs = pairs_of_all(torch.float64)
    logits = (0.1 * (pairs.logps[0] - pairs.logps[1])).detach()
    share = torch.sigmoid(logits / 0.05)
    want = (1 - share) * -torch.nn.functional.logsigmoid(logits) + share * torch.exp(-logits)
    got = pair_loss("discopop", pairs, Objective(("discopop",), discopop_tau=0.05)).detach()
    known = torch.isfinite(want) & (share > 0)
    assert known.sum() > len(want) / 2
    torch.testing.assert_close(got[known], want[known])
    # far on the wrong side the logistic loss is left
    assert float(got[logits == -2000]) == 2000
