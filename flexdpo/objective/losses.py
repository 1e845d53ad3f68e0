"""Preference losses on pairs of responses, one small function each.

Shapes: ``E`` preferences (pairs). Log-probabilities are sums over a response, in nats; ``scores`` are log-ratios or
what another f-divergence makes of them (:mod:`flexdpo.objective.divergences`). Each function ``NAME_loss``, of
``loss_type`` NAME, returns one value per pair, ``[E]``; the objective averages them. ``beta`` is always the strength of
the pull towards the reference, or the steepness where there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from flexdpo.objective.divergences import divergence_scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Responses under the policy and the reference, the chosen ones and the rejected ones: ``[2, E]`` each."""

    logps: Tensor  # of the policy
    ref_logps: Tensor  # of the reference; zeros where there is none
    lengths: Tensor  # tokens in each response
    f_divergence_type: str = "reverse_kl"  # divergence that the scores are made for
    f_alpha_divergence_coef: float = 0.5  # alpha of the alpha-divergence

    @property
    def logratios(self) -> Tensor:
        """Policy minus reference."""
        return self.logps - self.ref_logps

    @property
    def scores(self) -> Tensor:
        """Rewards divided by beta."""
        return divergence_scores(self.logratios, self.f_divergence_type, self.f_alpha_divergence_coef)

    @property
    def means(self) -> Tensor:
        """Mean log-probability per token under the policy."""
        return self.logps / self.lengths


def _margins(values: Tensor) -> Tensor:
    """Chosen minus rejected."""
    return values[0] - values[1]


def _smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of ``sigmoid(logits)`` with a label that is wrong with probability ``label_smoothing``."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_loss(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: the log-odds that the chosen response wins, under the implicit rewards.

    ``label_smoothing``, in ``[0, 0.5)``, is the probability that a preference was labelled the wrong way round.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; Mitchell 2023, "A note on DPO with noisy preferences" (cDPO).
    """
    return _smoothed_logistic(beta * _margins(pairs.scores), label_smoothing)


def hinge_loss(pairs: Pairs, beta: float) -> Tensor:
    """SLiC on implicit rewards: nothing is learned from a margin beyond 1 (arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    return torch.relu(1 - beta * _margins(pairs.scores))


def ipo_loss(pairs: Pairs, beta: float) -> Tensor:
    """IPO: the margin is drawn to ``1 / (2 beta)`` instead of to infinity.

    Scores are divided by the number of response tokens, without which the target would depend on length; the paper's
    authors confirmed to TRL's that their results are of this form.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17 (``beta`` is ``tau`` there).
    """
    return (_margins(pairs.scores / pairs.lengths) - 1 / (2 * beta)).square()


def exo_pair_loss(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs: reverse KL from the policy's preference to the smoothed label.

    ``label_smoothing`` must be above 0, since its logarithm is taken. Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    logits = beta * _margins(pairs.scores)
    wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    loses = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return wins + loses


def nca_pair_loss(pairs: Pairs, beta: float) -> Tensor:
    """NCA with K = 2: each response against noise, which keeps the chosen up (Chen et al. 2024, arXiv:2402.05369)."""
    chosen, rejected = beta * pairs.logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust_loss(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """DPO made unbiased under flipped labels; may be negative (Ray Chowdhury et al. 2024, arXiv:2403.00409)."""
    logits = beta * _margins(pairs.scores)
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def bco_pair_loss(pairs: Pairs, beta: float) -> Tensor:
    """BCO for pairs: a classifier on the implicit reward, without its shift (Jung et al. 2024, arXiv:2404.04656)."""
    chosen, rejected = beta * pairs.logratios
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard_loss(pairs: Pairs, beta: float) -> Tensor:
    """SPPO, win probabilities 1 and 0: log-ratios go to plus and minus ``1 / (2 beta)`` (arXiv:2405.00675, Eq. 4.7)."""
    chosen, rejected = pairs.logratios.unbind()
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def aot_loss(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT on paired data: the policy's margins must dominate the reference's, quantile by quantile.

    Couples the batch: both sets of margins are sorted, so value ``i`` belongs to a quantile, not to pair ``i``.

    Source: Melnyk et al. 2024, arXiv:2406.05882, with the logistic loss.
    """
    policy, reference = (_margins(logps).sort().values for logps in (pairs.logps, pairs.ref_logps))
    return _smoothed_logistic(beta * (policy - reference), label_smoothing)


def aot_unpaired_loss(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT on unpaired data: chosen log-ratios must dominate rejected ones; the rest is as in :func:`aot_loss`."""
    return _smoothed_logistic(beta * _margins(pairs.logratios.sort(dim=1).values), label_smoothing)


def apo_zero_loss(pairs: Pairs, beta: float) -> Tensor:
    """APO-zero: chosen up, rejected down; for answers better than the model's own (arXiv:2408.06266, Eq. 7)."""
    chosen, rejected = beta * pairs.logratios
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(pairs: Pairs, beta: float) -> Tensor:
    """APO-down: both down, the rejected more; for answers worse than the model's own (arXiv:2408.06266, Eq. 8)."""
    return torch.sigmoid(beta * pairs.logratios[0]) + torch.sigmoid(-beta * _margins(pairs.logratios))


def discopop_loss(pairs: Pairs, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP: a blend of logistic and exponential loss, found by search (Lu et al. 2024, arXiv:2406.08414, Eq. 5)."""
    logits = beta * _margins(pairs.scores)
    # the exponential is weighed inside of its exponent: far on the wrong side it would be 0 times infinity
    exponential = torch.exp(F.logsigmoid(logits / discopop_tau) - logits)
    return torch.sigmoid(-logits / discopop_tau) * -F.logsigmoid(logits) + exponential


def sigmoid_norm_loss(pairs: Pairs, beta: float) -> Tensor:
    """DPO on rewards per token, so that length alone does not win (Lambert et al. 2024, Tulu 3, arXiv:2411.15124)."""
    return -F.logsigmoid(beta * _margins(pairs.scores / pairs.lengths))


def simpo_loss(pairs: Pairs, beta: float, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """SimPO: mean log-probability per token as reward, no reference, and a margin ``simpo_gamma`` to win by.

    ``beta`` is 2.0 to 2.5 in the paper. Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    return _smoothed_logistic(beta * _margins(pairs.means) - simpo_gamma, label_smoothing)


def orpo_loss(pairs: Pairs, beta: float) -> Tensor:
    """ORPO: likelihood of the chosen response plus ``beta`` times the odds ratio's logistic loss, no reference.

    ``P`` is the geometric mean of token probabilities, ``odds = P / (1 - P)``. The likelihood is that of the response
    given the prompt, averaged over its tokens.

    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 4 to 7 (``beta`` is ``lambda`` there).
    """
    # at exactly certain responses the odds are infinite; the least number below 0 keeps value and gradient finite
    x = pairs.means.clamp(max=-torch.finfo(pairs.means.dtype).tiny)
    near, elsewhere = x > -math.log(2.0), -torch.ones_like(x)
    # log(1 - P), exact at both ends; each branch gets a harmless argument where the other is used, or its gradient
    # would be NaN times 0
    close = torch.log(-torch.expm1(torch.where(near, x, elsewhere)))
    far = torch.log1p(-torch.exp(torch.where(near, elsewhere, x)))
    return -pairs.means[0] - beta * F.logsigmoid(_margins(pairs.means - torch.where(near, close, far)))


def cpo_loss(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """CPO's preference term: DPO with a uniform reference. The objective adds the likelihood of the chosen responses.

    Source: Xu et al. 2024, arXiv:2401.08417, Eq. 3.
    """
    return _smoothed_logistic(beta * _margins(pairs.logps), label_smoothing)
