"""What would stop a run later, looked at before its first step and before any weight is loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from flexdpo.config import DPOConfig
from flexdpo.errors import FlexdpoError, first_line
from flexdpo.runs.settings import Job
from flexdpo.training.checkpoints import RECORD_FILE, last_checkpoint
from flexdpo.training.memory import gigabytes


def require_ready(job: Job, config: DPOConfig) -> None:
    """Refuse a run that would end in an error after its first step, or be unable to write what it learned.

    Raises:
        FlexdpoError: naming the setting and the way out.
    """
    job.load_kwargs(config)
    _require_evaluation(job, config)
    _require_packages(config)
    checkpoint: Any = config.resume_from_checkpoint
    if checkpoint is True:
        last_checkpoint(Path(str(config.output_dir)))
    elif checkpoint and not (Path(checkpoint) / RECORD_FILE).is_file():
        raise FlexdpoError(
            f"--resume_from_checkpoint {checkpoint} is no complete checkpoint of flexdpo; give a folder checkpoint-N, "
            "or true for the last one"
        )
    folder = existing_parent(config)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise FlexdpoError(f"--output_dir {config.output_dir}: {folder} cannot be written to; name another folder")


def _require_evaluation(job: Job, config: DPOConfig) -> None:
    wanted = {
        "eval_strategy": config.eval_strategy != "no",
        "eval_on_start": config.eval_on_start,
        "metric_for_best_model": config.metric_for_best_model is not None and not config.load_best_model_at_end,
        "load_best_model_at_end": config.load_best_model_at_end,
        "save_strategy": config.save_strategy == "best",
        # by name, since not all versions know both
        "lr_scheduler_type": config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
    }
    for name, needs in wanted.items():
        if needs and not job.evaluates:
            value = getattr(config, name)
            raise FlexdpoError(
                f"--{name} {getattr(value, 'value', value)} needs evaluation data; add --eval_dataset_name, "
                "--dataset_test_split or --test_split_size, or leave it out"
            )
        if needs and name not in ("eval_on_start", "metric_for_best_model") and config.eval_strategy == "no":
            raise FlexdpoError(
                f"--{name} follows evaluations during training, and --eval_strategy no makes none; add --eval_strategy "
                "steps or epoch"
            )


def _require_packages(config: DPOConfig) -> None:
    try:
        for tracker in get_reporting_integration_callbacks(config.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise FlexdpoError(
            f"--report_to {' '.join(config.report_to)}: {first_line(error)} Install it, or give --report_to none"
        ) from error
    _require_compiler(config)
    if config.attn_impl == "flex" and config.device.type == "cpu":
        raise FlexdpoError("--attn_impl flex has no backward on a CPU; give --attn_impl sdpa, or leave it out")
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(config)
        kind([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        # some look at the model first, which is not here yet
        if isinstance(error, ValueError) and "model" in str(error):
            return
        name = getattr(config.optim, "value", config.optim)
        raise FlexdpoError(
            f"--optim {name}: {first_line(error)}. Give what it takes, install it, or leave --optim out"
        ) from error


def _require_compiler(config: DPOConfig) -> None:
    if config.layer_compile_options:
        try:
            torch.compile(torch.nn.Identity(), **config.layer_compile_options)
        except Exception as error:  # each backend has errors of its own
            raise FlexdpoError(
                f"torch.compile does not take {config.layer_compile_options} ({first_line(error)}); leave "
                "torch_compile_backend and torch_compile_mode out"
            ) from error


def require_room_on_disk(model: nn.Module, config: DPOConfig, *, adapter: bool) -> None:
    """Refuse an output folder whose disk has no room for the finished model, or for one checkpoint beside it."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    saved = [weight for weight in model.parameters() if weight.requires_grad or not adapter]
    weights = sum(weight.numel() * weight.element_size() for weight in saved)
    needed = weights
    if config.save_strategy != "no":
        # Adam's two moments, in float32
        needed += weights + (0 if config.save_only_model else 8 * trained)
    free = shutil.disk_usage(existing_parent(config)).free
    if needed > free:
        raise FlexdpoError(
            f"--output_dir {config.output_dir}: the disk has {gigabytes(free)} left, and the model with one checkpoint "
            f"takes {gigabytes(needed)}; make room, name another folder, or give --save_strategy no"
        )


def existing_parent(config: DPOConfig) -> Path:
    """The output folder, or the nearest folder above it that exists."""
    output = Path(str(config.output_dir)).absolute()
    return next(each for each in (output, *output.parents) if os.path.lexists(each))
