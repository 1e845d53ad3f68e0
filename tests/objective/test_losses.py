"""Every loss against numbers worked by hand: a second witness beside the padded computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flexdpo import FlexdpoError, Group, Row
from flexdpo.objective import losses
from flexdpo.objective.batch import BatchTotals
from flexdpo.objective.divergences import F_DIVERGENCES, divergence_scores
from flexdpo.objective.listwise import plackett_luce_loss, ranking_of
from flexdpo.objective.logps import sum_targets
from flexdpo.objective.objective import Objective
from flexdpo.objective.unpaired import kto_kl, kto_loss

LN2 = math.log(2)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two pairs. Log-ratios: chosen +1 and -2, rejected -1 and +0; so margins are 2 and -2, and with beta = 0.5 they are
# 1 and -1. Per token: chosen 1/2 and -2/4, rejected -1/4 and 0. Policy margins 2 and 1, reference margins 0 and 3.
PAIRS = losses.Pairs(
    logps=torch.stack([column(-10, -12), column(-12, -13)]),
    ref_logps=torch.stack([column(-11, -10), column(-11, -13)]),
    lengths=torch.tensor([[2, 4], [4, 2]]),
)
# log(1 + e^-x), to 10 digits from a table
SOFTPLUS_MINUS = {
    1.0: 0.3132616875,
    -1.0: 1.3132616875,
    0.5: 0.4740769842,
    -0.5: 0.9740769842,
    0.0: 0.6931471806,
    0.375: 0.5231232641,
    -0.25: 0.8259394198,
    2.0: 0.1269280110,
}
SIGMOID = {1.0: 0.7310585786, -1.0: 0.2689414214, 0.5: 0.6224593312, -0.5: 0.3775406688}
S, L = SIGMOID, SOFTPLUS_MINUS

BY_HAND: dict[str, tuple[Any, list[float]]] = {
    "sigmoid": (lambda p: losses.sigmoid_loss(p, 0.5), [L[1.0], L[-1.0]]),
    "cdpo": (lambda p: losses.sigmoid_loss(p, 0.5, 0.1), [0.9 * L[1.0] + 0.1 * L[-1.0], 0.9 * L[-1.0] + 0.1 * L[1.0]]),
    # 0.5 * (0.5 + 0.25) = 0.375 and 0.5 * (-0.5 - 0) = -0.25
    "sigmoid_norm": (lambda p: losses.sigmoid_norm_loss(p, 0.5), [L[0.375], L[-0.25]]),
    "hinge": (lambda p: losses.hinge_loss(p, 0.5), [0.0, 2.0]),
    # (0.75 - 1)^2 and (-0.5 - 1)^2
    "ipo": (lambda p: losses.ipo_loss(p, 0.5), [0.0625, 2.25]),
    # sigma(1) = .7310585786: .731 * (ln .731 - ln .9) + .269 * (ln .269 - ln .1)
    "exo_pair": (
        lambda p: losses.exo_pair_loss(p, 0.5, 0.1),
        [
            S[1.0] * (-L[1.0] + 0.1053605157) + S[-1.0] * (-L[-1.0] + 2.3025850930),
            S[-1.0] * (-L[-1.0] + 0.1053605157) + S[1.0] * (-L[1.0] + 2.3025850930),
        ],
    ),
    # chosen rewards .5 and -1, rejected -.5 and 0
    "nca_pair": (
        lambda p: losses.nca_pair_loss(p, 0.5),
        [L[0.5] + 0.5 * L[-0.5] + 0.5 * L[0.5], L[-1.0] + 0.5 * L[1.0] + 0.5 * LN2],
    ),
    "robust": (
        lambda p: losses.robust_loss(p, 0.5, 0.25),
        [(0.75 * L[1.0] - 0.25 * L[-1.0]) / 0.5, (0.75 * L[-1.0] - 0.25 * L[1.0]) / 0.5],
    ),
    "bco_pair": (lambda p: losses.bco_pair_loss(p, 0.5), [L[0.5] + L[0.5], L[-1.0] + LN2]),
    # (1 - 1)^2 + (-1 + 1)^2 and (-2 - 1)^2 + (0 + 1)^2
    "sppo_hard": (lambda p: losses.sppo_hard_loss(p, 0.5), [0.0, 10.0]),
    # sorted margins 1, 2 against 0, 3: differences 1 and -1, times a half
    "aot": (lambda p: losses.aot_loss(p, 0.5), [L[0.5], L[-0.5]]),
    # sorted chosen -2, 1 against sorted rejected -1, 0: differences -1 and 1, times a half
    "aot_unpaired": (lambda p: losses.aot_unpaired_loss(p, 0.5), [L[-0.5], L[0.5]]),
    "apo_zero": (lambda p: losses.apo_zero_loss(p, 0.5), [S[-0.5] + S[-0.5], S[1.0] + 0.5]),
    "apo_down": (lambda p: losses.apo_down_loss(p, 0.5), [S[0.5] + S[-1.0], S[-1.0] + S[1.0]]),
    # the blend's argument is the logit itself at tau 1
    "discopop": (
        lambda p: losses.discopop_loss(p, 0.5, 1.0),
        [S[-1.0] * L[1.0] + S[1.0] * 0.3678794412, S[1.0] * L[-1.0] + S[-1.0] * 2.7182818285],
    ),
    # means -5 and -3, -3 and -6.5: margins -2 and 3.5, times 2, minus 1
    "simpo": (lambda p: losses.simpo_loss(p, 2.0, 1.0), [5 + math.log1p(math.exp(-5)), math.log1p(math.exp(-6))]),
    "cpo": (lambda p: losses.cpo_loss(p, 0.5), [L[1.0], L[0.5]]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    compute, want = BY_HAND[name]
    torch.testing.assert_close(compute(PAIRS), column(*want), rtol=1e-9, atol=1e-9)


def test_orpo_by_hand() -> None:
    """Token probabilities 1/2 and 1/4 in the mean: odds 1 and 1/3, so the odds ratio is 3 and sigma(ln 3) = 3/4."""
    logps = torch.stack([column(2 * math.log(0.5)), column(3 * math.log(0.25))])
    pairs = losses.Pairs(logps, torch.zeros_like(logps), torch.tensor([[2], [3]]))
    torch.testing.assert_close(losses.orpo_loss(pairs, 0.5), column(LN2 + 0.5 * math.log(4 / 3)))


def test_orpo_is_finite_at_certainty() -> None:
    sums = column(0.0, -1e-20, -700.0).requires_grad_()
    logps = torch.stack([sums, sums.detach() - 1])
    values = losses.orpo_loss(losses.Pairs(logps, logps * 0, torch.ones(2, 3, dtype=torch.int64)), 0.1)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(sums.grad).all()


def test_likelihood_terms_by_hand() -> None:
    """Two pairs, chosen sums -10 of two tokens and -12 of four: means 5 and 3 of two pairs, and 22 over 6 tokens."""
    groups = [Group.from_lists([3], [[4, 5], [6]]), Group.from_lists([3], [[4, 5, 6, 7], [8]])]
    row, totals = Row.from_groups(groups), BatchTotals.of(groups)
    logps = sum_targets(-column(5, 5, 1, 2, 4, 3, 3, 1), row)

    def loss(**settings: Any) -> torch.Tensor:
        return Objective(**settings).loss([logps], [logps], [row], totals).loss

    torch.testing.assert_close(loss(loss_type=("sft",)), column(22 / 6)[0])
    torch.testing.assert_close(loss(rpo_alpha=0.5), column(LN2 + 0.5 * (5 + 3) / 2)[0])


AT_THE_REFERENCE = {
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "hinge": 1.0,
    "ipo": 1.0,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 2.0,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LN2 + 0.5,
}


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_where_policy_and_reference_agree(name: str) -> None:
    agree = losses.Pairs(PAIRS.logps, PAIRS.logps, PAIRS.lengths)
    torch.testing.assert_close(BY_HAND[name][0](agree), column(*[AT_THE_REFERENCE[name]] * 2))


# --- divergences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "at_ln_2"),
    # t = 2: ln 2, 1 - 1/2, ln(4/3), (sqrt(1/2) - 1) / (-1/2)
    [("reverse_kl", LN2), ("forward_kl", 0.5), ("js_divergence", math.log(4 / 3)), ("alpha_divergence", 2 - 2**0.5)],
)
def test_divergences_by_hand(kind: str, at_ln_2: float) -> None:
    torch.testing.assert_close(divergence_scores(column(LN2, 0.0), kind), column(at_ln_2, 0.0))


def test_alpha_divergence_meets_its_neighbours() -> None:
    ratios = column(-3, -0.5, 0, 2)
    for alpha, neighbour in ((1.0, "reverse_kl"), (1 + 1e-5, "reverse_kl"), (0.0, "forward_kl")):
        got = divergence_scores(ratios, "alpha_divergence", alpha)
        torch.testing.assert_close(got, divergence_scores(ratios, neighbour), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_divergence_is_finite_far_out(dtype: torch.dtype) -> None:
    ratios = torch.tensor([-5000.0, 5000.0], dtype=dtype, requires_grad=True)
    for alpha in (-1.0, 0.5, 3.0):
        scores = divergence_scores(ratios, "alpha_divergence", alpha)
        (gradient,) = torch.autograd.grad(scores.sum(), ratios)
        assert torch.isfinite(scores).all()
        assert torch.isfinite(gradient).all()


def test_every_divergence_grows_with_the_ratio() -> None:
    ratios = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for kind in F_DIVERGENCES:
        assert (divergence_scores(ratios, kind).diff() > 0).all()


# --- single labels ---------------------------------------------------------------------------------------------------


def test_kto_by_hand() -> None:
    good = torch.tensor([True, False])
    # beta 0.5, KL 1: desirable 1 - sigma(.5 * (3 - 1)), undesirable 1 - sigma(.5 * (1 - 2)), weighted 2 and 3
    got = kto_loss(column(3, 2), good, column(1)[0], 0.5, (2.0, 3.0))
    torch.testing.assert_close(got, column(2 * S[-1.0], 3 * S[0.5]))
    # without a KL it is APO-zero
    torch.testing.assert_close(kto_loss(column(2, 1), good, 0.0, 0.5, (2.0, 3.0)), column(2 * S[-1.0], 3 * S[0.5]))


def test_the_kl_has_no_gradient() -> None:
    ratios = column(1, 4).requires_grad_()
    kl = kto_kl(ratios)
    assert not kl.requires_grad
    assert float(kl) == 2.5


# --- rankings --------------------------------------------------------------------------------------------------------


def test_plackett_luce_by_hand() -> None:
    """Rewards ln 3, ln 2, ln 1: the best wins with 3/6, then the second with 2/3."""
    got = plackett_luce_loss(torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log())
    torch.testing.assert_close(got, column(math.log(3), math.log(6)))


def test_plackett_luce_of_two_is_the_sigmoid_loss() -> None:
    rewards = 0.5 * PAIRS.logratios.T
    torch.testing.assert_close(plackett_luce_loss(rewards), losses.sigmoid_loss(PAIRS, 0.5))


def ranked(*edges: tuple[int, int], name: str = "row 5") -> tuple[int, ...]:
    return ranking_of(Group.from_lists([3], [[4], [5], [6], [7]], edges, name))


def test_rankings() -> None:
    assert ranked((2, 0), (0, 3), (3, 1)) == (2, 0, 3, 1)
    assert ranked((1, 0), (1, 2), (0, 2)) == (1, 0, 2)
    assert ranked((3, 1), (3, 1)) == (3, 1)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(0, 1), (0, 2)], "row 5: its preferences leave the order of responses 1 and 2 open"),
        ([(0, 1), (1, 2), (2, 0)], r"row 5: its preferences contradict each other among responses \[0, 1, 2\]"),
        ([(0, 1), (1, 2), (2, 1)], r"contradict each other among responses \[1, 2\]"),
    ],
)
def test_edges_that_are_no_ranking(edges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        ranked(*edges)


# --- a missing response ----------------------------------------------------------------------------------------------


def test_an_edge_that_names_a_missing_response() -> None:
    with pytest.raises(
        FlexdpoError, match=r"row 5: edge \(0, 4\) names response 4, but the group has responses 0 to 3"
    ):
        ranked((0, 4))
