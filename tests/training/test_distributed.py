"""Several processes against one: the same pairs per step, the same curve."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import preference_rows

pytestmark = pytest.mark.distributed

SCRIPT = """
import json, os, sys
import torch
from datasets import Dataset
from flexdpo import DPOConfig, DPOTrainer
from flexdpo.training.models import load_model, load_tokenizer
torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
data, model, output = settings.pop("data"), settings.pop("model"), settings.pop("output")
args = DPOConfig(output, max_steps=6, use_cpu=True, learning_rate=1e-3, report_to="none", disable_tqdm=True,
                 logging_steps=1, save_strategy="no", per_device_eval_batch_size=3, **settings)
trainer = DPOTrainer(load_model(model), None, args, train_dataset=Dataset.from_json(data),
                     eval_dataset=Dataset.from_json(data).select(range(18)), processing_class=load_tokenizer(model))
trainer.train()
trainer.evaluate()
if trainer.is_world_process_zero():
    with open(output + ".json", "w") as file:
        json.dump(trainer.state.log_history, file)
"""
COMPARED = ["loss", "grad_norm", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"]


def run(processes: int, **settings: object) -> list[dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # without torchrun: its agent looks the machine's name up, which not every machine can
    workers = []
    for rank in range(processes):
        environment = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        if processes == 1:
            environment = {k: v for k, v in environment.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        command = [sys.executable, "-c", SCRIPT, json.dumps(settings)]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors[-4000:]
    return json.loads(Path(str(settings["output"]) + ".json").read_text())


def assert_same_curve(got: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    for mine, other in zip(got[:6], want[:6], strict=True):
        for name in COMPARED:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (name, mine["step"])
    evaluated, expected = (next(x for x in lines if "eval_loss" in x) for lines in (got, want))
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert evaluated[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    # every token of the step is counted once, wherever it ran
    assert got[5]["tokens/run"] == want[5]["tokens/run"]


@pytest.fixture
def one_process(tmp_path, saved_model):
    # uneven lengths: with this row budget the ranks need different numbers of rows
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(40)))
    common = {"data": str(data), "model": str(saved_model("llama")), "max_tokens_per_row": 60}
    return common, run(1, output=str(tmp_path / "one"), per_device_train_batch_size=8, **common)


@pytest.mark.parametrize("processes", [2, 4])
def test_ddp_gives_the_curve_of_one_process(tmp_path, one_process, processes: int) -> None:
    common, want = one_process
    size = 8 // processes
    got = run(processes, output=str(tmp_path / "ddp"), per_device_train_batch_size=size, ddp_backend="gloo", **common)
    assert_same_curve(got, want)
