"""The command line: jobs on the user's own model and data, and one line for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from flexdpo.cli import main
from flexdpo.show.plots import draw_training_curves
from tests.conftest import preference_rows


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(24)))
    return path


def train(model: Path, data: Path, output: Path, *more: str) -> int:
    common = "--max_steps 4 --per_device_train_batch_size 4 --logging_steps 1 --learning_rate 1e-3 --use_cpu true"
    names = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    return main(["train", *names, *common.split(), "--report_to", "none", "--disable_tqdm", "true", *more])


@pytest.mark.parametrize("name", ["llama", "mistral", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_job_runs_saves_and_generates(tmp_path, capsys, caplog, monkeypatch, saved_model, data_file, name) -> None:
    output, histories = tmp_path / "out", []

    def draw_curves(history, path) -> None:
        histories.append(history)
        draw_training_curves(history, path)

    monkeypatch.setattr("flexdpo.runs.job.draw_training_curves", draw_curves)
    assert train(saved_model(name), data_file, output, "--eval_dataset_name", str(data_file)) == 0
    table = capsys.readouterr().out
    assert "train: 24 of 24 rows used" in table
    assert re.search(r"proved on \d examples: log-probabilities within .* noise floor", caplog.text)
    assert "held-out reward accuracy, before and after" in table
    assert "tokens the ordinary way" in table

    with safe_open(output / "model.safetensors", "pt") as weights:
        assert list(weights.keys())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(0.693147, abs=1e-6)
    # the curves begin with the evaluation before training
    (history,) = histories
    assert [line["step"] for line in history if "eval_loss" in line] == [0, history[-1]["step"]]
    for picture in ("training.png", "mask.png"):
        with Image.open(output / picture) as image:
            assert image.width >= 1000
            image.load()

    # the saved model knows nothing of flexdpo
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config._attn_implementation != "flexdpo"
    words = AutoTokenizer.from_pretrained(output)
    prompt = words("w5 w6 w7 w8 w9 w10 w11 w12", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert written.shape[1] > prompt.input_ids.shape[1]
    again = AutoModelForCausalLM.from_pretrained(output, attn_implementation="flexdpo")
    torch.testing.assert_close(again.generate(**prompt, max_new_tokens=5, do_sample=False), written)


def test_a_streamed_job_learns_what_a_loaded_one_does(tmp_path, capsys, saved_model, data_file) -> None:
    losses = []
    for way in ("false", "true"):
        output = tmp_path / way
        more = ["--dataset_streaming", way, "--train_sampling_strategy", "sequential", "--prove", "false"]
        assert train(saved_model("llama"), data_file, output, "--eval_dataset_name", str(data_file), *more) == 0
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert (output / "mask.png").exists()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "rows used" in capsys.readouterr().out


def test_an_adapter_is_saved_small(tmp_path, saved_model, data_file) -> None:
    output = tmp_path / "out"
    assert train(saved_model("llama"), data_file, output, "--use_peft", "--lora_r", "4") == 0
    assert (output / "adapter_model.safetensors").exists()
    assert not (output / "model.safetensors").exists()


def test_yaml_gives_defaults_and_the_command_line_wins(tmp_path, saved_model, data_file) -> None:
    config = tmp_path / "run.yaml"
    settings = {"dataset_name": str(data_file), "max_steps": 2, "loss_type": ["sigmoid", "sft"], "beta": 0.3}
    settings |= {"use_cpu": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    settings |= {"model_name_or_path": str(saved_model("llama")), "output_dir": str(tmp_path / "yaml-out")}
    config.write_text(json.dumps(settings))
    assert main(["train", "--config", str(config), "--max_steps", "3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "yaml-out" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 3
    assert lines[0]["loss"] > 2  # ln 2 and a negative log-likelihood


def test_help_is_grouped(capsys) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    headings = ["\nmodel:", "\ndata:", "\npreferences:", "\nthe run, most used", "\nthe run, all else"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert places[2] < text.index("--beta ") < places[3]
    assert main([]) == 0
    assert "flexdpo COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0


def complaint(capsys: Any, *argv: str) -> str:
    """Run a command that must fail with exit code 2 and one line; return the line."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("flexdpo: error: ")
    assert "Traceback" not in captured.err
    return message


def test_mistakes_get_one_line(tmp_path, capsys, saved_model, data_file) -> None:
    model, output = str(saved_model("llama")), str(tmp_path / "out")
    job = ["train", "--model_name_or_path", model, "--dataset_name", str(data_file), "--output_dir", output]
    quick = ["--max_steps", "1", "--use_cpu", "true", "--report_to", "none"]

    assert "unknown command 'trian'; did you mean 'train'?" in complaint(capsys, "trian")
    assert "unknown option --betta; did you mean '--beta'?" in complaint(capsys, *job, "--betta", "0.2")
    assert "unknown loss_type 'sigmod'; did you mean 'sigmoid'?" in complaint(capsys, *job, "--loss_type", "sigmod")
    assert "--dataset_name is missing" in complaint(capsys, "train", "--model_name_or_path", model)
    assert "--model_name_or_path is missing" in complaint(capsys, "train", "--dataset_name", str(data_file))
    missing = complaint(capsys, *job[:4], str(tmp_path / "nowhere.jsonl"))
    assert "nowhere.jsonl" in missing
    assert "not a folder with a saved model" in complaint(capsys, "train", "--model_name_or_path", "./no", *job[3:])
    empty = tmp_path / "empty-model"
    empty.mkdir()
    assert "has no config.json" in complaint(capsys, "train", "--model_name_or_path", str(empty), *job[3:], *quick)

    config = tmp_path / "bad.yaml"
    config.write_text("bata: 0.1\n")
    assert "unknown option --bata; did you mean '--beta'?" in complaint(capsys, *job, "--config", str(config))
    config.write_text("- a\n- b\n")
    assert "must hold 'option: value' lines, found a list" in complaint(capsys, *job, "--config", str(config))
    config.write_text("a: [1\n")
    assert "is not valid YAML" in complaint(capsys, *job, "--config", str(config))
    assert "no such file" in complaint(capsys, *job, "--config", str(tmp_path / "none.yaml"))

    unreadable = tmp_path / "broken.jsonl"
    unreadable.write_text(data_file.read_text() + "{'prompt': \n")
    assert "broken.jsonl, line 25" in complaint(capsys, *job[:4], str(unreadable), *job[5:], *quick)


def test_a_full_output_folder_is_not_overwritten_unasked(tmp_path, capsys, saved_model, data_file) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("keep me")
    message = complaint(
        capsys, "train", "--model_name_or_path", str(saved_model("llama")), "--dataset_name", str(data_file),
        "--output_dir", str(output),
    )  # fmt: skip
    assert "is not empty; name another, add --overwrite_output_dir" in message
    assert [entry.name for entry in output.iterdir()] == ["precious.txt"]
    assert train(saved_model("llama"), data_file, output, "--overwrite_output_dir") == 0
    assert (output / "precious.txt").exists()


def test_the_traceback_is_shown_when_asked_for(capsys, saved_model) -> None:
    from flexdpo import FlexdpoError

    job = ["train", "--model_name_or_path", str(saved_model("llama"))]
    with pytest.raises(FlexdpoError, match="--dataset_name is missing"):
        main([*job, "--traceback"])
    # transformers' own option of that name
    assert "--debug takes one of transformers' values" in complaint(capsys, *job, "--debug")
    assert "invalid DebugOption value: 'often'" in complaint(capsys, *job, "--debug", "often")
    assert "--dataset_name is missing" in complaint(capsys, *job, "--debug", "underflow_overflow")


def test_check_says_exact_or_refused(tmp_path, capsys, saved_model) -> None:
    assert main(["check", str(saved_model("llama")), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "exact"
    BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2).save_pretrained(tmp_path / "bloom")
    assert main(["check", str(tmp_path / "bloom")]) == 3
    assert "REFUSED" in capsys.readouterr().out
    assert "unknown option --jsn; did you mean '--json'?" in complaint(capsys, "check", "x", "--jsn")


def test_a_mixture_from_a_yaml_file(tmp_path, capsys, saved_model, data_file) -> None:
    other = tmp_path / "named.jsonl"
    rows = [{"q": f"w{n % 9 + 3} ", "a": "w5 w6", "b": "w7", "n": n} for n in range(12)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [
        {"path": str(data_file), "count": 8},
        {"path": str(other), "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}},
    ]
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"datasets": entries, "test_split_size": 0.2, "logging_steps": 1}))
    words = ["train", "--model_name_or_path", str(saved_model("llama")), "--config", str(config), "--use_cpu"]
    words += ["--max_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--bf16", "false"]
    assert main([*words, "--dry_run"]) == 0
    assert "16 of 16 rows used" in capsys.readouterr().out
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "train: 16 of 16 rows used" in table
    assert "eval: 4 of 4 rows used" in table
    assert main([*words, "--dataset_name", "x"]) == 2
    assert "--datasets names all datasets" in capsys.readouterr().err
