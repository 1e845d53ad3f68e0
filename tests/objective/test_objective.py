"""Every loss on shared, packed rows against the plain padded computation, values and all gradients, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flexdpo import FlexdpoError, Group, Row, response_logps
from flexdpo.objective.batch import BatchTotals, ReferenceLogps
from flexdpo.objective.logps import ResponseLogps, pair_sums, require_finite
from flexdpo.objective.loss_types import LOSS_TYPES, _settings_read
from flexdpo.objective.objective import Objective
from flexdpo.objective.unpaired import LabelledGroup, with_unrelated_responses
from tests.objective import padded

QUICK = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])

COMMON: dict[str, Any] = {
    "beta": 0.3,
    "discopop_tau": 0.4,
    "simpo_gamma": 0.7,
    "cpo_alpha": 0.6,
    "desirable_weight": 1.3,
    "undesirable_weight": 0.8,
}
PAIRWISE = [name for name in LOSS_TYPES if name not in {"kto", "apo_zero_unpaired", "plackett_luce"}]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name], "label_smoothing": 0.1} for name in PAIRWISE},
    **{
        f"sigmoid under {kind}": {"loss_type": ["sigmoid"], "f_divergence_type": kind, "f_alpha_divergence_coef": 0.4}
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "ipo under js": {"loss_type": ["ipo"], "f_divergence_type": "js_divergence"},
    "weights": {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 0.2, -0.5]},
    "rpo": {"loss_type": ["sigmoid"], "rpo_alpha": 0.7},
    "wpo": {"loss_type": ["sigmoid", "sft"], "use_weighting": True, "rpo_alpha": 0.3},
    "wpo on simpo": {"loss_type": ["simpo"], "use_weighting": True},
    "ld": {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4, "rpo_alpha": 0.5},
    "ld of 0 on ipo": {"loss_type": ["ipo"], "ld_alpha": 0.0},
    "ld on aot": {"loss_type": ["aot"], "ld_alpha": 0.4},
}


@cache
def models() -> tuple[Any, Any, Any, Any]:
    """Stock policy and reference, and the same two behind shared rows."""
    stock, stock_reference = padded.tiny_gpt2(1), padded.tiny_gpt2(2)
    # near enough to each other that the formulas as they stand in the papers do not overflow
    for of_reference, of_policy in zip(stock_reference.parameters(), stock.parameters(), strict=True):
        of_reference.data.lerp_(of_policy.data, 0.85)
    return stock, stock_reference, padded.prepared(stock), padded.prepared(stock_reference)


def gradients(model: Any) -> torch.Tensor:
    flat = torch.cat([p.grad.reshape(-1) if p.grad is not None else p.new_zeros(p.numel()) for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return flat


def packed(
    groups: list[Group], objective: Objective, rows: list[Row], reference_as: str = "logps", swapped: bool = False
) -> Any:
    """Loss and gradients as a training step computes them: rows one after another, in two passes where they couple."""
    model, reference = models()[2:][:: -1 if swapped else 1]
    totals = BatchTotals.of(groups)
    with torch.no_grad():
        ref = [response_logps(reference, row) for row in rows]
    if reference_as == "cached":
        alpha = objective.ld_alpha
        pairs = [None if alpha is None else pair_sums(*each, alpha) for each in zip(ref, rows, strict=True)]
        ref = [ReferenceLogps(values.sums, each) for values, each in zip(ref, pairs, strict=True)]

    def run(row: Row) -> ResponseLogps:
        return response_logps(model, row, with_log_sum_squares=objective.use_weighting)

    if objective.couples_batch and len(rows) > 1:
        with torch.no_grad():
            first = [run(row) for row in rows]
        found, slopes = objective.target_gradients(first, ref, rows, totals)
        for row, gradient in zip(rows, slopes, strict=True):
            (run(row).targets * gradient).sum().backward()
        return found.loss, gradients(model)
    loss = 0.0
    for row, values in zip(rows, ref, strict=True):
        share = objective.loss([run(row)], [values], [row], totals).loss
        share.backward()
        loss = loss + share.detach()
    return loss, gradients(model)


def ordinary(
    compute: Callable[..., torch.Tensor], groups: list[Group], s: dict[str, Any], swapped: bool = False
) -> Any:
    stock, stock_reference = models()[:2][:: -1 if swapped else 1]
    loss = compute(stock, stock_reference, groups, s)
    loss.backward()
    return loss.detach(), gradients(stock)


def assert_same(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    scale = max(float(want[1].abs().max()), 1e-3)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=tolerance * scale)


def rows_of(groups: list[Group], apart: bool) -> list[Row]:
    return [Row.from_groups([group]) for group in groups] if apart else [Row.from_groups(groups, pad_to_multiple_of=8)]


def objective_of(s: dict[str, Any]) -> Objective:
    # a setting that the losses do not read is refused
    read = {"loss_type", "loss_weights"} | _settings_read(set(s["loss_type"]), s.get("f_divergence_type", "reverse_kl"))
    s = {name: value for name, value in {**COMMON, **s, "loss_type": tuple(s["loss_type"])}.items() if name in read}
    if s.get("loss_weights"):
        s["loss_weights"] = tuple(s["loss_weights"])
    return Objective(**s)


@pytest.mark.parametrize("name", CASES)
@QUICK
@given(groups=padded.random_groups(), apart=st.booleans(), reference_as=st.sampled_from(["logps", "cached"]))
def test_pairwise_losses_are_the_padded_ones(name: str, groups: list[Group], apart: bool, reference_as: str) -> None:
    s = COMMON | CASES[name]
    got = packed(groups, objective_of(CASES[name]), rows_of(groups, apart), reference_as)
    assert_same(got, ordinary(padded.padded_pair_objective, groups, s))


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@QUICK
@given(groups=padded.random_groups(), apart=st.booleans(), swapped=st.booleans())
def test_labelled_losses_are_the_padded_ones(name: str, groups: list[Group], apart: bool, swapped: bool) -> None:
    """Policy and reference either way round: the estimated KL is negative in one of them, and then counts as 0."""
    s = {"loss_type": [name]}
    assume(len({group.prompt_ids.tobytes() for group in groups}) > 1)
    want = ordinary(padded.padded_labelled_objective, groups, COMMON | s, swapped)
    if name == "kto":
        groups = with_unrelated_responses(groups)
    assert_same(packed(groups, objective_of(s), rows_of(groups, apart), swapped=swapped), want)


@QUICK
@given(groups=padded.random_groups(ranked=True), apart=st.booleans())
def test_plackett_luce_is_the_padded_one(groups: list[Group], apart: bool) -> None:
    s = {"loss_type": ["plackett_luce"]}
    got = packed(groups, objective_of(s), rows_of(groups, apart))
    assert_same(got, ordinary(padded.padded_plackett_luce, groups, COMMON | s))


# --- what sharing could break ----------------------------------------------------------------------------------------


def test_ipo_divides_by_the_length_of_each_response() -> None:
    rng = np.random.default_rng(3)
    groups = [Group.from_lists([3, 4], [rng.integers(3, 9, 9).tolist(), rng.integers(3, 9, 2).tolist()])]
    s = {"loss_type": ["ipo"]}
    want = ordinary(padded.padded_pair_objective, groups, COMMON | s)
    assert_same(packed(groups, objective_of(s), rows_of(groups, False)), want)
    # without the normalisation the loss would be another one
    chosen, rejected = padded.pairs_of(groups)
    with torch.no_grad():
        policy, ref = (padded.run_padded(model, chosen + rejected).sums for model in models()[:2])
    unnormalised = (policy[0] - ref[0] - policy[1] + ref[1] - 1 / (2 * COMMON["beta"])) ** 2
    assert abs(unnormalised - want[0]) > 0.1


def test_the_first_token_of_every_response_counts() -> None:
    """Responses of one token have nothing else: dropping the first target would leave them no log-probability."""
    groups = [Group.from_lists([5], [[7], [8]]), Group.from_lists([9, 9, 4], [[11], [12], [13]], [(2, 0), (1, 0)])]
    rows = [Row.from_groups(groups)]
    logps = response_logps(models()[2], rows[0])
    assert logps.lengths.tolist() == [1] * 5
    assert (logps.sums < -0.1).all()
    for name in ("sigmoid", "sft", "ipo"):
        s = {"loss_type": [name]}
        assert_same(packed(groups, objective_of(s), rows), ordinary(padded.padded_pair_objective, groups, COMMON | s))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sft", "orpo", "aot"])
def test_tries_of_depth_two(name: str) -> None:
    """Branches under branches: shared targets count for every response that contains them."""
    groups = [
        Group.from_lists(
            [5, 6, 7],
            # all begin with 3 4, the first two also with 8, and the last one ends inside the others
            [[3, 4, 8, 9, 10], [3, 4, 8, 11], [3, 4, 12, 13, 14], [3, 4]],
            [(0, 1), (0, 2), (2, 1), (1, 3)],
        )
    ]
    row = Row.from_groups(groups)
    assert len(row.labels) == 9  # 16 response tokens, 7 of them shared
    s = {"loss_type": [name]}
    assert_same(packed(groups, objective_of(s), [row]), ordinary(padded.padded_pair_objective, groups, COMMON | s))


def test_six_pairs_of_four_responses_cost_a_fifth_of_the_tokens_and_learn_the_same() -> None:
    rng = np.random.default_rng(7)
    length = 6
    prompt = rng.integers(3, 20, length).tolist()
    # another first token each, so that nothing but the prompt is shared
    responses = [[k + 3, *rng.integers(3, 20, length - 1).tolist()] for k in range(4)]
    edges = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    together = [Group.from_lists(prompt, responses, edges)]
    pairs = [Group.from_lists(prompt, [responses[i], responses[j]]) for i, j in edges]
    row = Row.from_groups(together)
    assert sum(pair.unshared_tokens for pair in pairs) / row.num_tokens == pytest.approx(4.8)
    for name in ("sigmoid", "ipo", "sft", "aot"):
        objective = objective_of({"loss_type": [name]})
        separate = packed(pairs, objective, rows_of(pairs, apart=True))
        assert_same(packed(together, objective, [row]), separate)
        assert_same(separate, ordinary(padded.padded_pair_objective, pairs, COMMON | {"loss_type": [name]}))


def test_losses_that_couple_the_batch_refuse_one_row_of_several() -> None:
    groups = [Group.from_lists([3], [[4], [5]]), Group.from_lists([6], [[7], [8]])]
    row = Row.from_groups(groups[:1])
    logps = response_logps(models()[2], row)
    with pytest.raises(RuntimeError, match="couples the batch's 4 responses but this row has 2"):
        Objective(("aot",)).loss([logps], [logps], [row], BatchTotals.of(groups))


def test_the_kl_is_averaged_over_processes() -> None:
    groups = with_unrelated_responses([Group.from_lists([3], [[4, 5], [6]]), Group.from_lists([7], [[8], [9]])])
    row, totals = Row.from_groups(groups), BatchTotals.of(groups)
    policy, reference = (response_logps(model, row) for model in models()[2:])
    objective = Objective(("kto",))
    alone = objective.loss([policy], [reference], [row], totals)
    shifted = objective.loss([policy], [reference], [row], totals, average=lambda kl: kl.abs() + 2)
    assert float(shifted.metrics["kl"]) >= 2
    assert not torch.isclose(alone.loss, shifted.loss)


# --- what is logged --------------------------------------------------------------------------------------------------


def one_pair(**settings: Any) -> Any:
    row = Row.from_groups([Group.from_lists([3, 4], [[5, 6], [7]])])
    policy, reference = (response_logps(model, row) for model in models()[2:])
    objective = Objective(**settings)
    reference = reference if objective.needs_reference else None
    return policy, reference, objective.loss([policy], [reference], [row], BatchTotals.of(row.groups)).metrics


def test_rewards_are_beta_times_the_log_ratio() -> None:
    policy, reference, metrics = one_pair(beta=0.5)
    rewards = 0.5 * (policy.sums - reference.sums)
    torch.testing.assert_close(metrics["rewards/chosen"], rewards[:1])
    torch.testing.assert_close(metrics["rewards/rejected"], rewards[1:])
    torch.testing.assert_close(metrics["rewards/margins"], rewards[:1] - rewards[1:])
    assert metrics["rewards/accuracies"].tolist() == [float(rewards[0] > rewards[1])]
    torch.testing.assert_close(metrics["logps/chosen"], policy.sums[:1])
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(("name", "per_token"), [("simpo", True), ("orpo", True), ("cpo", False)])
def test_rewards_without_a_reference(name: str, per_token: bool) -> None:
    policy, _, metrics = one_pair(loss_type=(name,), beta=2.0)
    values = 2.0 * (policy.means if per_token else policy.sums)
    torch.testing.assert_close(metrics["rewards/chosen"], values[:1])


def test_supervision_alone_logs_no_rewards() -> None:
    assert one_pair(loss_type=("sft",))[2].keys() == {"logps/chosen", "logps/rejected"}


def test_labels_log_rewards_of_good_and_bad_responses() -> None:
    group = LabelledGroup.from_lists([3], [[4], [5], [6]], edges=())
    group = LabelledGroup(group.prompt_ids, group.response_ids, labels=(True, False, True))
    row = Row.from_groups([group])
    policy, reference = (response_logps(model, row) for model in models()[2:])
    result = Objective(("apo_zero_unpaired",)).loss([policy], [reference], [row], BatchTotals.of([group]))
    ratios = 0.1 * (policy.sums - reference.sums)
    torch.testing.assert_close(result.metrics["rewards/chosen"], ratios[[0, 2]])
    torch.testing.assert_close(result.metrics["rewards/rejected"], ratios[[1]])


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": ()}, "loss_type is empty"),
        ({"loss_type": ("sigmod",)}, r"unknown loss_type 'sigmod'; did you mean 'sigmoid'\?; known: sigmoid, hinge"),
        ({"loss_weights": (1.0, 2.0)}, r"loss_weights has 2 values for 1 losses \(sigmoid\); give one weight for each"),
        ({"loss_weights": (float("nan"),)}, "loss_weights gives sigmoid the weight nan"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": float("nan")}, "beta must be a finite number, got nan"),
        ({"beta": float("inf")}, "beta must be a finite number, got inf"),
        ({"rpo_alpha": float("nan")}, "rpo_alpha must be a finite number, got nan"),
        ({"rpo_alpha": -1.0}, "rpo_alpha must not be negative, got -1.0"),
        ({"loss_type": ("kto",), "desirable_weight": -1.0}, "desirable_weight must not be negative"),
        ({"label_smoothing": 0.1, "loss_type": ("hinge",)}, "label_smoothing=0.1 has no effect with loss_type hinge"),
        ({"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect with loss_type sigmoid, it belongs to loss_type simpo"),
        ({"cpo_alpha": 0.5}, "cpo_alpha=0.5 has no effect .* it belongs to loss_type cpo; leave it out"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect"),
        ({"desirable_weight": 2.0}, "desirable_weight=2.0 has no effect .* kto, apo_zero_unpaired"),
        ({"undesirable_weight": 2.0}, "undesirable_weight=2.0 has no effect"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef=0.3 has no effect .* 'alpha_divergence'"),
        ({"loss_type": ("sft",), "beta": 0.5}, "beta=0.5 has no effect with loss_type sft"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5"),
        ({"discopop_tau": 0.0}, "discopop_tau must be positive"),
        ({"f_divergence_type": "reverse"}, r"unknown f_divergence_type 'reverse'; did you mean 'reverse_kl'\?"),
        ({"loss_type": ("exo_pair",)}, "'exo_pair' takes the logarithm of label_smoothing; set it above 0"),
        ({"loss_type": ("nca_pair",), "f_divergence_type": "forward_kl"}, "'forward_kl' cannot .* loss_type nca_pair"),
        ({"loss_type": ("aot",), "use_weighting": True}, "use_weighting cannot .* aot: it sorts the batch"),
        ({"loss_type": ("kto",), "use_weighting": True}, "use_weighting cannot .* kto: the weights are those of pairs"),
        ({"loss_type": ("simpo",), "ld_alpha": 0.5}, "ld_alpha cannot be combined with loss_type simpo"),
        (
            {"loss_type": ("plackett_luce",), "ld_alpha": 0.5},
            "ld_alpha cannot be combined with loss_type plackett_luce",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        Objective(**settings)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_setting_that_is_accepted_has_an_effect(name: str) -> None:
    """Each loss with each setting changed: another value, or a refusal."""
    groups = with_unrelated_responses(
        [Group.from_lists([3], [[4, 5], [6]]), Group.from_lists([7], [[8], [9, 10, 11]], [(1, 0)])]
    )
    row, totals = Row.from_groups(groups), BatchTotals.of(groups)
    policy, reference = (response_logps(model, row, with_log_sum_squares=True) for model in models()[2:])

    def loss(**settings: Any) -> float:
        base = {"label_smoothing": 0.01} if name == "exo_pair" else {}
        return float(Objective(name, **base | settings).loss([policy], [reference], [row], totals).loss)

    for field in dataclasses.fields(Objective):
        if isinstance(field.default, float) and not isinstance(field.default, bool):
            try:
                changed = loss(**{field.name: field.default + 0.07})
            except FlexdpoError as error:
                assert f"{field.name}=" in str(error)  # noqa: PT017
            else:
                assert changed != loss(), field.name


def computed(groups: list[Group], with_reference: bool = True, **settings: Any) -> None:
    row = Row.from_groups(groups)
    logps = response_logps(models()[2], row)
    Objective(**settings).loss([logps], [logps if with_reference else None], [row], BatchTotals.of(groups))


PAIR = Group.from_lists([3], [[4], [5]], name="row 8")
PLAIN = Group.from_lists([3], [[4], [5]], edges=(), name="row 9")


@pytest.mark.parametrize(
    ("groups", "settings", "message"),
    [
        (
            [PAIR],
            {"with_reference": False},
            "loss_type sigmoid needs reference log-probabilities, got none; give a ref",
        ),
        ([PLAIN], {}, "loss_type sigmoid needs preferences, but the batch has no chosen and rejected responses"),
        ([PLAIN], {"loss_type": ("plackett_luce",)}, "plackett_luce needs preferences"),
        ([PLAIN], {"loss_type": ("apo_zero_unpaired",)}, "apo_zero_unpaired needs labelled responses"),
        ([PAIR], {"loss_type": ("kto",)}, "none of the batch's 2 responses is one; pass the groups through with_unrel"),
        ([PAIR], {"use_weighting": True}, r"use_weighting needs response_logps\(..., with_log_sum_squares=True\)"),
    ],
)
def test_batches_that_lack_what_the_loss_needs(groups: list[Group], settings: Any, message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        computed(groups, **settings)


def test_reference_sums_are_not_enough_for_ld() -> None:
    row = Row.from_groups([PAIR])
    logps = response_logps(models()[2], row)
    with pytest.raises(FlexdpoError, match="ld_alpha weighs the tokens of each pair, so reference sums"):
        Objective(ld_alpha=0.5).loss([logps], [ReferenceLogps(logps.sums)], [row], BatchTotals.of([PAIR]))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_name_the_example(bad: float) -> None:
    row = Row.from_groups([PAIR, Group.from_lists([6], [[7], [8]], name="row 17")])
    logps = response_logps(models()[2], row)
    require_finite(logps.sums, row)
    sums = logps.sums.clone()
    sums[3] = bad
    with pytest.raises(
        FlexdpoError, match=rf"^step 4, row 17: the log-probability of response 1 under the policy is {bad}"
    ):
        require_finite(sums, row, where="step 4")


def test_a_model_gone_bad_is_named() -> None:
    """Infinite logits have no softmax: as torch's own, every log-probability is NaN, whatever its logit's sign."""
    model = padded.prepared(padded.tiny_gpt2(1))
    model.transformer.ln_f.weight.data[0] = float("inf")
    row = Row.from_groups([PAIR])
    with torch.no_grad():
        logits, sums = model(**row.inputs()).logits[0, 0], response_logps(model, row).sums
    assert {float(logits[token]) for token in range(20)} == {float("inf"), float("-inf")}
    torch.testing.assert_close(sums, logits.log_softmax(-1)[[4, 5]], equal_nan=True)
    with pytest.raises(FlexdpoError, match=r"^row 8: .* of response 0 under the reference is nan;"):
        require_finite(sums, row, model="the reference")
