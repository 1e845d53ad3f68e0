"""The losses of unmodified TRL trainers on the same batch, float32, values and gradients."""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from flexdpo import Group, Row, prepare_model, response_logps
from flexdpo.objective import losses
from flexdpo.objective.batch import BatchTotals
from flexdpo.objective.loss_types import _settings_read
from flexdpo.objective.objective import Objective
from flexdpo.objective.unpaired import LabelledGroup, with_unrelated_responses
from tests.conftest import preference_rows

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")

COUNT = 6
TOLERANCE = 1e-5


def settings_for(folder: Any, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": None,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": COUNT,
        **changes,
    }


def two_models(build: Any) -> tuple[Any, Any]:
    """A policy, and a reference somewhat away from it."""
    policy, reference = build("llama", seed=0), build("llama", seed=1)
    for of_reference, of_policy in zip(reference.parameters(), policy.parameters(), strict=True):
        of_reference.data.lerp_(of_policy.data, 0.9)
    return policy, reference


@pytest.fixture(scope="module")
def build() -> Any:
    from tests.conftest import CONFIGS, AutoModelForCausalLM, strengthen

    def make(name: str, seed: int) -> Any:
        torch.manual_seed(seed)
        return strengthen(AutoModelForCausalLM.from_config(CONFIGS[name]()), seed)

    return make


@pytest.fixture(scope="module")
def dpo(tokenizer: Any, build: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer, the batch it collated, and our two models with the same weights."""
    policy, reference = two_models(build)
    ours = tuple(prepare_model(copy.deepcopy(model)) for model in (policy, reference))
    args = trl.DPOConfig(**settings_for(tmp_path_factory.mktemp("trl")), use_weighting=True)
    data = Dataset.from_list(preference_rows(COUNT, seed=3))
    trainer = trl.DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer)
    examples = list(trainer.train_dataset)
    groups = [Group.from_lists(e["prompt_ids"], [e["chosen_ids"], e["rejected_ids"]]) for e in examples]
    return trainer, trainer.data_collator(examples), groups, *ours


def gradients(model: Any) -> torch.Tensor:
    flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    model.zero_grad()
    return flat


def ours(groups: list[Group], rows: list[Row], objective: Objective, model: Any, reference: Any) -> Any:
    totals = BatchTotals.of(groups)
    with torch.no_grad():
        ref = [response_logps(reference, row) for row in rows]

    def run(row: Row) -> Any:
        return response_logps(model, row, with_log_sum_squares=objective.use_weighting)

    if objective.couples_batch:
        with torch.no_grad():
            first = [run(row) for row in rows]
        found, slopes = objective.target_gradients(first, ref, rows, totals)
        for row, gradient in zip(rows, slopes, strict=True):
            (run(row).targets * gradient).sum().backward()
        return found.loss, gradients(model)
    shares = [objective.loss([run(row)], [values], [row], totals).loss for row, values in zip(rows, ref, strict=True)]
    loss = torch.stack(shares).sum()
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(got: Any, want: Any) -> None:
    assert float(got[0]) == pytest.approx(float(want[0]), rel=TOLERANCE, abs=TOLERANCE)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=TOLERANCE * float(want[1].abs().max()))


DEFAULTS: dict[str, Any] = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "beta": 0.2,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "use_weighting": False,
    "discopop_tau": 0.05,
}
SMOOTHED = ["exo_pair", "robust", "aot", "aot_unpaired"]
PLAIN = ["sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sft"]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name], "label_smoothing": 0.1} for name in SMOOTHED},
    **{name: {"loss_type": [name]} for name in [*PLAIN, "sigmoid_norm"]},
    **{
        f"{name} under {kind}": {"loss_type": [name], "f_divergence_type": kind}
        for name, kind in [("sigmoid", "forward_kl"), ("ipo", "js_divergence"), ("hinge", "alpha_divergence")]
    },
    "ld": {"ld_alpha": 0.3},
    "ld on ipo and sft": {"loss_type": ["ipo", "sft"], "ld_alpha": 0.0},
    "wpo": {"use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_trl(dpo: Any, name: str) -> None:
    trainer, batch, groups, model, reference = dpo
    case = DEFAULTS | CASES[name]
    trainer.loss_types = case["loss_type"]
    trainer.loss_weights = case["loss_weights"] or [1.0] * len(case["loss_type"])
    trainer.args.discopop_tau = case["discopop_tau"]
    for setting in ("beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"):
        setattr(trainer, setting, case[setting])
    trainer.use_weighting = case["use_weighting"]
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    want = loss.detach(), gradients(trainer.model)
    weights = case["loss_weights"]
    # what the losses do not read is refused
    read = {"loss_type", "loss_weights"} | _settings_read(set(case["loss_type"]), case["f_divergence_type"])
    case = {name: value for name, value in case.items() if name in read}
    objective = Objective(
        **{**case, "loss_type": tuple(case["loss_type"]), "loss_weights": None if weights is None else tuple(weights)}
    )
    rows = [Row.from_groups(groups[:2]), Row.from_groups(groups[2:])]
    assert_same(ours(groups, rows, objective, model, reference), want)


# either way round, since the estimated KL is negative in one of them and then counts as 0
@pytest.mark.parametrize("order", [1, -1], ids=["as is", "swapped"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_single_labels_are_those_of_trl(name: str, order: int, tokenizer: Any, build: Any, tmp_path: Any) -> None:
    policy, reference = two_models(build)[::order]
    model, model_reference = (prepare_model(copy.deepcopy(m)) for m in (policy, reference))
    args = trl.KTOConfig(
        **settings_for(tmp_path),
        loss_type=name,
        beta=0.2,
        desirable_weight=1.5,
        **({"train_sampling_strategy": "sequential"} if name == "kto" else {}),
    )
    data = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 3 != 0}
        for number, row in enumerate(preference_rows(COUNT, seed=5))
    ]
    trainer = trl.KTOTrainer(policy, reference, args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    examples = list(trainer.train_dataset)
    loss = trainer._compute_loss(trainer.model, trainer.data_collator(examples), return_outputs=False)
    loss.backward()
    want = loss.detach(), gradients(trainer.model)

    groups: list[Group] = []
    for e in examples:
        group = Group.from_lists(e["prompt_ids"], [e["completion_ids"]], edges=())
        groups.append(LabelledGroup(group.prompt_ids, group.response_ids, labels=(bool(e["label"]),)))
    if name == "kto":
        groups = list(with_unrelated_responses(groups))
    objective = Objective((name,), beta=0.2, desirable_weight=1.5)
    rows = [Row.from_groups(groups[:4]), Row.from_groups(groups[4:])]
    assert_same(ours(groups, rows, objective, model, model_reference), want)


# --- trainers without a reference: their loss functions on given log-probabilities -----------------------------------


def some_pairs() -> losses.Pairs:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (2, 12), generator=generator)
    sums = -3 * torch.rand(2, 12, generator=generator) * lengths - 0.01
    return losses.Pairs(sums, torch.zeros_like(sums), lengths)


def test_simpo_and_cpo_are_those_of_trl() -> None:
    from trl.experimental.cpo import CPOTrainer

    pairs = some_pairs()
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.6,
        beta=2.0,
        label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )
    want = CPOTrainer.cpo_loss(trainer, *pairs.means)[0]
    torch.testing.assert_close(losses.simpo_loss(pairs, 2.0, 0.6, 0.1), want, rtol=TOLERANCE, atol=TOLERANCE)
    trainer.loss_type = "sigmoid"
    want = CPOTrainer.cpo_loss(trainer, *pairs.logps)[0]
    torch.testing.assert_close(losses.cpo_loss(pairs, 2.0, 0.1), want, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_odds_ratio_is_that_of_trl() -> None:
    from trl.experimental.orpo import ORPOTrainer

    pairs = some_pairs()
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    want = ORPOTrainer.odds_ratio_loss(trainer, *pairs.means)[0]
    torch.testing.assert_close(losses.orpo_loss(pairs, 0.4) + pairs.means[0], -want, rtol=TOLERANCE, atol=TOLERANCE)
