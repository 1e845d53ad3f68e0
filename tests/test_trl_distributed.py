"""TRL's trainer in two processes, with prefix sharing and without: the same curve under DDP and FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import preference_rows
from tests.processes import run_processes

pytestmark = pytest.mark.distributed
pytest.importorskip("trl")

SCRIPT = """
import json, os, sys
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch, trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
import flexdpo
from tests.processes import fully_sharded, leave
torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
data, model, output, share = (settings.pop(name) for name in ("data", "model", "output", "share"))

Trainer = fully_sharded(trl.DPOTrainer) if settings.pop("fsdp2", False) else trl.DPOTrainer
args = trl.DPOConfig(output, max_steps=6, use_cpu=True, bf16=False, learning_rate=1e-4, report_to="none",
                     disable_tqdm=True, logging_steps=1, save_strategy="no", adam_epsilon=1e-4, max_length=None,
                     per_device_train_batch_size=3, ddp_backend="gloo", **settings)
trainer = Trainer(AutoModelForCausalLM.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model), args,
                  train_dataset=Dataset.from_json(data), processing_class=AutoTokenizer.from_pretrained(model))
if share:
    flexdpo.trl.enable(trainer, min_gain=1.0, min_prefix=1)
trainer.train()
if share:
    for each in (trainer.model_wrapped, trainer.ref_model):
        stats = flexdpo.sharing_stats(each)
        assert stats.batches_shared == 6 and not stats.passed_through, stats
if Trainer is not trl.DPOTrainer:
    from torch.distributed.fsdp import FSDPModule
    assert isinstance(trainer.model_wrapped, FSDPModule) and trainer.accelerator.is_fsdp2
    assert isinstance(trainer.ref_model, FSDPModule)
if trainer.is_world_process_zero():
    with open(output + ".json", "w") as file:
        json.dump(trainer.state.log_history, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
leave()
"""
CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def curve(**settings: Any) -> list[dict[str, float]]:
    run_processes(["-c", SCRIPT, json.dumps(settings)], 2)
    return json.loads(Path(settings["output"] + ".json").read_text())


@pytest.mark.parametrize(
    "way", [{}, {"gradient_checkpointing": True}, {"fsdp2": True}], ids=["DDP", "checkpointed DDP", "FSDP2"]
)
def test_two_processes(way: dict[str, Any], tmp_path: Path, saved_model: Any) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(36, seed=3)))
    way = {"gradient_checkpointing": False, **way, "data": str(data), "model": str(saved_model("llama"))}
    want, got = (curve(output=str(tmp_path / str(share)), share=share, **way) for share in (False, True))
    assert len(want) == len(got) == 7
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        # policy and reference begin as one model, so which reward is larger is decided by rounding at first
        for key in theirs.keys() - {*CLOCK, "rewards/accuracies"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), (key, theirs["step"])
