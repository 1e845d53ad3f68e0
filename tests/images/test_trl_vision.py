"""TRL's trainers of models that see, with sharing and without: the same losses, metrics and weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import flexdpo
from tests.images.processors import in_parts, llava_model, llava_processor, qwen_model, qwen_processor, rows

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")

MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "llava": (llava_model, llava_processor),
    "qwen2_vl": (qwen_model, qwen_processor),
}
STEPS = 3
_CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


class Heard(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def train(folder: Path, name: str, *, share: bool, **settings: Any) -> tuple[Any, list[dict[str, float]]]:
    model, processor = (make() for make in MODELS[name])
    # of each prompt that has an image, since TRL takes a list of them from every row
    data = [row for row in in_parts(rows()) if row["images"]]
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "adam_epsilon": 1e-4,
        "save_strategy": "no",
        **settings,
    }
    heard = Heard()
    peft_config = settings.pop("peft_config", None)
    reference = None if peft_config else MODELS[name][0]()
    if reference is not None:
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(0.99)
    trainer = trl.DPOTrainer(
        model,
        ref_model=reference,
        args=trl.DPOConfig(**settings),
        train_dataset=Dataset.from_list(data),
        processing_class=processor,
        peft_config=peft_config,
    )
    if share:
        flexdpo.trl.enable(trainer, min_gain=1.0, min_prefix=1)
    trainer.add_callback(heard)
    trainer.train()
    return trainer, heard.logs


def require_the_same(folder: Path, name: str, **settings: Any) -> list[dict[str, float]]:
    (plain, _), (shared, logs) = (train(folder / str(share), name, share=share, **settings) for share in (False, True))
    history, wanted = shared.state.log_history, plain.state.log_history
    assert len(history) == len(wanted) == STEPS + 1
    for mine, theirs in zip(history, wanted, strict=True):
        for key in theirs.keys() - {*_CLOCK}:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5, abs=2e-5), (key, theirs["step"])
    for (name_of, got), want in zip(shared.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=5e-6, msg=name_of)
    return logs


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_dpo(name: str, checkpoints: bool, tmp_path: Path) -> None:
    logs = require_the_same(tmp_path, name, gradient_checkpointing=checkpoints)
    for log in logs[:-1]:
        assert log["sharing/passed_through"] == 0
        assert log["sharing/saved"] > 0.3
        # chosen and rejected, policy and reference: four rows of three or four images, each of which is one of three
        assert log["sharing/images_in"] == 20
        assert log["sharing/images_encoded"] == 6


@pytest.mark.slow
def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    logs = require_the_same(tmp_path, "llava", peft_config=adapter)
    assert logs[0]["sharing/images_encoded"] < logs[0]["sharing/images_in"]
