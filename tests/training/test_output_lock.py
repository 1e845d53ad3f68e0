"""Two runs and one output folder."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from flexdpo import FlexdpoError
from flexdpo.training.output_lock import LOCK_FILE, holding_output
from tests.training.test_trainer import settings


def hold(folder: Path, held: Any) -> None:
    with holding_output(folder, is_owner=True):
        held.set()
        time.sleep(600)


def test_another_process_is_kept_out_until_the_first_is_gone(tmp_path, tokenizer, preferences, small_model) -> None:
    from flexdpo import DPOTrainer

    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    holder = fork.Process(target=hold, args=(tmp_path / "out", held))
    holder.start()
    try:
        assert held.wait(60)
        args = settings(tmp_path / "out", max_steps=1, save_strategy="steps", save_steps=1)
        trainer = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
        message = rf"another run is writing into .*out .*{holder.pid}.*wait until it has ended, or give another output"
        with pytest.raises(FlexdpoError, match=message):
            trainer.train()
        assert not list((tmp_path / "out").glob("checkpoint-*"))
        # other processes of one run hold nothing
        with holding_output(tmp_path / "out", is_owner=False):
            pass
    finally:
        holder.kill()
        holder.join()
    # what a dead process has left is nobody's
    assert (tmp_path / "out" / LOCK_FILE).exists()
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1"]


def test_a_trainer_inside_a_job_shares_its_folder(tmp_path: Path) -> None:
    with holding_output(tmp_path, is_owner=True):
        with holding_output(tmp_path, is_owner=True):
            assert (tmp_path / LOCK_FILE).exists()
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()
    with pytest.raises(KeyError), holding_output(tmp_path, is_owner=True):
        raise KeyError
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    held = holding_output(tmp_path / "file", is_owner=True)
    with pytest.raises(FlexdpoError, match=r"file is a file; name a folder"), held:
        pass
