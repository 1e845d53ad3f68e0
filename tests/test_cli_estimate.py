"""``flexdpo estimate``, ``flexdpo show``, ``flexdpo train --dry_run``: what they print, one line for a mistake."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig

from flexdpo import DPOConfig, DPOTrainer, load_preference_dataset
from flexdpo.cli import main
from flexdpo.runs.dry_run import dry_run
from flexdpo.runs.settings import Job
from flexdpo.training import memory
from flexdpo.training.model_loading import load_model, load_tokenizer
from tests.conftest import preference_rows
from tests.images.models import make_model
from tests.test_cli import complaint


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = preference_rows(23)
    rows.append({**rows[0], "rejected": rows[0]["chosen"]})
    rows.append({**rows[1], "rejected": "w11 w12 "})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer_folder(tmp_path: Path, tokenizer: Any) -> Path:
    """A tokenizer without a model."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


# --- estimate --------------------------------------------------------------------------------------------------------


def test_estimate_with_a_tokenizer_alone(tmp_path, capsys, data_file, tokenizer_folder) -> None:
    output = tmp_path / "estimate.json"
    words = [str(data_file), "--tokenizer", str(tokenizer_folder), "--shape", "llama-1b", "--json", str(output)]
    assert main(["estimate", *words, "--per_device_train_batch_size", "4"]) == 0
    table = capsys.readouterr().out
    assert "data: 24 of 25 rows used; skipped 1 (identical responses, first at row 23)" in table
    assert "equal prompts: 2 rows have one of 1 repeated prompts, at most 2 the same" in table
    assert "an epoch of llama-1b (1.24 billion parameters) on cuda, 4 rows a batch" in table
    assert "prefix sharing within a group" in table
    assert "suggested for 80.00 GB of memory: --per_device_train_batch_size 4" in table
    assert "\nWorth it" in table
    values = json.loads(output.read_text())
    assert f"{values['tokens']['shared']:,} are run" in table
    assert values["report"]["used"] == 24


def test_estimate_of_a_saved_model(capsys, data_file, saved_model) -> None:
    model = saved_model("qwen3")
    # sizes come from the config alone
    (model / "model.safetensors").unlink()
    assert main(["estimate", str(data_file), "--model", str(model), "--device", "cpu", "--memory", "2"]) == 0
    assert "0.1 million parameters) on cpu" in capsys.readouterr().out


def test_estimate_reads_yaml_and_takes_the_dataset_anywhere(tmp_path, capsys, data_file, tokenizer_folder) -> None:
    config = tmp_path / "estimate.yaml"
    config.write_text(f"tokenizer: {tokenizer_folder}\nshape: tiny\ndevice: cpu\nmax_length: 30\n")
    assert main(["estimate", "--config", str(config), str(data_file)]) == 0
    assert "cut to max_length" in capsys.readouterr().out


def test_help_of_both(capsys) -> None:
    for command in ("estimate", "show"):
        assert main([command, "--help"]) == 0
        assert f"flexdpo {command}" in capsys.readouterr().out


def test_mistakes_of_estimate_get_one_line(tmp_path, capsys, data_file, tokenizer_folder, saved_model) -> None:
    data, tokenizer = str(data_file), str(tokenizer_folder)
    good = ["estimate", data, "--tokenizer", tokenizer, "--device", "cpu"]
    assert "which dataset? give a file" in complaint(capsys, "estimate", "--tokenizer", tokenizer)
    assert "lengths depend on the tokenizer; give --model_name_or_path NAME" in complaint(capsys, "estimate", data)
    assert "missing is not a folder with a saved model" in complaint(
        capsys, "estimate", data, "--tokenizer", str(tmp_path / "missing")
    )
    assert "pairs.jsonl has no config.json" in complaint(capsys, "estimate", data, "--model", data)
    assert "'lama-8b' is unknown; did you mean 'llama-8b'" in complaint(capsys, *good, "--shape", "lama-8b")
    assert "device 'cud' is unknown; did you mean 'cuda'" in complaint(capsys, *good[:-1], "cud")
    assert "unknown option --sampel; did you mean '--sample'?" in complaint(capsys, *good, "--sampel", "3")
    assert "sample must be at least 1, got 0" in complaint(capsys, *good, "--sample", "0")
    assert "cannot be written" in complaint(capsys, *good, "--json", str(tmp_path / "no" / "e.json"))
    assert "pairs.json: no such file or folder; did you mean 'pairs.jsonl'?" in complaint(
        capsys, "estimate", str(tmp_path / "pairs.json"), *good[2:]
    )
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl: the file is empty" in complaint(capsys, "estimate", str(empty), *good[2:])
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "w5 w6"}\n')
    assert "data: no preference columns; found 'text'" in complaint(capsys, "estimate", str(text), *good[2:])
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "w5 ", "completion": "w6"}\n')
    assert "but no preferences" in complaint(capsys, "estimate", str(plain), *good[2:])


def test_an_unknown_name_is_looked_for_once(capsys, data_file, monkeypatch) -> None:
    asked = []

    def unreachable(self: Any, name: str, **_: Any) -> None:
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    message = complaint(capsys, "estimate", str(data_file), "--tokenizer", "no-such-tokenizer")
    assert "cannot load a tokenizer from 'no-such-tokenizer': it is no folder here, and the hub cannot be" in message
    message = complaint(capsys, "estimate", str(data_file), "--model", "no-such-model")
    assert "cannot load a model's config from 'no-such-model'" in message
    assert asked == ["no-such-tokenizer", "no-such-model"]


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_draws_lengths_and_datasets(tmp_path, capsys, data_file, tokenizer_folder) -> None:
    lengths = tmp_path / "lengths.json"
    lengths.write_text('[{"prompt": 11, "responses": [[4, [5, 3]], 6]}]')
    picture = tmp_path / "rows.png"
    assert main(["show", "--lengths", str(lengths), "--output", str(picture), "--text"]) == 0
    text = capsys.readouterr().out
    assert "shared by responses, 4 tokens (row 11 to 14, from position 11)" in text
    assert f"written to {picture}" in text
    assert picture.stat().st_size > 10_000
    words = [str(data_file), "--tokenizer", str(tokenizer_folder), "--first", "2", "--groups", "3", "--text"]
    assert main(["show", *words]) == 0
    text = capsys.readouterr().out
    assert "One packed row: 3 documents" in text
    assert "written to" not in text


def test_mistakes_of_show_get_one_line(tmp_path, capsys, data_file, tokenizer_folder) -> None:
    data, tokenizer = str(data_file), str(tokenizer_folder)
    good = ["show", data, "--tokenizer", tokenizer]
    lengths = tmp_path / "lengths.json"
    lengths.write_text('[{"prompt": 1')
    assert "lengths.json, line 1: not valid JSON" in complaint(capsys, "show", "--lengths", str(lengths))
    assert "give a dataset or --lengths, not both" in complaint(capsys, *good, "--lengths", str(lengths))
    assert "a dataset needs --tokenizer NAME" in complaint(capsys, "show", data)
    assert "--first 99: the dataset has the rows 0 to 24" in complaint(capsys, *good, "--first", "99")
    assert "--groups must be at least 1, got 0" in complaint(capsys, *good, "--groups", "0")
    assert "--view 'masks' is unknown; did you mean 'mask'" in complaint(capsys, *good, "--view", "masks")
    missing = str(tmp_path / "no" / "rows.png")
    assert "does not exist; create it first" in complaint(capsys, *good, "--output", missing)
    assert "cannot write a picture with the ending '.pgn'" in complaint(
        capsys, *good, "--output", str(tmp_path / "x.pgn")
    )
    assert "sharing must be one of" in complaint(capsys, *good, "--sharing", "row")


# --- train --dry_run -------------------------------------------------------------------------------------------------


def dry(model: Path, data: Path, *more: str) -> list[str]:
    common = "--dry_run --use_cpu true --report_to none --per_device_train_batch_size 4"
    return ["train", "--model_name_or_path", str(model), "--dataset_name", str(data), *common.split(), *more]


@pytest.mark.parametrize(
    "more",
    [[], ["--regroup_prompts", "true"], ["--max_tokens_per_row", "auto"]],
    ids=["plain", "regrouped", "auto"],
)
def test_a_dry_run_tells_the_tokens_that_the_run_has(tmp_path, capsys, saved_model, data_file, more) -> None:
    model = saved_model("llama")
    output = tmp_path / "out"
    assert main([*dry(model, data_file, *more), "--output_dir", str(output)]) == 0
    table = capsys.readouterr().out
    assert not output.exists()
    assert "nothing was trained" in table
    steps = 6
    assert f"dry run: {steps} optimizer steps an epoch" in table
    told = int(re.search(r"so ([\d,]+) are run", table).group(1).replace(",", ""))

    config = DPOConfig(
        str(output), num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", regroup_prompts="--regroup_prompts" in more,
    )  # fmt: skip
    trainer = DPOTrainer(
        load_model(str(model)),
        None,
        config,
        train_dataset=load_preference_dataset(str(data_file)),
        processing_class=load_tokenizer(str(model)),
    )
    trainer.train()
    assert trainer.tokens["run"] == told
    assert trainer.state.global_step == steps


def test_a_dry_run_counts_on_the_memory_that_the_run_has(tmp_path, capsys, saved_model, data_file, monkeypatch) -> None:
    """Several processes of a machine share it."""
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**27)
    model, rows = str(saved_model("llama")), []
    config = DPOConfig(str(tmp_path), max_tokens_per_row="auto", use_cpu=True, report_to="none")
    for processes in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert main(dry(Path(model), data_file, "--max_tokens_per_row", "auto")) == 0
        told = re.search(r"rows of (\d+) tokens", capsys.readouterr().out)
        plan = DPOTrainer(model, args=config, train_dataset=load_preference_dataset(str(data_file))).row_plan
        assert told is not None
        # the run's weights are in memory where what is free is measured
        assert int(told[1]) == pytest.approx(plan.max_tokens_per_row, rel=0.1)
        rows.append(int(told[1]))
    assert rows[1] < 0.5 * rows[0]


def test_a_model_of_images_and_text_learns_from_text(tmp_path, tokenizer, data_file) -> None:
    model = make_model("llava", dtype=torch.float32)
    model.resize_token_embeddings(max(len(tokenizer), model.config.text_config.vocab_size))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "llava")
    words = ["train", "--model_name_or_path", str(tmp_path / "llava"), "--dataset_name", str(data_file), "--use_cpu"]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--bf16", "false"]
    assert main([*words, "--dry_run"]) == main(words) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("llava", "run"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_dry_run_of_a_stream_is_refused(capsys, saved_model, data_file) -> None:
    assert main(dry(saved_model("llama"), data_file, "--dataset_streaming", "true", "--max_steps", "3")) == 2
    assert "a dry run looks at the whole dataset, and a stream is read once" in capsys.readouterr().err


def test_a_dry_run_needs_no_weights_and_knows_of_adapters(tmp_path, saved_model, data_file) -> None:
    model = saved_model("llama")
    (model / "model.safetensors").unlink()
    config = DPOConfig(str(tmp_path / "out"), use_cpu=True, per_device_train_batch_size=4)
    job = Job(model_name_or_path=str(model), dataset_name=str(data_file))
    whole = dry_run(job, config).estimate
    assert whole.memory["shared"].gradients == whole.memory["shared"].reference == 4 * whole.model.parameters
    adapted = dry_run(replace(job, use_peft=True, lora_r=2, lora_target_modules=["q_proj"]), config).estimate
    assert adapted.memory["shared"].gradients == 4 * 2 * (64 * 2 + 2 * 64)
    assert adapted.memory["shared"].reference == 0
    half = dry_run(replace(job, dtype="bfloat16"), config).estimate
    assert half.memory["shared"].weights == 2 * whole.model.parameters


def test_a_dry_run_stops_where_the_run_would(tmp_path, capsys, saved_model, data_file, tokenizer) -> None:
    model = saved_model("gpt2")
    assert "--model_name_or_path is missing" in complaint(capsys, "train", "--dry_run")
    assert re.search(
        r"has \d+ tokens in its longest sequence but max_tokens_per_row=10 ",
        complaint(capsys, *dry(model, data_file, "--max_tokens_per_row", "10")),
    )
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "w5 " * 300, "chosen": "w6 ", "rejected": "w7 "}) + "\n")
    assert "the model has 256 positions" in complaint(capsys, *dry(model, long))
    refused = tmp_path / "bloom"
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=97)
    AutoModelForCausalLM.from_config(config).save_pretrained(refused)
    tokenizer.save_pretrained(refused)
    assert "BloomForCausalLM (model_type 'bloom') cannot be exact" in complaint(capsys, *dry(refused, data_file))
