"""Every trainer of TRL that runs without a network and a card: the same run with the drop-in and without."""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

import flexdpo
from flexdpo.hf.unwrap import unwrapped
from tests.conftest import preference_rows
from tests.test_trl import ALL, CHAT, TOLERANCE, assert_same_history, build, build_reference

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")

STEPS = 3
ROWS = preference_rows(24, seed=3)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split())) % 3) for text in completions]


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]


# prompts that several rows begin with, as where one answers often
PREFERENCES = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]
COMPLETIONS = [{"prompt": row["prompt"], "completion": row[name]} for row in ROWS for name in ("chosen", "rejected")]
LABELLED = [row | {"label": number % 3 > 0} for number, row in enumerate(COMPLETIONS)]
TURNS = [{"messages": messages(row)} for row in ROWS for _ in range(2)]
MARGINS = [row | {"margin": 0.5 * (number % 3)} for number, row in enumerate(PREFERENCES)]
TRIPLES = [row | {"reference": f"{row['chosen']} w9"} for row in PREFERENCES]
HINTED = [row | {"privileged_context": other["chosen"]} for row, other in zip(PROMPTS, PREFERENCES, strict=True)]
SAMPLING: dict[str, Any] = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6}


@dataclass(frozen=True)
class Case:
    """How a trainer is made, and what may pass through."""

    name: str
    data: list[dict[str, Any]]
    room: str = ""  # of ``trl.experimental``, where it is not in ``trl``
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Callable[[], Any]] = field(default_factory=dict)  # arguments that are models, besides the policy
    others: dict[str, Any] = field(default_factory=dict)  # more arguments
    model: str = "llama"
    passing: frozenset[str] = frozenset()  # reasons for which batches may pass through
    but: tuple[str, ...] = ()  # metrics that differ, which the user is told

    @property
    def kinds(self) -> tuple[Any, Any]:
        """The trainer and its config."""
        where = importlib.import_module(f"trl.experimental.{self.room}") if self.room else trl
        return getattr(where, f"{self.name}Trainer"), getattr(where, f"{self.name}Config")


REFERENCE = {"ref_model": lambda: build_reference("llama")}
TEACHER = {"teacher_model": lambda: build_reference("llama")}
SCORED = {"reward_funcs": reward}
LOGITS = ("logits/chosen", "logits/rejected")
CASES = {
    "dpo": Case("DPO", PREFERENCES, models=REFERENCE),
    "reward": Case("Reward", PREFERENCES),
    "reward with margins": Case("Reward", MARGINS),
    "kto": Case("KTO", LABELLED, models=REFERENCE),
    "sft": Case("SFT", COMPLETIONS),
    # it names the ends of sequences a second time, for FlashAttention
    "sft packed": Case("SFT", COMPLETIONS, settings={"padding_free": True}, passing=frozenset({"other_inputs"})),
    "grpo": Case("GRPO", PROMPTS, settings=SAMPLING | {"beta": 0.1, "num_iterations": 2}, others=SCORED),
    "grpo on gpt2": Case("GRPO", PROMPTS, settings=SAMPLING | {"beta": 0.1}, others=SCORED, model="gpt2"),
    "rloo": Case("RLOO", PROMPTS, settings=SAMPLING, others=SCORED),
    "distillation": Case("Distillation", COMPLETIONS, models=TEACHER),
    "gmpo": Case("GMPO", PROMPTS, "gmpo", settings=SAMPLING, others=SCORED),
    "cpo": Case("CPO", PREFERENCES, "cpo", but=LOGITS),
    "simpo": Case("CPO", PREFERENCES, "cpo", settings={"loss_type": "simpo", "cpo_alpha": 0.0}, but=LOGITS),
    "orpo": Case("ORPO", PREFERENCES, "orpo", but=LOGITS),
    "tpo": Case("TPO", TRIPLES, "tpo"),
    "gkd": Case("GKD", TURNS, "gkd", settings={"lmbda": 0.0}, models=TEACHER),
    "iw opd": Case("IWOPD", TURNS, "iw_opd", settings={"max_length": 64, "max_completion_length": 32}, models=TEACHER),
    "sdft": Case("SDFT", HINTED, "sdft", settings=SAMPLING | {"distillation_topk": 8}),
    "sdpo": Case("SDPO", PROMPTS, "sdpo", settings=SAMPLING, others=SCORED),
    # it puts completions behind prompts that are padded on the right
    "a2po": Case("A2PO", PROMPTS, "a2po", settings=SAMPLING, others=SCORED, passing=frozenset({"gaps"})),
    "online dpo": Case(
        "OnlineDPO",
        PROMPTS,
        "online_dpo",
        settings={"max_new_tokens": 6, "max_length": 64},
        others=SCORED,
        but=("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward"),
    ),
}


class Norms(TrainerCallback):
    """Keeps what the optimizer is given, for trainers that log no gradient norm."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))


def train(case: Case, folder: Path, tokenizer: Any, share: bool) -> tuple[Any, Any, list[float]]:
    """Train for some steps; returns the trainer, what shared in it, and the norms of its gradients."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    trainer_class, config_class = case.kinds
    wanted = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "per_device_train_batch_size": 4, "max_steps": STEPS, "logging_steps": 1,
        "learning_rate": 1e-4, "adam_epsilon": 1e-4, "save_strategy": "no", "max_length": None, **case.settings,
    }  # fmt: skip
    known = config_class.__dataclass_fields__
    args = config_class(**{name: value for name, value in wanted.items() if name in known})
    norms = Norms()
    policy = build(case.model, rewards=case.name == "Reward")
    if case.name != "Reward":
        # several trainers load what the policy was loaded from a second time
        policy.save_pretrained(folder / "policy")
        policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    models = {name: make() for name, make in case.models.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        models[name] = AutoModelForCausalLM.from_pretrained(folder / name)
    for saved in folder.glob("*"):
        tokenizer.save_pretrained(saved)
    torch.manual_seed(0)
    trainer = trainer_class(
        policy, args=args, train_dataset=Dataset.from_list(case.data), processing_class=tokenizer, callbacks=[norms],
        **models, **case.others,
    )  # fmt: skip
    callback = flexdpo.trl.enable(trainer, **ALL) if share else None
    trainer.train()
    return trainer, callback, norms.norms


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_run(name: str, tmp_path: Path, tokenizer: Any) -> None:
    case = CASES[name]
    try:
        case.kinds  # noqa: B018
    except (ImportError, AttributeError):
        pytest.skip(f"this version of TRL has no {case.name}Trainer here")
    plain, _, norms = train(case, tmp_path / "plain", tokenizer, share=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        shared, callback, shared_norms = train(case, tmp_path / "shared", tokenizer, share=True)
    clocks = tuple(key for logs in plain.state.log_history for key in logs if "time" in key or "per_second" in key)
    assert_same_history(
        shared.state.log_history, plain.state.log_history, but=(*clocks, *case.but), steps=STEPS, tolerance=TOLERANCE
    )
    # where all answers are worth the same nothing is learned
    assert max(norms) > 0
    assert shared_norms == pytest.approx(norms, rel=TOLERANCE)
    for mine, theirs in zip(shared.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)
    assert any("with those at padding" in str(each.message) for each in told) == bool(case.but)
    # every model that a loss was made of shared, or says why not
    for model in callback.models:
        stats = flexdpo.sharing_stats(model)
        assert {*stats.passed_through} <= {"generation", *case.passing}
        assert stats.batches_shared >= (0 if case.passing else 1)
    assert unwrapped(shared.model) is callback.models[0]
    if case.models:
        assert len(callback.models) == 2
