"""What a run leaves behind: its settings, its card, its table however short it was, a word when it is interrupted."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from flexdpo.cli import main
from flexdpo.commands.train import default_output_dir, read
from flexdpo.runs.job import RUN_FILE
from tests.conftest import preference_rows
from tests.test_cli import complaint


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_model: Any) -> Any:
    """Words of a tiny run in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(24)))
    words = ["train", "--model_name_or_path", str(saved_model("llama")), "--dataset_name", "pairs.jsonl"]
    words += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--prove", "false"]
    return [*words, "--learning_rate", "1e-3", "--per_device_train_batch_size", "4"]


def test_a_run_is_repeated_from_what_it_left(job, capsys) -> None:
    job += ["--max_steps", "3", "--logging_steps", "1", "--run_name=-quick", "--loss_type", "sigmoid", "sft"]
    job += ["--debug", "underflow_overflow"]
    job += ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-7}', "--seed", "7"]
    assert main([*job, "--output_dir", "out", "--max_tokens_per_row", "auto"]) == 0
    settings = yaml.safe_load(Path("out", RUN_FILE).read_text())
    assert settings["run_name"] == "-quick"
    assert settings["seed"] == 7
    assert isinstance(settings["max_tokens_per_row"], int)
    assert not {"output_dir", "overwrite_output_dir", "beta"} & settings.keys()

    assert main(["train", "--config", f"out/{RUN_FILE}"]) == 0
    again = next(path for path in Path().glob("*-dpo"))
    assert f"written to               {again}" in capsys.readouterr().out
    first, second = load_file("out/model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (Path("out"), again)]
    losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
    assert losses[0] == losses[1]
    left = yaml.safe_load((again / RUN_FILE).read_text())
    assert {name: str(value) for name, value in left.items()} == {name: str(each) for name, each in settings.items()}


class Hub:
    """Answers in place of the hub, or does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_repository, self.takes_files, self.pushed = True, True, list[list[str]]()
        for name in ("create_repo", "upload_folder"):
            answer = getattr(self, name)
            monkeypatch.setattr(HfApi, name, lambda _, *args, answer=answer, **kwargs: answer(*args, **kwargs))
            # earlier versions of transformers call functions
            monkeypatch.setattr(f"transformers.trainer.{name}", answer, raising=False)

    def create_repo(self, name: str, **_: Any) -> Any:
        if not self.has_repository:
            raise ConnectionError("no route to host\nand more")
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path: str, run_as_future: bool, **_: Any) -> Any:
        if self.takes_files:
            self.pushed.append(sorted(path.name for path in Path(folder_path).iterdir()))
        error = OSError("413: too large\nand more")
        if run_as_future:
            done: Future[None] = Future()
            done.set_result(None) if self.takes_files else done.set_exception(error)
            return done
        if not self.takes_files:
            raise error
        return None


def test_a_run_that_cannot_be_pushed_is_on_disk(job, capsys, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    hub = Hub(monkeypatch)
    job += [
        "--max_steps",
        "2",
        "--save_steps",
        "1",
        "--logging_steps",
        "1",
        "--push_to_hub",
        "true",
        "--output_dir",
        "out",
    ]
    hub.has_repository = False
    message = complaint(capsys, *job)
    assert "the hub gives no repository 'out' to push to (ConnectionError: no route to host); log in" in message
    assert not Path("out", "model.safetensors").exists()  # nothing was trained yet
    hub.has_repository, hub.takes_files = True, False
    message = complaint(capsys, *job, "--overwrite_output_dir", "true")
    assert "the model is saved in out, and could not be pushed to me/out (OSError: 413: too large)" in message
    assert message.endswith("; push it later with: hf upload me/out out")
    assert "checkpoint-1 could not be pushed (OSError: 413: too large); it is on disk" in caplog.text
    written = {"model.safetensors", "README.md", "mask.png", "training.png", RUN_FILE}
    assert {path.name for path in Path("out").iterdir()} >= written
    hub.takes_files = True
    assert main([*job, "--overwrite_output_dir", "true"]) == 0
    # with the card and the figures that it ended with
    assert written <= {*hub.pushed[-1]}
    assert "tokens run in training" in Path("out", "README.md").read_text()


def test_nothing_is_left_of_a_run_that_is_written_over(job, capsys) -> None:
    first = ["--max_steps", "4", "--save_steps", "2", "--use_peft", "true", "--lora_r", "2", "--logging_steps", "1"]
    assert main([*job, *first, "--output_dir", "out"]) == 0
    Path("out", "notes.txt").write_text("kept")
    assert Path("out/checkpoint-4").is_dir()
    again = [*job, "--max_steps", "3", "--save_steps", "2", "--logging_steps", "1", "--overwrite_output_dir", "true"]
    again += ["--resume_from_checkpoint", "false"]
    shutil.copytree("out/checkpoint-4", "out/checkpoint-best")
    Path("out/checkpoint-2").rename("moved")
    Path("out/checkpoint-2").symlink_to(Path("moved").resolve())
    assert main([*again, "--output_dir", "out"]) == 0
    # neither the old adapter, which would be laid over the new model, nor a checkpoint to go on from by mistake
    assert not list(Path("out").glob("adapter*"))
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == [
        *("checkpoint-2", "checkpoint-3", "checkpoint-best")
    ]
    assert list(Path("moved").glob("adapter*"))
    steps = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3]
    assert Path("out/notes.txt").read_text() == "kept"

    model = again[again.index("--model_name_or_path") + 1]
    again[again.index(model)] = "out"
    assert "would remove out, the model that is trained" in complaint(capsys, *again, "--output_dir", "out")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "out"}')
    again[again.index("out")] = "adapter"
    assert "would remove out, the model that is trained" in complaint(capsys, *again, "--output_dir", "out")
    again[again.index("adapter")] = model
    Path("elsewhere").mkdir()
    Path("elsewhere/model.safetensors").write_text("somebody's")
    assert "holds model.safetensors, and is no run" in complaint(capsys, *again, "--output_dir", "elsewhere")
    assert Path("elsewhere/model.safetensors").read_text() == "somebody's"


def test_a_run_without_a_name_goes_to_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model_name_or_path", "a/model", "--dataset_name", "x", "--use_cpu"]
    assert default_output_dir(*read(words)[:2]) == "model-dpo"
    Path("model-dpo").mkdir()
    assert default_output_dir(*read(words)[:2]) == "model-dpo"
    Path("model-dpo/file").touch()
    assert default_output_dir(*read(words)[:2]) == "model-dpo-2"
    assert default_output_dir(*read([*words, "--resume_from_checkpoint", "true"])[:2]) == "model-dpo"


@pytest.mark.parametrize("words", ["--max_steps 2", "--num_train_epochs 0.05", "--max_steps 2 --logging_strategy no"])
def test_however_short_a_run_is_it_ends_with_its_table(job, capsys, caplog, monkeypatch, words) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no font")

    monkeypatch.setattr("flexdpo.runs.job.draw_example_mask", fail)
    token = ["--model_init_kwargs", '{"token": "hf_x", "revision": "main"}']
    assert main([*job, *words.split(), *token, "--output_dir", "out"]) == 0
    table = capsys.readouterr().out
    assert "train: 24 of 24 rows used" in table
    assert "tokens run in training" in table
    assert "no picture could be drawn (OSError: no font); the model is saved" in caplog.text
    assert Path("out/model.safetensors").is_file()
    assert not any("hf_x" in file.read_text() for file in Path("out").iterdir() if file.suffix in (".yaml", ".md"))


def test_the_card_says_what_was_done(job, capsys) -> None:
    job[job.index("--prove") + 1] = "true"
    job += ["--max_steps", "1", "--beta", "0.3", "--eval_dataset_name", "pairs.jsonl"]
    assert main([*job, "--output_dir", "out"]) == 0
    card = ModelCard.load("out/README.md")
    assert card.data.tags == ["generated_from_trainer", "flexdpo", "dpo"]
    assert card.data.base_model is None  # a folder here is none on the hub
    for words in (
        "on `pairs.jsonl`",
        "- beta: 0.3",
        "- proved on",
        "train: 24 of 24 rows used",
        "reward accuracy",
        "torch",
    ):
        assert words in card.text, words
    # policy and reference begin as one
    assert "held-out reward accuracy, before and after  all tied" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 3), (signal.SIGHUP, 1)])
def test_an_interrupted_run_says_how_to_go_on(job, capsys, monkeypatch, number, step) -> None:
    from flexdpo.runs.job import MetricsFile

    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), number)

    job += ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_step_end", interrupt)
        assert main([*job, "--output_dir", "out"]) == 128 + number
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flexdpo: ")]
    said = (
        "out/checkpoint-2 is complete, go on with: "
        if step == 3
        else "there is no complete checkpoint yet, begin again "
    )
    assert f"flexdpo: interrupted; {said}" in line
    if step == 3:  # the command that it gives, as it stands
        assert main(line.split("flexdpo ")[-1].split()) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_before_the_first_step(job, capsys, monkeypatch, tmp_path) -> None:
    def refused(*words: str) -> str:
        messages = {complaint(capsys, *job, "--output_dir", "out", *words, *more) for more in ([], ["--dry_run"])}
        assert not Path("out", "model.safetensors").exists()
        assert len(messages) == 1, messages
        return messages.pop()

    assert "--eval_strategy steps needs evaluation data; add --eval" in refused("--eval_strategy", "steps")
    assert "--eval_on_start True needs evaluation data" in refused("--eval_on_start")
    evaluated = ["--eval_dataset_name", "pairs.jsonl"]
    assert "--save_strategy follows evaluations" in refused("--save_strategy", "best", *evaluated)
    assert "requires an eval strategy" in refused("--lr_scheduler_type", "reduce_lr_on_plateau")
    assert "--report_to wandb: " in refused("--report_to", "wandb")
    assert "nobody is not supported, only" in refused("--report_to", "nobody")
    assert "--optim adamw_bnb_8bit: " in refused("--optim", "adamw_bnb_8bit")
    assert "--optim galore_adamw: " in refused("--optim", "galore_adamw", "--optim_target_modules", "all-linear")
    assert "Target modules {'nowhere'} not found" in refused("--use_peft", "--lora_target_modules", "nowhere")
    Path("file").touch()
    assert "file cannot be written to; name another folder" in refused("--output_dir", "file/out")

    rows = [{"prompt": "w5 ", "completion": f"w{n % 9} w2", "label": n % 2 == 0} for n in range(8)]
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = ["--dataset_name", "labels.jsonl"]
    assert "have a label for each response; use --loss_type kto" in refused(*labels)
    assert "eval: loss_type sigmoid compares responses" in refused("--eval_dataset_name", "labels.jsonl")
    monkeypatch.setattr("flexdpo.runs.ready.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert "the model with one checkpoint takes" in refused()


def test_an_unknown_metric_is_named_before_training(job, capsys) -> None:
    job += ["--eval_dataset_name", "pairs.jsonl", "--metric_for_best_model", "acuracy", "--load_best_model_at_end"]
    job += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    assert "--metric_for_best_model acuracy is none of what" in complaint(capsys, *job, "--output_dir", "out")


def test_a_trained_adapter_is_trained_on(job, capsys) -> None:
    lora = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear", "--use_rslora"]
    assert main([*job, *lora, "--max_steps", "2", "--output_dir", "first"]) == 0
    job[job.index("--model_name_or_path") + 1] = "first"
    assert main([*job, "--dry_run"]) == 0
    job[job.index("--prove") + 1] = "true"
    assert main([*job, "--max_steps", "2", "--output_dir", "second"]) == 0
    one, two = (load_file(f"{name}/adapter_model.safetensors") for name in ("first", "second"))
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert main(["estimate", "pairs.jsonl", "--model_name_or_path", "first", "--device", "cpu"]) == 0
    assert main(["show", "--dataset_name", "pairs.jsonl", "--model_name_or_path", "first", "--text"]) == 0
    assert main(["check", "first"]) == 0
    assert "asks for another adapter" in complaint(capsys, *job, *lora, "--output_dir", "third")
    Path("first/adapter_config.json").write_text("{}")
    assert "adapter_config.json is damaged" in complaint(capsys, *job, "--output_dir", "third")


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
def test_quantised_weights_are_trained_through_an_adapter(job, tokenizer, caplog, bits) -> None:
    pytest.importorskip("bitsandbytes")
    # weights are quantised in blocks of 64
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    job[job.index("--model_name_or_path") + 1] = "model"
    job[job.index("--prove") + 1] = "true"
    job += ["--max_steps", "2", "--lora_target_modules", "all-linear"]
    assert main([*job, "--use_peft", bits, "--output_dir", "first"]) == 0
    assert "the adapter's within" in caplog.text
    job = [word for word in job if word not in ("--lora_target_modules", "all-linear")]
    job[job.index("--model_name_or_path") + 1] = "first"
    assert main([*job, bits, "--output_dir", "second"]) == 0
    one, two = (load_file(f"{name}/adapter_model.safetensors") for name in ("first", "second"))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_kto_learns_from_a_csv_file(job, capsys) -> None:
    rows = ["prompt,completion,label", *(f"w5 w{n % 7} ,w{n % 9} w2,{n % 2 == 0}" for n in range(16))]
    Path("labels.csv").write_text("\n".join(rows))
    job[job.index("--dataset_name") + 1] = "labels.csv"
    assert main([*job, "--loss_type", "kto", "--max_steps", "2", "--logging_steps", "1", "--output_dir", "out"]) == 0
    assert "train: 16 of 16 rows used" in capsys.readouterr().out
    first = Path("out/metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["loss"] == pytest.approx(0.5)  # policy and reference begin as one
