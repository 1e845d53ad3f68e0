"""Two processes that train on rows with and without images, and on such alone, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.processes import run_processes

pytest.importorskip("trl")
pytestmark = pytest.mark.distributed

SCRIPT = """
import json, sys
import torch
from datasets import Dataset
from flexdpo import DPOConfig, DPOTrainer
from tests.images import processors
from tests.processes import leave
torch.set_num_threads(1)
output, size, seen = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
pool = processors.rows()
with_image, without = pool[0], pool[3]
rows = [{**(with_image if see else without), **{side: pool[i % 5][side] for side in ("chosen", "rejected")},
         "images": [processors.picture(i)] if see else []} for i, see in enumerate(seen)]
args = DPOConfig(output, max_steps=len(seen) // 8, per_device_train_batch_size=size, max_tokens_per_row=40,
                 use_cpu=True, bf16=False, max_length=None, learning_rate=1e-3, adam_epsilon=1e-4, report_to="none",
                 disable_tqdm=True, logging_steps=1, save_strategy="no", train_sampling_strategy="sequential")
trainer = DPOTrainer(processors.llava_model(), None, args, processing_class=processors.llava_processor(),
                     train_dataset=Dataset.from_list(processors.in_parts(rows)))
held, collate = [], trainer.data_collator
def counting(examples):
    found = collate(examples)
    held.append([row.layout.images is not None for row in found["batch"].rows])
    return found
trainer.data_collator = counting
trainer.train()
trainer.save_model(output)
if trainer.is_world_process_zero():
    with open(output + ".json", "w") as file:
        json.dump(trainer.state.log_history, file)
print(json.dumps(held))
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
leave()
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    # eight pairs a step, half of them each process's: some with pictures, one, none, and some again
    steps = [[1, 0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0], [0] * 8, [0, 1, 0, 1, 1, 0, 0, 1]]
    seen = [see for step in steps for see in step]
    held, curves, weights = {}, {}, {}
    for count in (1, 2):
        output = str(tmp_path / str(count))
        printed = run_processes(["-c", SCRIPT, output, str(8 // count), json.dumps(seen)], count)
        held[count] = [json.loads(text.splitlines()[-1]) for text in printed]
        history = json.loads(Path(output + ".json").read_text(encoding="utf-8"))
        curves[count] = [line for line in history if "loss" in line]
        weights[count] = load_file(Path(output) / "model.safetensors")
    # both kinds of rows in both processes, and a process without any image beside one that has some
    assert all(any(set(rows) == {False, True} for rows in of_one) for of_one in held[2])
    assert any(any(a) != any(b) for a, b in zip(*held[2], strict=True))
    for key in ("loss", "grad_norm", "rewards/margins", "images/run", "images/unshared"):
        got, want = ([line[key] for line in curves[count]] for count in (2, 1))
        assert len(got) == len(steps)
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6), key
    assert weights[1].keys() == weights[2].keys()
    for name, want in weights[1].items():
        assert_close(weights[2][name], want, atol=2e-5, rtol=0, msg=name)
