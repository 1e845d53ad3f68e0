"""The load-balancing loss of a mixture of experts: TRL's name and default, over the batch however it is laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM

from flexdpo import DPOTrainer, FlexdpoError
from flexdpo.objective import lm_head
from tests.conftest import preference_rows, strengthen
from tests.training.test_trainer import settings


def mixtral(**changes: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        router_aux_loss_coef=0.3,
        **changes,
    )
    return strengthen(MixtralForCausalLM(config), 0)


def run(folder: Path, tokenizer: Any, **changes: Any) -> list[dict[str, float]]:
    changes = {"max_steps": 3, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, **changes}
    args = settings(folder, **changes)
    data = Dataset.from_list(preference_rows(12))
    trainer = DPOTrainer(mixtral(), None, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


KEYS = ("loss", "grad_norm", "aux_loss", "rewards/margins")


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}],
    ids=["plain", "checkpointed"],
)
@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_rows_do_not_change_it(tmp_path: Path, tokenizer: Any, changes: dict[str, Any], loss_type: str) -> None:
    curves = [
        run(tmp_path, tokenizer, max_tokens_per_row=budget, loss_type=loss_type, prove=False, max_steps=2, **changes)
        for budget in (None, 56)
    ]
    for one, several in zip(*curves, strict=True):
        for key in KEYS:
            assert several[key] == pytest.approx(one[key], rel=2e-4, abs=1e-6), key


def test_it_is_that_of_trl(tmp_path: Path, tokenizer: Any) -> None:
    """Default coefficient, same pairs: losses, auxiliary losses and gradient norms of an unmodified run."""
    import trl

    common = {"gradient_checkpointing": False, "max_length": 64, "max_grad_norm": 1e9}
    args = settings(tmp_path, max_steps=3, **common)
    data = Dataset.from_list(preference_rows(12))
    ours = DPOTrainer(mixtral(), None, args, train_dataset=data, processing_class=tokenizer)
    ours.train()
    given = {name: getattr(args, name) for name in (
        "per_device_train_batch_size", "max_steps", "learning_rate", "lr_scheduler_type", "seed",
    )}  # fmt: skip
    # its reference is loaded by name
    model = mixtral()
    model.config._name_or_path = str(tmp_path / "policy")
    model.save_pretrained(tmp_path / "policy")
    theirs = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            str(tmp_path / "trl"), bf16=False, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no",
            disable_tqdm=True, **common, **given,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    theirs.train()
    lines = [[line for line in trainer.state.log_history if "loss" in line] for trainer in (ours, theirs)]
    assert lines[1][0]["aux_loss"] > 0.1
    for mine, other in zip(*lines, strict=True):
        for key in ("loss", "aux_loss", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4), key


def test_zero_leaves_it_out(tmp_path: Path, tokenizer: Any) -> None:
    line = run(tmp_path, tokenizer, router_aux_loss_coef=0.0)[0]
    assert line["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert "aux_loss" not in line


def test_a_model_without_routers(tmp_path: Path, tokenizer: Any, preferences: Any, small_model: Any) -> None:
    args = settings(tmp_path, router_aux_loss_coef=0.1)
    with pytest.raises(FlexdpoError, match=r"router_aux_loss_coef=0\.1: LlamaForCausalLM returns no router logits"):
        DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
    with pytest.raises(FlexdpoError, match=r"router_aux_loss_coef=-0\.1 is no number that a run can have"):
        settings(tmp_path, router_aux_loss_coef=-0.1)


def test_the_head_is_measured_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    measure = lm_head._measure
    monkeypatch.setattr(lm_head, "_measure", lambda model, device: measured.append(id(model)) or measure(model, device))
    run(tmp_path, tokenizer, prove=False)
    assert len(measured) == len(set(measured)) == 2
