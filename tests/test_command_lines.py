"""A table of command lines: each ends with 0, 2, 3 or 128 + n, none with a traceback, every refusal with a way out."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flexdpo.cli import main
from flexdpo.commands import COMMANDS
from flexdpo.commands.known_elsewhere import REASONS
from flexdpo.commands.train import parser
from flexdpo.runs.ready import require_ready
from tests.conftest import preference_rows

# what a message tells its reader to do
WAY_OUT = re.compile(
    r"(?:[;:,.?]|\b(?:and|or)) (?:add|call|choose|continue|did you mean|give|go on|install|leave|load|lower|make|mend|"
    r"name|pip|put|raise|save|see|set|shorten|start|take|train|use|wait|write)\b|see flexdpo \w+ --help|--\w+ shows|"
    r"\bmust (?:not )?be\b|; known: ",
    re.IGNORECASE,
)
JOB = ["train", "--model_name_or_path", "./model", "--dataset_name", "pairs.jsonl", "--use_cpu", "--report_to", "none"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with preferences and with files that nobody could read."""
    folder = tmp_path_factory.mktemp("home")
    lines = "".join(json.dumps(row) + "\n" for row in preference_rows(12))
    (folder / "pairs.jsonl").write_text(lines)
    (folder / "half.jsonl").write_text(lines[:-40])
    (folder / "half.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-30])
    (folder / "half.parquet").write_bytes(b"PAR1" + bytes(100))
    (folder / "deep.json").write_text("[" * 20_000 + "]" * 20_000)
    (folder / "deep.yaml").write_text("a: " + "[" * 1_000 + "]" * 1_000)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "list.yaml").write_text("- a")
    (folder / "tab.yaml").write_text("beta:\t- 1\n\tx: 2")
    (folder / "no.yaml").write_text("eval_strategy: no\nrun_name: -quick\nlearning_rate: 1e-6\nuse_cpu: on\n")
    (folder / "empty.jsonl").touch()
    (folder / "zero3.json").write_text("{}")
    return folder


@pytest.fixture
def line(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Run one command line in the folder, and look at what it says."""
    monkeypatch.chdir(home)

    def run(*words: str) -> tuple[int, str]:
        code = main(list(words))
        told = capsys.readouterr().err.strip().splitlines()
        message = told[-1] if told else ""
        assert code in (0, 2, 3), (words, code)
        assert "Traceback" not in message
        if code == 2:
            assert message.startswith("flexdpo: error: "), (words, message)
            assert WAY_OUT.search(message), (words, message)
        return code, message

    return run


@pytest.fixture
def checked(line: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, where whatever a run would do behind its checks is left out."""

    def run_job(job: Any, config: Any, given: Any) -> str:
        require_ready(job, config)
        return "checked"

    monkeypatch.setattr("flexdpo.runs.job.run_job", run_job)
    return line


def options_of_trl() -> dict[str, Any]:
    """Every option of ``trl dpo`` and its field, asked from its dataclasses."""
    trl = pytest.importorskip("trl")
    classes = (trl.ScriptArguments, trl.ModelConfig, trl.DPOConfig)
    return {each.name: each for cls in classes for each in dataclasses.fields(cls) if each.init}


def sensible(field: Any) -> str:
    """Some value that the type of a field allows."""
    kind = str(field.type)
    if "bool" in kind:
        return "true"
    if "int" in kind or "float" in kind:
        return "1"
    return "{}" if "dict" in kind else str(getattr(field.default, "value", field.default) or "x")


def test_every_option_of_trl_works_or_is_refused_with_a_reason(checked: Any) -> None:
    refused = {}
    for name, field in options_of_trl().items():
        code, message = checked(*JOB, f"--{name}={sensible(field)}")
        if code:
            assert "did you mean" not in message
            assert "unknown option" not in message
            refused[name] = message
    assert len(options_of_trl()) > 150
    assert len(refused) < 76, refused
    assert {"lora_dropout", "attn_implementation", "load_in_4bit", "hub_model_id", "eval_delay"} <= refused.keys()


def test_what_trl_had_once_is_refused_with_a_reason(checked: Any) -> None:
    for name in REASONS:
        code, message = checked(*JOB, f"--{name}", "1")
        assert code == 2
        assert f"--{name} is not supported: " in message


def test_every_option_misspelled(checked: Any) -> None:
    for name in options_of_trl().keys() - REASONS.keys():
        code, message = checked(*JOB, f"--{name}q=1")
        assert code == 2
        assert f"unknown option --{name}q; did you mean '--" in message


def of_type(*names: str) -> list[Any]:
    return [action for action in parser()._actions if getattr(action.type, "__name__", "") in names]


def test_every_option_mistyped(checked: Any) -> None:
    numbers, truths = of_type("int", "float"), of_type("string_to_bool")
    assert len(numbers) > 40
    assert len(truths) > 40
    for action in [*numbers, *truths]:
        code, message = checked(*JOB, f"{action.option_strings[0]}=nonsense")
        assert code == 2
        assert f"argument {action.option_strings[0]}" in message


def test_numbers_that_no_run_can_have(checked: Any) -> None:
    for action in of_type("int", "float"):
        for value in ("-7", "nan") if action.type is float else ("-7",):
            if action.dest != "loss_weights" or value == "nan":
                assert checked(*JOB, f"{action.option_strings[0]}={value}")[0] == 2, (action.dest, value)


# words behind JOB, and a part of the message; none where they are accepted
TABLE = [
    ("--config no.yaml", None),
    ("--config no.yaml --config no.yaml --beta 0.2", None),
    ("--config list.yaml", "must hold 'option: value' lines"),
    ("--config deep.yaml", "nested too deeply"),
    ("--config binary.yaml", "is not valid YAML"),
    ("--config tab.yaml", "is not valid YAML"),
    ("--config nowhere.yaml", "no such file"),
    ("--config", "expected one argument"),
    ("stray", "'stray' belongs to no option"),
    ("--dtype float33", "is no dtype"),
    ("--use_peft --lora_dropout 0.1", "other dropout for"),
    ("--use_peft --lora_target_modules all-linear --use_dora --use_rslora --lora_modules_to_save lm_head", None),
    ("--use_peft --lora_task_type SEQ_CLS", "leave it at CAUSAL_LM"),
    ("--lora_r 8", "--lora_r has no effect without --use_peft"),
    ("--use_dora", "--use_dora has no effect without --use_peft"),
    ("--load_in_4bit", "quantised weights cannot be trained"),
    ("--use_peft --load_in_4bit --load_in_8bit", "exclude each other"),
    ("--use_peft --bnb_4bit_quant_type fp4", "has no effect without --load_in_4bit"),
    ("--attn_implementation flash_attention_2", "choose its kernel with --attn_impl"),
    ("--attn_implementation flexdpo", None),
    ("--eval_steps 5", "eval_steps=5.0 has no effect without eval_strategy=steps"),
    ("--eval_delay 5", "eval_delay=5.0 has no effect without eval_strategy=steps or epoch"),
    ("--eval_strategy epoch --eval_steps 5 --test_split_size 0.5", "has no effect without eval_strategy=steps"),
    ("--eval_strategy steps --eval_steps 5 --eval_delay 2 --test_split_size 0.5", None),
    ("--hub_model_id me/model", "has no effect without push_to_hub"),
    ("--save_strategy no --save_total_limit 2", "has no effect without save_strategy=steps or epoch or best"),
    ("--trackio_space_id x", "has no effect without report_to=trackio"),
    ("--dataloader_persistent_workers", "has no effect without dataloader_num_workers"),
    ("--ref_model_sync_steps 3", "has no effect without sync_ref_model"),
    ("--lr_scheduler_kwargs {", "--lr_scheduler_kwargs { is no JSON"),
    ("--model_init_kwargs {foo:1}", "--model_init_kwargs {foo:1} is no JSON"),
    ("--run_name {x} --lr_scheduler_kwargs {", "--lr_scheduler_kwargs { is no JSON"),
    ("--run_name {x} --load_best_model_at_end --eval_strategy steps --save_strategy epoch", "strategy to match"),
    ('--activation_checkpointing --activation_checkpointing_kwargs {"foo":1}', "has foo=1, which nothing takes"),
    ('--activation_checkpointing --activation_checkpointing_kwargs {"every_n_layers":0}', "every_n_layers=0; give"),
    ("--lr_scheduler_kwargs x", "must be a JSON object"),
    ("--model_init_kwargs x", "must be a JSON object"),
    ('--lr_scheduler_kwargs {"x":1} --lr_scheduler_type cosine', "does not suit lr_scheduler_type='cosine'"),
    ("--lr_scheduler_type cosine_with_min_lr", "does not suit"),
    ("--optim adamw_bnb_8bit", "--optim adamw_bnb_8bit"),
    ("--optim nonsense", "invalid choice"),
    ("--adam_beta1 2", "Invalid beta"),
    ("--report_to wandb", "--report_to wandb"),
    ("--report_to nobody", "nobody is not supported"),
    ("--deepspeed zero3.json", "deepspeed"),
    ("--fsdp nonsense", "nonsense"),
    ("--accelerator_config nowhere.json", "nowhere.json"),
    ("--torch_compile_backend nonsense", "torch.compile does not take"),
    ("--torch_compile_mode nonsense", "torch.compile does not take"),
    ("--loss_type sigmod", "did you mean 'sigmoid'"),
    ("--max_steps 0", "max_steps=0 is no number"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps=0"),
    ("--resume_from_checkpoint true", "no complete checkpoint"),
    ("--resume_from_checkpoint nowhere", "is no complete checkpoint"),
    ("--test_split_size 0.1 --eval_dataset_name pairs.jsonl", "holds out what to evaluate on"),
    ("--datasets a.jsonl", "leave --dataset_name"),
    ("--output_dir pairs.jsonl/out", "cannot be written to"),
    ("--debug", "--traceback shows"),
    ("--debug underflow_overflow", None),
    ("--fp16", "fp16=True has no effect on a CPU"),
    ("--warmup_steps 9 --max_steps 1", "keeps the learning rate of all max_steps=1 steps at 0"),
    ("--warmup_steps 9 --max_steps 2", None),
    ('--fsdp_config {"version":2}', "has no effect without fsdp"),
    ("--greater_is_better true", "has no effect without metric_for_best_model"),
    ("--length_column_name x", "has no effect without train_sampling_strategy=group_by_length or batch_rebalance"),
    ("--metric_for_best_model x", "--metric_for_best_model x needs evaluation data"),
    ("--metric_for_best_model loss --test_split_size 0.5", None),
    ('--model_init_kwargs {"dtype":"bfloat16"} --dtype float32', "--model_init_kwargs says 'dtype', and so does"),
    ("--attn_impl flex", "--attn_impl flex has no backward on a CPU"),
    ("--padding_free true", "rows never have padding"),
]


@pytest.mark.parametrize(("words", "part"), TABLE, ids=[words for words, _ in TABLE])
def test_lines_of_train(checked: Any, words: str, part: str | None) -> None:
    code, message = checked(*JOB, *words.split())
    assert (code, part is None) in ((0, True), (2, False)), message
    assert part is None or part in message


OTHERS = [
    ("estimate", "which dataset?"),
    ("estimate pairs.jsonl", "lengths depend on the tokenizer"),
    ("estimate pairs.jsonl --dataset_name other.jsonl --model x", "two names for one thing"),
    ("estimate pairs.jsonl --model_name_or_path ./nowhere", "is not a folder with a saved model"),
    ("estimate pairs.jsonl --model ./nowhere --json nowhere/x.json", "cannot be written"),
    ("estimate pairs.jsonl --tokenizer ./nowhere --memory abc", "invalid float value"),
    ("estimate pairs.jsonl --tokenizer ./nowhere --memory nan", "--memory nan: give the GB"),
    ("estimate pairs.jsonl --tokenizer ./nowhere --memory -1", "--memory -1.0: give the GB"),
    ("score x pairs.jsonl --beta 0.5", "--beta 0.5 is for implicit rewards; add --ref_model"),
    ("score x pairs.jsonl --ref_model x --beta nan", "give a number above 0"),
    ("estimate pairs.jsonl --tokenizer ./nowhere --learning_rate 1", "flexdpo estimate has nothing that"),
    ("estimate pairs.jsonl --tokenizer ./nowhere --shape llama-9b", "./nowhere"),
    (
        "estimate pairs.jsonl --model ./nowhere --model_revision v1",
        "revision 'v1' has no effect: ./nowhere is a folder",
    ),
    ("estimate pairs.jsonl --tokenizer x --model_revision v1", "--model_revision v1 has no effect without a model"),
    ("train --model x --datasets a b --dataset_train_split x", "--dataset_train_split x has no effect with --datasets"),
    ("train --model x --datasets a b --dataset_config x", "--dataset_config x has no effect with --datasets"),
    ("train --model x --datasets a b --dataset_test_split x", "is of one dataset, and --datasets names"),
    ("score MODEL pairs.jsonl --dtype float33", "dtype 'float33' is none of torch's; use float32"),
    ("score --model x pairs.jsonl --output_file half.parquet", "would write over what flexdpo score did not write"),
    ("show pairs.jsonl --tokenizer x --seed 1", "--seed has no effect on a dataset"),
    ("show --tokenizer x", "--tokenizer has no effect on the built-in example"),
    ("show --lengths x.json --first 2", "--first has no effect with --lengths"),
    ("show --lengths x.json --text --view mask", "--view has no effect on --text; name a picture"),
    ("show --lengths x.json --block_size 0", "--block_size must be at least 1, got 0"),
    ("bench --drop_in true --profile hh_rlhf", "--profile has no effect with --drop_in"),
    ("bench --max_tokens_per_row 0", "--max_tokens_per_row must be above 0"),
    ("estimate pairs.jsonl --tokenizer x --sharing steps", "sharing must be one of"),
    ("show pairs.jsonl", "a dataset needs --tokenizer"),
    ("show --lengths nowhere.json", "nowhere.json"),
    ("show --lengths deep.json", "deep.json"),
    ("show pairs.jsonl --lengths deep.json", "not both"),
    ("show --view nothing", "nothing"),
    ("check", "which model?"),
    ("check ./nowhere", "does not exist"),
    ("check ./nowhere --model_name_or_path ./elsewhere", "two names for one thing"),
    ("check deep.json", "cannot load a config"),
    ("check half.parquet", "cannot load a config"),
    ("check x --jsn", "did you mean '--json'"),
    ("env", None),
    ("env --x", "unknown option --x"),
    ("completion", "the following arguments are required"),
    ("completion fish", "invalid choice"),
    ("bench --profile nothing", "nothing"),
    ("bench --json nowhere/x.json", "cannot be written"),
    ("results nowhere", "nowhere"),
    ("trian", "did you mean 'train'"),
    ("--version", None),
    ("", None),
]


@pytest.mark.parametrize(("words", "part"), OTHERS, ids=[words for words, _ in OTHERS])
def test_lines_of_the_other_commands(line: Any, saved_model: Any, words: str, part: str | None) -> None:
    code, message = line(*(str(saved_model("llama")) if word == "MODEL" else word for word in words.split()))
    assert (code, part is None) in ((0, True), (2, False)), message
    assert part is None or part in message


def test_damaged_inputs_and_places_that_cannot_be_written(line: Any, home: Path, saved_model: Any) -> None:
    model = saved_model("llama")

    def refused(*words: str, folder: Path = model) -> str:
        job = ["train", "--model_name_or_path", str(folder), "--use_cpu", "--report_to", "none", "--max_steps", "1"]
        code, message = line(*job, "--output_dir", "out", "--overwrite_output_dir", *words)
        assert code == 2, message
        return message

    for name in ("half.jsonl", "half.jsonl.gz", "half.parquet", "deep.json", "empty.jsonl"):
        assert name in refused("--dataset_name", name)
    damaged = home / "damaged"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        for content in (b"", b"{", b"[]", b"\xff\x00" * 50, b"[" * 20_000):
            shutil.copytree(model, damaged, dirs_exist_ok=True)
            (damaged / name).write_bytes(content)
            assert "damaged" in refused("--dataset_name", "pairs.jsonl", folder=damaged), (name, content[:4])
    assert "/dev/full" in refused("--dataset_name", "pairs.jsonl", "--output_dir", "/dev/full")


@pytest.mark.parametrize("size", [0, 2_000, 20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_anywhere(line: Any, saved_model: Any, size: int) -> None:
    job = ["train", "--model_name_or_path", str(saved_model("llama")), "--dataset_name", "pairs.jsonl", "--use_cpu"]
    job += ["--output_dir", f"full-{size}", "--max_steps", "2", "--report_to", "none", "--prove", "false"]
    job += ["--disable_tqdm", "true"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        code, message = line(*job, "--max_length", str(512 + size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "make room" in message


def test_several_processes_are_started_as_trl_does(line: Any, home: Path, monkeypatch: Any) -> None:
    started = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", started.append)
    (home / "two.yaml").write_text("num_processes: 2")
    assert line(*JOB, "--accelerate_config", "two.yaml", "--num_processes", "3", "--beta", "0.2") == (0, "")
    assert line(*JOB, "--accelerate_config=fsdp2") == (0, "")
    assert started[0].config_file == "two.yaml"
    assert started[0].num_processes == 3
    assert (started[0].training_script, *started[0].training_script_args) == ("flexdpo", *JOB, "--beta", "0.2")
    assert Path(started[1].config_file).name == "fsdp2.yaml"
    assert "none of TRL's configs" in line(*JOB, "--accelerate_config", "nowhere")[1]


def test_completion_completes(tmp_path: Path, capsys: Any) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "flexdpo.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        ask = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _flexdpo; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", ask], check=True, text=True, capture_output=True).stdout.split()

    assert completed("flexdpo", "") == list(COMMANDS)
    assert completed("flexdpo", "tr") == ["train"]
    assert completed("flexdpo", "train", "--lora_r") == ["--lora_r"]
    assert completed("flexdpo", "train", "--lr_scheduler_type", "cosine_with_r") == ["cosine_with_restarts"]
    assert completed("flexdpo", "train", "--use_cpu", "") == ["true", "false"]
    assert completed("flexdpo", "check", "--js") == ["--json"]
    assert completed("flexdpo", "train", "--config", str(script)[:-3]) == [str(script)]
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit")


@pytest.mark.parametrize("columns", [80, 200])
def test_help_is_as_wide_as_the_terminal_and_shows_defaults(capsys: Any, monkeypatch: Any, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        told = capsys.readouterr().out
        # words that cannot be broken may be longer
        assert all(len(each) <= columns or " " not in each.strip() for each in told.splitlines())
        assert "(default: None)" not in told
    assert main(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.1)" in told
    assert "(default: 1e-06)" in told
