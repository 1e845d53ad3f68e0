"""Every layout of the formats through the commands themselves, which all say what they read it as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from flexdpo import load_preference_dataset
from flexdpo.cli import main
from tests.data.test_columns import COLUMNS, FILES, FORMATS, READ_AS, bytewise, own_cache

__all__ = ["bytewise", "own_cache"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, bytewise: Any) -> str:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(bytewise))).save_pretrained(folder)
    bytewise.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "estimate", "show"])
@pytest.mark.parametrize("name", FILES)
def test_a_command_reads_it_and_says_so(command: str, name: str, model: str, tmp_path: Path, capsys: Any) -> None:
    words = ["--model_name_or_path", model, "--dataset_name", str(FORMATS / name), "--max_length", "4096"]
    columns = ",".join(f"{own}={theirs}" for own, theirs in COLUMNS.get(name, {}).items())
    words += ["--columns", columns] if columns else []
    if command == "train":
        labelled = "label" in READ_AS.get(name, "") and "SHP" not in READ_AS[name]
        words += ["--loss_type", "kto"] if labelled else []
        words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--use_cpu", "--report_to", "none"]
        words += ["--save_strategy", "no", "--per_device_train_batch_size", "8"]
    elif command == "show":
        words += ["--text"]
    assert main([command, *words]) == 0
    told = capsys.readouterr()
    assert f"read as {READ_AS.get(name, 'preferences: prompt, chosen, rejected')}" in told.out + told.err
    if command == "show":
        return
    rows = len(load_preference_dataset(str(FORMATS / name), columns=COLUMNS.get(name)))
    assert f"of {rows} rows used" in told.out + told.err
