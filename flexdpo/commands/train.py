"""``flexdpo train``: the built-in example, or a job on the user's model and data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flexdpo.commands.options import OptionParser
from flexdpo.runs.settings import Job, ModelSettings

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
        (Job, DPOConfig),
        prog="flexdpo train",
        usage="flexdpo train [--model_name_or_path NAME --dataset_name DATA] [--config FILE.yaml] [options]",
        description="Train a causal LM on preferences. Without a model and a dataset, run the built-in example: which "
        "body belongs to this function of the standard library?",
        epilog="--config FILE.yaml reads any of these options from a file, as 'option: value' lines; the command line "
        "wins. --debug shows the traceback behind an error.",
    )
    inherited = _names(TrainingArguments)
    _show_group(options, "model", _names(ModelSettings))
    _show_group(options, "data", _names(Job) - _names(ModelSettings))
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
    job, config, unknown = options.parse_args_into_dataclasses(options.with_config(argv), return_remaining_strings=True)
    options.refuse_unknown(unknown)
    if given <= _EXAMPLE_OPTIONS:
        from flexdpo.runs.example import run_example

        output = Path(config.output_dir) if "--output_dir" in given else None
        print(run_example(output, seed=config.seed, overwrite=job.overwrite_output_dir).table())
        return 0
    job.require_names()
    if job.dry_run:
        from flexdpo.runs.dry_run import dry_run

        print(dry_run(job, config).table())
        return 0
    from flexdpo.runs.job import run_job

    if config.output_dir == "trainer_output":
        # transformers' own default says nothing about the run
        config.output_dir = f"{Path(job.model_name_or_path).name}-dpo"
    table = run_job(job, config)
    if config.process_index == 0:
        print(table)
    return 0
