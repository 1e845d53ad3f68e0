"""Preference losses on pairs of responses, one small function each.

Shapes: ``E`` preferences (pairs). Log-probabilities are sums over a response, in nats; ``logratios`` are policy minus
reference; ``scores`` are logratios or what another f-divergence makes of them (:mod:`flexdpo.objective.divergences`).
Each function returns one value per pair, ``[E]``; the objective averages them. ``beta`` is always the strength of the
pull towards the reference, or the steepness where there is none.
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
    """Chosen and rejected responses under the policy and the reference, ``[E]`` each."""

    chosen_logps: Tensor  # of the policy
    rejected_logps: Tensor  # of the policy
    chosen_lengths: Tensor  # tokens in the chosen response
    rejected_lengths: Tensor  # tokens in the rejected response
    ref_chosen_logps: Tensor  # of the reference; zeros where there is none
    ref_rejected_logps: Tensor  # of the reference
    f_divergence_type: str = "reverse_kl"  # divergence that the scores are made for
    f_alpha_divergence_coef: float = 0.5  # alpha of the alpha-divergence

    def __len__(self) -> int:
        return len(self.chosen_logps)

    @property
    def chosen_logratios(self) -> Tensor:
        """Policy minus reference."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """Policy minus reference."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def chosen_scores(self) -> Tensor:
        """Reward of the chosen response divided by beta."""
        return divergence_scores(self.chosen_logratios, self.f_divergence_type, self.f_alpha_divergence_coef)

    @property
    def rejected_scores(self) -> Tensor:
        """Reward of the rejected response divided by beta."""
        return divergence_scores(self.rejected_logratios, self.f_divergence_type, self.f_alpha_divergence_coef)

    @property
    def chosen_means(self) -> Tensor:
        """Mean log-probability per token under the policy."""
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_means(self) -> Tensor:
        """Mean log-probability per token under the policy."""
        return self.rejected_logps / self.rejected_lengths


def _smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of ``sigmoid(logits)`` with a label that is wrong with probability ``label_smoothing``."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_loss(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: the log-odds that the chosen response wins, under the implicit rewards.

    ``label_smoothing``, in ``[0, 0.5)``, is the probability that a preference was labelled the wrong way round (cDPO).

    Returns ``ln 2`` where policy and reference agree.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    return _smoothed_logistic(beta * (pairs.chosen_scores - pairs.rejected_scores), label_smoothing)


def sigmoid_norm_loss(pairs: Pairs, beta: float) -> Tensor:
    """DPO on rewards per token, so that length alone does not win.

    Source: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, length-normalised DPO.
    """
    chosen = pairs.chosen_scores / pairs.chosen_lengths
    return -F.logsigmoid(beta * (chosen - pairs.rejected_scores / pairs.rejected_lengths))


def hinge_loss(pairs: Pairs, beta: float) -> Tensor:
    """SLiC on implicit rewards: nothing is learned from a margin beyond 1.

    Source: Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425; on implicit rewards Liu et al. 2023 (RSO), arXiv:2309.06657.
    """
    return torch.relu(1 - beta * (pairs.chosen_scores - pairs.rejected_scores))


def ipo_loss(pairs: Pairs, beta: float) -> Tensor:
    """IPO: the margin is drawn to ``1 / (2 beta)`` instead of to infinity.

    Scores are divided by the number of response tokens, without which the target would depend on length; the paper's
    authors confirmed to TRL's that their results are of this form.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17 (``beta`` is ``tau`` there).
    """
    chosen = pairs.chosen_scores / pairs.chosen_lengths
    return (chosen - pairs.rejected_scores / pairs.rejected_lengths - 1 / (2 * beta)).square()


def exo_pair_loss(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs: reverse KL from the policy's preference to the smoothed label.

    ``label_smoothing`` must be above 0, since its logarithm is taken.

    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    logits = beta * (pairs.chosen_scores - pairs.rejected_scores)
    wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    loses = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return wins + loses


def nca_pair_loss(pairs: Pairs, beta: float) -> Tensor:
    """NCA for pairs: each response against noise, so that the chosen likelihood itself is kept up.

    Source: Chen et al. 2024, arXiv:2402.05369, the preference-data loss NCA with K = 2.
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust_loss(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """DPO made unbiased under labels that are flipped with a known probability; may be negative.

    Source: Ray Chowdhury et al. 2024, arXiv:2403.00409.
    """
    logits = beta * (pairs.chosen_scores - pairs.rejected_scores)
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def bco_pair_loss(pairs: Pairs, beta: float) -> Tensor:
    """BCO for pairs: a classifier whose logit is the implicit reward, with its threshold at 0.

    Source: Jung et al. 2024, arXiv:2404.04656, without the reward shift.
    """
    return -F.logsigmoid(beta * pairs.chosen_logratios) - F.logsigmoid(-beta * pairs.rejected_logratios)


def sppo_hard_loss(pairs: Pairs, beta: float) -> Tensor:
    """SPPO with win probabilities 1 and 0: log-ratios are drawn to plus and minus ``1 / (2 beta)``.

    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 (``1 / beta`` is ``eta`` there).
    """
    chosen = (pairs.chosen_logratios - 0.5 / beta).square()
    return chosen + (pairs.rejected_logratios + 0.5 / beta).square()


def aot_loss(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT on paired data: the policy's margins must dominate the reference's, quantile by quantile.

    Couples all pairs of the batch: both sets of margins are sorted, so value ``i`` belongs to a quantile, not to pair
    ``i``.

    Source: Melnyk et al. 2024, arXiv:2406.05882, paired variant with the logistic loss.
    """
    margins = (pairs.chosen_logps - pairs.rejected_logps).sort(dim=0).values
    ref_margins = (pairs.ref_chosen_logps - pairs.ref_rejected_logps).sort(dim=0).values
    return _smoothed_logistic(beta * (margins - ref_margins), label_smoothing)


def aot_unpaired_loss(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT on unpaired data: chosen log-ratios must dominate rejected ones, quantile by quantile.

    Couples all pairs of the batch, like :func:`aot_loss`.

    Source: Melnyk et al. 2024, arXiv:2406.05882, unpaired variant with the logistic loss.
    """
    chosen = pairs.chosen_logratios.sort(dim=0).values
    return _smoothed_logistic(beta * (chosen - pairs.rejected_logratios.sort(dim=0).values), label_smoothing)


def apo_zero_loss(pairs: Pairs, beta: float) -> Tensor:
    """APO-zero: chosen likelihood up, rejected likelihood down; for answers better than the model's own.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    return torch.sigmoid(-beta * pairs.chosen_logratios) + torch.sigmoid(beta * pairs.rejected_logratios)


def apo_down_loss(pairs: Pairs, beta: float) -> Tensor:
    """APO-down: both likelihoods down, the rejected one more; for answers worse than the model's own.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    margin = beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    return torch.sigmoid(beta * pairs.chosen_logratios) + torch.sigmoid(-margin)


def discopop_loss(pairs: Pairs, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP: a blend of logistic and exponential loss, found by search.

    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5 (log-ratio modulated loss).
    """
    logits = beta * (pairs.chosen_scores - pairs.rejected_scores)
    # the exponential is weighed inside of its exponent: far on the wrong side it would be 0 times infinity
    exponential = torch.exp(F.logsigmoid(logits / discopop_tau) - logits)
    return torch.sigmoid(-logits / discopop_tau) * -F.logsigmoid(logits) + exponential


def simpo_loss(pairs: Pairs, beta: float, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """SimPO: mean log-probability per token as reward, no reference, and a margin to win by.

    ``beta`` is 2.0 to 2.5 in the paper; ``simpo_gamma`` is the margin that the chosen reward must lead by.

    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    return _smoothed_logistic(beta * (pairs.chosen_means - pairs.rejected_means) - simpo_gamma, label_smoothing)


def cpo_loss(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """CPO's preference term: DPO with a uniform reference. The objective adds the likelihood of the chosen responses.

    Source: Xu et al. 2024, arXiv:2401.08417, Eq. 3.
    """
    return _smoothed_logistic(beta * (pairs.chosen_logps - pairs.rejected_logps), label_smoothing)


def orpo_loss(pairs: Pairs, beta: float) -> Tensor:
    """ORPO: likelihood of the chosen response plus ``beta`` times the odds ratio's logistic loss, no reference.

    ``P`` is the geometric mean of token probabilities, ``odds = P / (1 - P)``. The likelihood is that of the response
    given the prompt, averaged over its tokens.

    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 4 to 7 (``beta`` is ``lambda`` there).
    """
    chosen, rejected = pairs.chosen_means, pairs.rejected_means
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0``, exact at both ends."""
    # at exactly certain responses the odds are infinite; the least number below 0 keeps value and gradient finite
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2.0)
    # each branch gets a harmless argument where the other is used, or its gradient would be NaN times 0
    close = torch.log(-torch.expm1(torch.where(near, x, -torch.ones_like(x))))
    far = torch.log1p(-torch.exp(torch.where(near, -torch.ones_like(x), x)))
    return torch.where(near, close, far)


def rpo_loss(chosen_means: Tensor) -> Tensor:
    """The likelihood term of RPO: negative mean log-probability per token of the chosen response.

    Source: Pang et al. 2024 (Iterative RPO), arXiv:2404.19733, Eq. 1, second term.
    """
    return -chosen_means


def sft_loss(logps: Tensor, total_tokens: int | Tensor) -> Tensor:
    """Negative log-likelihood of supervised responses, averaged over all tokens of the batch.

    ``total_tokens`` are those of all supervised responses of the batch, this row's and the others'.

    Returns a scalar: this row's share of the batch mean.
    """
    return -logps.sum() / total_tokens
