"""``flexdpo train``: the built-in example, or a job on the user's model and data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexdpo.commands.options import OptionParser
from flexdpo.data.columns import parse_columns
from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from flexdpo.config import DPOConfig
    from flexdpo.runs.job import Job


@dataclass
class ModelArguments:
    """Which model to train, and whether through an adapter. Names as in TRL."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A causal LM: a folder saved with save_pretrained, or a hub name."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default=None, metadata={"help": "Load weights in this dtype: float32, bfloat16, float16 or auto."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; by default those peft knows for the model."}
    )


@dataclass
class DataArguments:
    """Which preferences to learn. Names as in TRL."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Preferences: a .jsonl, .json, .parquet or .csv file, a folder of them, a folder saved with "
            "save_to_disk, or a hub name."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split of the same dataset to evaluate on, before and after."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Another file, folder or hub name to evaluate on, before and after."}
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read the datasets as they are needed instead of loading them; set max_steps."},
    )
    columns: str | None = field(
        default=None,
        metadata={"help": "Which column is which, where names are not known: prompt=question,chosen=response_j."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into output_dir though it is not empty."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Tokenise, pack, predict tokens, memory and gain, and stop before any weight is loaded."},
    )


_MOST_USED = (
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "bf16", "use_cpu",
    "eval_strategy", "eval_steps", "logging_steps", "save_strategy", "save_steps", "resume_from_checkpoint", "seed",
)  # fmt: skip
# what the built-in example takes; anything else is meant for a job
_EXAMPLE_OPTIONS = frozenset({"--output_dir", "--seed", "--overwrite_output_dir"})


def parser() -> OptionParser:
    """The options: every field of the model, the data and ``DPOConfig``, in readable groups."""
    from transformers import HfArgumentParser, TrainingArguments

    from flexdpo.config import DPOConfig

    class TrainParser(OptionParser, HfArgumentParser):  # the one parser that knows transformers' field types
        pass

    options = TrainParser(
        (ModelArguments, DataArguments, DPOConfig),
        prog="flexdpo train",
        usage="flexdpo train [--model_name_or_path NAME --dataset_name DATA] [--config FILE.yaml] [options]",
        description="Train a causal LM on preferences. Without a model and a dataset, run the built-in example: which "
        "body belongs to this function of the standard library?",
        epilog="--config FILE.yaml reads any of these options from a file, as 'option: value' lines; the command line "
        "wins. --debug shows the traceback behind an error.",
    )
    inherited = _names(TrainingArguments)
    _show_group(options, "model", _names(ModelArguments))
    _show_group(options, "data", _names(DataArguments))
    _show_group(options, "preferences", _names(DPOConfig) - inherited)
    _show_group(options, "the run, most used (transformers.TrainingArguments)", set(_MOST_USED))
    _show_group(options, "the run, all else (transformers.TrainingArguments)", inherited - set(_MOST_USED))
    return options


def _names(cls: type) -> set[str]:
    return {each.name for each in dataclasses.fields(cls) if each.init}


def _show_group(options: OptionParser, title: str, names: set[str]) -> None:
    """Show the options ``names`` under their own heading in the help."""
    group = options.add_argument_group(title)
    for action in options._actions:
        if {f"--{name}" for name in names} & set(action.option_strings):
            for other in options._action_groups:
                if action in other._group_actions:
                    other._group_actions.remove(action)
            group._group_actions.append(action)


def run(argv: list[str]) -> int:
    """Run ``flexdpo train`` with the words after it; prints the final table."""
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    options: Any = parser()
    model, data, config, unknown = options.parse_args_into_dataclasses(
        options.with_config(argv), return_remaining_strings=True
    )
    options.refuse_unknown(unknown)
    if given <= _EXAMPLE_OPTIONS:
        from flexdpo.runs.example import run_example

        output = Path(config.output_dir) if "--output_dir" in given else None
        print(run_example(output, seed=config.seed, overwrite=data.overwrite_output_dir).table())
        return 0
    job = _job(model, data)
    if data.dry_run:
        from flexdpo.runs.dry_run import dry_run

        print(dry_run(job, config).table())
        return 0
    from flexdpo.runs.job import run_job

    table = run_job(job, _named_output(config, model))
    if config.process_index == 0:
        print(table)
    return 0


def _job(model: ModelArguments, data: DataArguments) -> Job:
    from flexdpo.runs.job import Job

    return Job(
        model_name_or_path=_required("--model_name_or_path", model.model_name_or_path),
        dataset_name=_required("--dataset_name", data.dataset_name),
        dataset_config=data.dataset_config,
        train_split=data.dataset_train_split,
        test_split=data.dataset_test_split,
        eval_dataset_name=data.eval_dataset_name,
        streaming=data.dataset_streaming,
        columns=parse_columns(data.columns),
        overwrite_output_dir=data.overwrite_output_dir,
        load_kwargs=_load_kwargs(model),
        peft_config=_lora(model) if model.use_peft else None,
    )


def _required(option: str, value: str | None) -> str:
    if value is None:
        raise FlexdpoError(
            f"{option} is missing: give a file, folder or hub name; 'flexdpo train' alone runs the built-in example"
        )
    return value


def _load_kwargs(model: ModelArguments) -> dict[str, Any]:
    given = {"revision": model.model_revision if model.model_revision != "main" else None, "dtype": model.dtype}
    return {name: value for name, value in given.items() if value is not None}


def _lora(model: ModelArguments) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise FlexdpoError("--use_peft needs the peft package; pip install 'flexdpo[peft]'") from error
    return LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        # a shared prompt cannot have different dropout for each response
        lora_dropout=0.0,
        target_modules=model.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def _named_output(config: DPOConfig, model: ModelArguments) -> DPOConfig:
    # transformers' own default says nothing about the run
    if config.output_dir == "trainer_output" and model.model_name_or_path:
        config.output_dir = f"{Path(model.model_name_or_path).name}-dpo"
    return config
