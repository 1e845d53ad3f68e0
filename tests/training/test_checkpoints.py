"""Runs that are interrupted and continued, and checkpoints that do not fit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from flexdpo import DPOTrainer, FlexdpoError
from flexdpo.training.checkpoints import RECORD_FILE, data_digest, last_checkpoint, require_same_run
from tests.conftest import preference_rows
from tests.training.test_trainer import settings

COLUMNS = ("prompt_ids", "response_ids", "edges")


@pytest.fixture
def trainer(tmp_path, tokenizer, preferences, small_model) -> Any:
    def build(folder: Path | None = None, data: Dataset | None = None, **changes: Any) -> DPOTrainer:
        changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "prove": False, **changes}
        args = settings(folder or tmp_path / "run", **changes)
        return DPOTrainer(small_model(), None, args, train_dataset=data or preferences, processing_class=tokenizer)

    return build


def test_a_continued_run_ends_where_the_uninterrupted_one_does(tmp_path, trainer) -> None:
    whole = trainer(tmp_path / "whole", max_tokens_per_row=56)
    whole.train()
    # a proof before either part changes nothing
    first = trainer(tmp_path / "parts", max_tokens_per_row=56, prove=True)
    first.add_callback(_StopAt(5))
    first.train()
    second = trainer(tmp_path / "parts", max_tokens_per_row=56, prove=True)
    second.train(resume_from_checkpoint=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name
    # what was run before the interruption is still counted
    assert second.tokens == whole.tokens


def test_a_checkpoint_that_a_signal_asked_for_is_continued(tmp_path, trainer) -> None:
    """enable_jit_checkpoint leaves a mark in the folder while it writes, which is not the checkpoint's own."""
    changes = {"save_steps": 100, "max_steps": 4}
    whole = trainer(tmp_path / "whole", **changes)
    whole.train()
    first = trainer(tmp_path / "parts", enable_jit_checkpoint=True, **changes)
    handler = next(each for each in first.callback_handler.callbacks if hasattr(each, "jit_manager"))
    first.add_callback(_Ask(2, handler.jit_manager))
    first.train()
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-2"
    second = trainer(tmp_path / "parts", **changes)
    second.train(resume_from_checkpoint=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name


class _Ask(TrainerCallback):
    """As SIGTERM does, some seconds later."""

    def __init__(self, step: int, manager: Any) -> None:
        self.step, self.manager = step, manager

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.manager.is_checkpoint_requested = state.global_step == self.step


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_half_written_checkpoint_is_passed_over(tmp_path, trainer) -> None:
    run = trainer()
    run.train()
    newest = tmp_path / "run" / "checkpoint-8"
    assert last_checkpoint(tmp_path / "run") == newest
    (newest / RECORD_FILE).unlink()
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-6"
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / RECORD_FILE).unlink(missing_ok=True)
    with pytest.raises(FlexdpoError, match=r"no complete checkpoint in .*run; start the run without"):
        trainer().train(resume_from_checkpoint=True)


def test_only_as_many_checkpoints_as_asked_for(tmp_path, trainer) -> None:
    trainer(save_total_limit=2).train()
    assert sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path, trainer, tokenizer) -> None:
    trainer().train()
    with pytest.raises(FlexdpoError, match=r"checkpoint-8 was made with beta=0.1 and this run has 0.2; continue with"):
        trainer(beta=0.2).train(resume_from_checkpoint=True)
    other = Dataset.from_list(preference_rows(24, seed=1))
    with pytest.raises(FlexdpoError, match="checkpoint-8 was made from other training data"):
        trainer(data=other).train(resume_from_checkpoint=True)
    (tmp_path / "run" / "checkpoint-8" / RECORD_FILE).write_text("{")
    with pytest.raises(FlexdpoError, match=r"flexdpo_run\.json is damaged .*; continue from .*checkpoint-6$"):
        trainer().train(resume_from_checkpoint=True)
    with pytest.raises(FlexdpoError, match=r"is no checkpoint of flexdpo: it has no flexdpo_run\.json"):
        trainer().train(resume_from_checkpoint=str(tmp_path))


CHANGES: list[dict[str, Any]] = [
    {"adam_beta2": 0.9},
    {"lr_scheduler_type": "linear"},
    {"warmup_steps": 2},
    {"bf16": True},
    {"weight_decay": 0.1},
    {"dataloader_drop_last": True},
    {"disable_dropout": False},
    {"max_length": 64},
]


def test_every_setting_that_decides_what_is_learned_is_compared(tmp_path, trainer) -> None:
    plain = {"max_steps": 2, "lr_scheduler_type": "constant_with_warmup"}
    trainer(**plain).train()
    kept = weights_of(tmp_path / "run" / "checkpoint-2")
    for change in CHANGES:
        (name,) = change
        with pytest.raises(FlexdpoError, match=rf"checkpoint-2 was made with {name}=.* and this run has"):
            trainer(**{**plain, **change}).train(resume_from_checkpoint=True)
    free = trainer(**plain, logging_steps=3, save_steps=7, max_tokens_per_row=56, save_total_limit=5)
    free.train(resume_from_checkpoint=True)
    # and a run that has all of its steps takes no other
    assert free.state.global_step == 2
    assert all(torch.equal(kept[name], weight) for name, weight in free.model.state_dict().items())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_longer_run_keeps_the_rates_of_the_steps_behind_it(tmp_path, trainer) -> None:
    trainer(max_steps=2).train()
    longer = trainer(max_steps=3)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3
    falling = {"lr_scheduler_type": "linear", "save_steps": 2}
    trainer(tmp_path / "falling", max_steps=2, **falling).train()
    with pytest.raises(FlexdpoError, match=r"belongs to a run of 2 steps and this one would have 3, so.*'linear'"):
        trainer(tmp_path / "falling", max_steps=3, **falling).train(resume_from_checkpoint=True)


def test_every_file_of_a_checkpoint_is_vouched_for(tmp_path, trainer) -> None:
    trainer(max_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-2"
    names = {path.name for path in folder.iterdir()} - {RECORD_FILE}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} <= names
    record = trainer(max_steps=2)._run_record
    require_same_run(folder, record)
    for name in names:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(
            FlexdpoError, match=rf"checkpoint-2 lacks {name}, which was saved with it; there is no other"
        ):
            require_same_run(folder, record)
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(FlexdpoError, match=rf"{name} is not as it was saved"):
            require_same_run(folder, record)
        (folder / name).write_bytes(whole)


def test_a_checkpoint_without_the_optimizer_is_no_place_to_go_on_from(trainer) -> None:
    trainer(max_steps=2, save_only_model=True).train()
    with pytest.raises(FlexdpoError, match=r"checkpoint-2 was saved with save_only_model=True, without the opt"):
        trainer(max_steps=4).train(resume_from_checkpoint=True)


def test_a_run_goes_on_with_its_own_model(tmp_path, trainer, tokenizer, preferences, small_model) -> None:
    trainer(max_steps=2).train()

    def again(model: Any, **given: Any) -> None:
        args = settings(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
        run = DPOTrainer(model, args=args, train_dataset=preferences, processing_class=tokenizer, **given)
        run.train(resume_from_checkpoint=True)

    # what was trained so far is no reference
    moved = small_model()
    moved.load_state_dict(weights_of(tmp_path / "run" / "checkpoint-2"))
    with pytest.raises(FlexdpoError, match=r"checkpoint-2 belongs to a run with other reference weights; give model"):
        again(moved)
    with pytest.raises(FlexdpoError, match=r"checkpoint-2 belongs to a run with other reference weights"):
        again(small_model(), ref_model=small_model(seed=1))
    model = small_model()
    model.config.rms_norm_eps = 0.1
    with pytest.raises(FlexdpoError, match=r"checkpoint-2 belongs to a run with other model settings"):
        again(model)


def test_a_setting_of_a_loss_counts_as_another_run(trainer) -> None:
    trainer(loss_type="simpo", max_steps=2).train()
    with pytest.raises(FlexdpoError, match=r"was made with simpo_gamma=0.5 and this run has 0.9"):
        trainer(loss_type="simpo", max_steps=2, simpo_gamma=0.9).train(resume_from_checkpoint=True)


def test_a_reference_that_moves_is_continued_too(tmp_path, trainer) -> None:
    def build(folder: str) -> DPOTrainer:
        moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
        return trainer(tmp_path / folder, **moving)

    whole = build("whole")
    whole.train()
    first = build("parts")
    first.add_callback(_StopAt(5))
    first.train()
    second = build("parts")
    second.train(resume_from_checkpoint=True)
    for part in ("model", "ref_model"):
        for name, weight in getattr(whole, part).state_dict().items():
            assert torch.equal(getattr(second, part).state_dict()[name], weight), (part, name)
    (tmp_path / "parts" / "checkpoint-8" / "reference.safetensors").unlink()
    with pytest.raises(FlexdpoError, match=r"checkpoint-8 lacks reference\.safetensors, which was saved with it"):
        build("parts").train(resume_from_checkpoint=True)


def test_a_checkpoint_keeps_the_arguments_as_they_were_given(tmp_path, trainer) -> None:
    trainer(save_total_limit=3, max_steps=2).train()
    stored = torch.load(tmp_path / "run" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert stored.save_total_limit == 3


def test_the_digest_sees_tokens_and_not_chunks() -> None:
    rows = [{"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]], "edges": [[0, 1]]}, *_other_rows()]
    whole = Dataset.from_list(rows)
    from datasets import concatenate_datasets

    pieces = concatenate_datasets([Dataset.from_list(rows[:1]), Dataset.from_list(rows[1:])])
    assert data_digest(whole, COLUMNS) == data_digest(pieces, COLUMNS)
    assert data_digest(whole.select([1, 0, 2]), COLUMNS) != data_digest(whole, COLUMNS)
    moved = [{"prompt_ids": [1, 2, 3], "response_ids": [[], [4, 5]], "edges": [[0, 1]]}, *rows[1:]]
    assert data_digest(Dataset.from_list(moved), COLUMNS) != data_digest(whole, COLUMNS)


def _other_rows() -> list[dict[str, Any]]:
    return [{"prompt_ids": [7], "response_ids": [[k], [5]], "edges": [[0, 1]]} for k in (1, 2)]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, trainer) -> None:
    run = trainer()
    run.add_callback(_Poison(run.model, step=5))
    message = r"step 6, row \d+: the log-probability of response 0 under the policy is nan"
    with pytest.raises(FlexdpoError, match=message):
        run.train()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    kept = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in kept.values())


class _Poison(TrainerCallback):
    def __init__(self, model: torch.nn.Module, step: int) -> None:
        self.model, self.step = model, step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            next(self.model.parameters()).data.fill_(float("nan"))


# each run is a process of its own, forked from one that has imported what they need: that takes longer than a run
RUNS = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch
from datasets import Dataset
from flexdpo import DPOConfig, DPOTrainer
from flexdpo.training.model_loading import load_model, load_tokenizer
torch.set_num_threads(1)

def run(data, model, output, ready):
    args = DPOConfig(output, max_steps=40, save_steps=1, save_total_limit=2, per_device_train_batch_size=4,
                     use_cpu=True, learning_rate=1e-3, report_to="none", disable_tqdm=True, logging_steps=100,
                     max_tokens_per_row=64)
    trainer = DPOTrainer(load_model(model), None, args, train_dataset=Dataset.from_json(data),
                         processing_class=load_tokenizer(model))
    os.write(ready, b"!")
    has_checkpoint = any(Path(output).glob("checkpoint-*/flexdpo_run.json"))
    trainer.train(resume_from_checkpoint=has_checkpoint or None)
    trainer.save_model()

for line in sys.stdin:
    arguments, kill_after = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # what a run prints is no answer
        try:
            run(*arguments, writer)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
    os.close(reader)
"""


@contextmanager
def started_runs() -> Iterator[Callable[..., bool]]:
    """A function that trains; it kills without warning some seconds after training starts. True when it ended."""
    with subprocess.Popen(
        [sys.executable, "-c", RUNS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as runs:
        assert runs.stdin is not None
        assert runs.stdout is not None

        def run(arguments: list[str], kill_after: float | None = None) -> bool:
            print(json.dumps([arguments, kill_after]), file=runs.stdin, flush=True)
            status = int(runs.stdout.readline())
            assert status in (0, signal.SIGKILL)
            return status == 0

        yield run


@pytest.mark.slow
def test_killed_runs_end_bit_identical(tmp_path, saved_model) -> None:
    """SIGKILL at random moments, in steps and in checkpoints, until the run has come through."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(24)))
    model = str(saved_model("llama"))
    generator = torch.Generator().manual_seed(0)
    kills = 0
    folder = 0
    with started_runs() as run:
        assert run([str(data), model, str(tmp_path / "whole")])
        want = load_file(tmp_path / "whole" / "model.safetensors")
        while kills < 20:
            folder += 1
            arguments = [str(data), model, str(tmp_path / f"killed-{folder}")]
            for _ in range(5):
                kills += not run(arguments, kill_after=float(torch.rand((), generator=generator)) * 0.6 + 0.05)
            assert run(arguments)
            got = load_file(tmp_path / f"killed-{folder}" / "model.safetensors")
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
    assert kills >= 20
