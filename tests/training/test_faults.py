"""Faults from outside: a full disk, killed processes, too few pairs. One clear message, and nothing saved is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from flexdpo import DPOTrainer, FlexdpoError
from flexdpo.data.workers import plain_worker_errors
from flexdpo.training import checkpoints, run_reference
from flexdpo.training.batch import PackingCollator
from flexdpo.training.checkpoints import RECORD_FILE, last_checkpoint
from flexdpo.training.model_loading import load_model
from tests.conftest import preference_rows
from tests.processes import run_processes
from tests.training.test_trainer import settings


@pytest.fixture
def trainer(tmp_path, tokenizer, preferences, small_model) -> Any:
    def build(folder: Path | None = None, data: Any = None, **changes: Any) -> DPOTrainer:
        changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "prove": False, **changes}
        args = settings(folder or tmp_path / "run", **changes)
        return DPOTrainer(
            small_model(layers=2), None, args, train_dataset=data or preferences, processing_class=tokenizer
        )

    return build


class _At(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.action()


def assert_same_weights(got: Any, want: Any) -> None:
    for name, weight in want.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], weight), name


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[Any]:
    """Gives a function that sets the limit; afterwards files may be of any size again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# the weights take 290 kB and the optimizer's state twice as much
@pytest.mark.parametrize("size", [100_000, 400_000], ids=["weights", "optimizer"])
def test_a_disk_that_fills_up_in_a_checkpoint(tmp_path: Path, trainer: Any, size: int) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    run = trainer()
    message = r"the checkpoint .*checkpoint-4 cannot be written \(.+\); .*checkpoint-2 is complete: make room and go"
    with largest_file(size) as fill_up:
        run.add_callback(_At(3, fill_up))
        with pytest.raises(FlexdpoError, match=message) as raised:
            run.train()
    assert "\n" not in str(raised.value)
    # the incomplete one is there and is not taken
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert_same_weights(again, whole)


def test_a_disk_that_is_full_at_the_record(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    message = r"checkpoint-2 cannot be written \(.*No space left on device\); there is no complete checkpoint yet"
    with pytest.raises(FlexdpoError, match=message):
        trainer().train()
    with pytest.raises(FlexdpoError, match="no complete checkpoint"):
        last_checkpoint(tmp_path / "run")


def test_a_checkpoint_that_is_written_over_is_incomplete_meanwhile(
    tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer().train()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-6"
    seen = []
    save = torch.save

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.append((tmp_path / "run" / "checkpoint-6" / RECORD_FILE).exists())
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", look)
    trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert seen
    assert not any(seen)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-6"


# --- killed processes ------------------------------------------------------------------------------------------------


def precompute_slowly(begun: Any, build: Any) -> None:
    """Build a trainer that precomputes and writes after every row; tell when each begins. For a process of its own."""
    run_reference.PrecomputeSettings = partial(run_reference.PrecomputeSettings, save_every_s=0)
    run = DPOTrainer.reference_logps

    def slowly(self: Any, row: Any) -> Any:
        begun.release()
        time.sleep(0.2)
        return run(self, row)

    DPOTrainer.reference_logps = slowly
    build()


def test_killed_while_precomputing_the_reference(tmp_path: Path, saved_model: Any, tokenizer: Any, monkeypatch) -> None:
    data, model = tmp_path / "pairs.jsonl", str(saved_model("llama"))
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(40)))

    def build(cache: str = "") -> DPOTrainer:
        args = settings(
            tmp_path / "out", precompute_ref_log_probs=True, **({"precompute_ref_cache_dir": cache} if cache else {})
        )
        one = Dataset.from_json(str(data))
        return DPOTrainer(load_model(model), None, args, train_dataset=one, processing_class=tokenizer)

    fork = multiprocessing.get_context("fork")
    begun = fork.Semaphore(0)
    process = fork.Process(target=precompute_slowly, args=(begun, build))
    process.start()
    # three rows are through and written when the fourth begins
    assert all(begun.acquire(timeout=60) for _ in range(4))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL

    reports = []
    compute = run_reference.precompute_reference

    def remember(*args: Any, **kwargs: Any) -> Any:
        reports.append(compute(*args, **kwargs))
        return reports[-1]

    monkeypatch.setattr(run_reference, "precompute_reference", remember)

    def run(cache: str) -> DPOTrainer:
        trainer = build(cache)
        trainer.train()
        return trainer

    continued, whole = run(""), run(str(tmp_path / "elsewhere"))
    assert reports[1].found == 0
    assert 3 * 4 <= reports[0].found < reports[0].responses
    assert reports[0].rows_run < reports[1].rows_run
    assert continued.train_dataset["ref_response_logps"][:] == whole.train_dataset["ref_response_logps"][:]
    assert_same_weights(continued, whole)


def kill_workers() -> None:
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    os.kill(workers[0].pid, signal.SIGKILL)


def test_a_data_loader_worker_that_dies(tmp_path: Path, trainer: Any) -> None:
    run = trainer(max_steps=1000, save_steps=3, dataloader_num_workers=1)
    run.add_callback(_At(4, kill_workers))
    message = (
        r"a data loader worker died \(.*\), most often because memory ran out; use fewer than dataloader_num_workers=1"
    )
    with pytest.raises(FlexdpoError, match=message) as raised:
        run.train()
    assert "\n" not in str(raised.value)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-3"
    again = trainer(max_steps=6, save_steps=3)
    again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert_same_weights(again, whole)


def test_a_worker_that_dies_in_an_evaluation(trainer: Any, preferences: Dataset) -> None:
    run = trainer(dataloader_num_workers=1, per_device_eval_batch_size=1)

    class Kill(TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            if multiprocessing.active_children():
                kill_workers()
                run.remove_callback(Kill)

    run.add_callback(Kill)
    with pytest.raises(FlexdpoError, match="a data loader worker died"):
        run.evaluate(preferences)


def test_a_message_out_of_a_worker_comes_alone() -> None:
    rows = [{"prompt_ids": [3] * 20, "response_ids": [[5], [6]], "edges": [[0, 1]], "row": k} for k in range(4)]
    loader = DataLoader(rows, batch_size=2, num_workers=1, collate_fn=PackingCollator(max_tokens_per_row=8))
    message = r"^row 0 has a sequence of \d+ tokens .*_per_row=8 leaves room for 8; raise .* or lower max_length$"
    with pytest.raises(FlexdpoError, match=message) as raised, plain_worker_errors(1):
        list(loader)
    assert "Traceback" in str(raised.value.__cause__)
    for other in (RuntimeError("something else"), FlexdpoError("row 3: as it was")):
        with pytest.raises(type(other), match=f"^{other}$"), plain_worker_errors(1):
            raise other


# --- too few pairs ---------------------------------------------------------------------------------------------------


def test_fewer_pairs_than_a_batch(tmp_path: Path, trainer: Any) -> None:
    """Each epoch is one step of all the pairs there are."""
    three = Dataset.from_list(preference_rows(3))
    losses, tokens = [], []
    for size in (8, 3):
        settings = {"per_device_train_batch_size": size, "save_strategy": "no", "save_steps": 500}
        run = trainer(tmp_path / str(size), three, **settings)
        run.train()
        losses.append([line["loss"] for line in run.state.log_history if "loss" in line])
        tokens.append(run.tokens)
        assert run.state.epoch == 6
    assert len(losses[0]) == 6
    # the same pairs in another order of the batch: the same curve to rounding
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tokens[0] == tokens[1]


TWO_PROCESSES = """
import json, sys
import torch
from datasets import Dataset
from flexdpo import DPOConfig, DPOTrainer
from flexdpo.training.model_loading import load_model, load_tokenizer
from tests.processes import leave
torch.set_num_threads(1)
data, model, output = sys.argv[1:]
args = DPOConfig(output, max_steps=4, use_cpu=True, learning_rate=1e-3, report_to="none", disable_tqdm=True,
                 logging_steps=1, save_strategy="no", per_device_train_batch_size=4, ddp_backend="gloo",
                 lr_scheduler_type="constant")
one = Dataset.from_json(data)
trainer = DPOTrainer(load_model(model), None, args, train_dataset=one, eval_dataset=one,
                     processing_class=load_tokenizer(model))
trainer.train()
evaluated = trainer.evaluate()
if trainer.is_world_process_zero():
    with open(output + ".json", "w") as file:
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        json.dump([*losses, evaluated["eval_loss"]], file)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
leave()
"""


@pytest.mark.distributed
def test_fewer_pairs_than_processes(tmp_path: Path, saved_model: Any, tokenizer: Any) -> None:
    """Every process runs the one pair, and the mean over both is that pair's."""
    data, model = tmp_path / "pair.jsonl", str(saved_model("llama"))
    data.write_text(json.dumps(preference_rows(1)[0]) + "\n")
    run_processes(["-c", TWO_PROCESSES, str(data), model, str(tmp_path / "two")], 2)
    args = settings(tmp_path / "one", max_steps=4)
    one = Dataset.from_json(str(data))
    trainer = DPOTrainer(load_model(model), None, args, train_dataset=one, processing_class=tokenizer)
    trainer.train()
    want = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    want.append(trainer.evaluate(one)["eval_loss"])
    assert json.loads((tmp_path / "two.json").read_text()) == pytest.approx(want, rel=1e-4)
