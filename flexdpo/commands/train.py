"""``flexdpo train``: the built-in example, or a job on the user's model and data."""

import argparse
import copy
import dataclasses
import itertools
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from flexdpo.commands.launch import OPTION, launch_train
from flexdpo.commands.options import OptionParser
from flexdpo.config import DPOConfig
from flexdpo.errors import FlexdpoError
from flexdpo.runs.settings import Job, ModelSettings

_MOST_USED = (
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "bf16", "use_cpu",
    "eval_strategy", "eval_steps", "logging_steps", "save_strategy", "save_steps", "resume_from_checkpoint", "seed",
)  # fmt: skip
# what the built-in example takes; anything else is meant for a job
_EXAMPLE_OPTIONS = frozenset({"--output_dir", "--seed", "--overwrite_output_dir"})


@cache
def parser() -> OptionParser:
    """The options: every field of the model, the data and ``DPOConfig``, in readable groups."""

    class TrainParser(OptionParser, HfArgumentParser):  # the one parser that knows transformers' field types
        pass

    options = TrainParser(
        (Job, DPOConfig),
        prog="flexdpo train",
        usage="flexdpo train [--model_name_or_path NAME --dataset_name DATA] [--config FILE.yaml] [options]",
        description="Train a causal LM on preferences. Without a model and a dataset, run the built-in example: which "
        "body belongs to this function of the standard library?",
        epilog="--config FILE.yaml reads any of these options from a file, as 'option: value' lines; the command line "
        "wins. --accelerate_config FILE starts several processes as accelerate launch does. A run leaves "
        "flexdpo_run.yaml behind, which repeats it. --traceback shows the traceback behind an error.",
    )
    for action in options._actions:
        if action.const is False:  # --no_x, which is --x false
            action.help = argparse.SUPPRESS
    model, job, config, inherited = (
        {each.name for each in dataclasses.fields(cls) if each.init}
        for cls in (ModelSettings, Job, DPOConfig, TrainingArguments)
    )
    headings = {
        "model": model,
        "data": job - model,
        "preferences": config - inherited,
        "the run, most used (transformers.TrainingArguments)": set(_MOST_USED),
        "the run, all else (transformers.TrainingArguments)": inherited - set(_MOST_USED),
    }
    for title, names in headings.items():
        group = options.add_argument_group(title)
        for action in options._actions:
            if {f"--{name}" for name in names} & set(action.option_strings):
                options._optionals._group_actions.remove(action)
                group._group_actions.append(action)
    return options


def read(argv: list[str]) -> tuple[Job, DPOConfig, dict[str, Any]]:
    """The settings that the words ask for, and those of them that differ from the defaults, as they were given."""
    options: Any = parser()
    found = options.read(argv)
    given = {name: value for name, value in vars(found).items() if value != options.get_default(name)}
    try:
        # what a setting is made into must not change the parser's own defaults
        job, config = options.parse_dict(copy.deepcopy(vars(found)))
    except FlexdpoError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, OSError, NotImplementedError) as error:
        # transformers' and accelerate's own checks, each with an error of its own
        # json itself knows the text and the column; a text of no option is a file's
        text = error.doc if isinstance(error, json.JSONDecodeError) else None
        for name in [name for name, value in vars(found).items() if text is not None and value == text]:
            raise FlexdpoError(f"--{name} {text} is no JSON ({error}); write it as '{{\"name\": 1}}'") from error
        raise FlexdpoError(f"{' '.join(str(error).split())}; see flexdpo train --help") from error
    checkpoint = config.resume_from_checkpoint
    config.resume_from_checkpoint = {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)
    return job, config, given


def run(argv: list[str]) -> int:
    """Run ``flexdpo train`` with the words after it; prints the final table."""
    if any(word.split("=")[0] == OPTION for word in argv):
        return launch_train(argv, parser().parse_known_args(argv)[1])
    named = {word.split("=")[0] for word in argv if word.startswith("--")}
    job, config, given = read(argv)
    if named <= _EXAMPLE_OPTIONS:
        from flexdpo.runs.example import run_example

        output = Path(str(config.output_dir)) if "--output_dir" in named else None
        print(run_example(output, seed=config.seed, overwrite=job.overwrite_output_dir).table())
        return 0
    job.require_names()
    job.require_effects()
    if config.output_dir == "trainer_output":
        # transformers' own default says nothing about the run
        config.output_dir = default_output_dir(job, config)
    if job.dry_run:
        from flexdpo.runs.dry_run import dry_run

        print(dry_run(job, config).table)
        return 0
    from flexdpo.runs.job import run_job

    table = run_job(job, config, given)
    if config.process_index == 0:
        print(table)
    return 0


def default_output_dir(job: Job, config: DPOConfig) -> str:
    """``MODEL-dpo``, or the first of ``MODEL-dpo-2``, ... that holds nothing where a new run is alone."""
    name = f"{Path(str(job.model_name_or_path)).name}-dpo"
    if config.resume_from_checkpoint or job.overwrite_output_dir or config.world_size > 1:
        return name
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(each for each in names if not os.path.lexists(each) or (os.path.isdir(each) and not os.listdir(each)))
