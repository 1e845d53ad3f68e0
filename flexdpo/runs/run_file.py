"""``flexdpo_run.yaml``: the settings of a run, so that ``flexdpo train --config`` repeats it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from flexdpo.training.trainer import DPOTrainer

RUN_FILE = "flexdpo_run.yaml"
# where a run goes and whether it is one is not what it learns; a token is nobody else's
_NOT_REPEATED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "hub_token")


def write_run_file(folder: Path, given: Mapping[str, Any], trainer: DPOTrainer) -> None:
    """Write what was given, and in numbers what ``auto`` came to on this machine.

    Args:
        folder: The run's.
        given: Options that differ from their defaults, as the command line has them.
        trainer: Of the run, before it is trained.
    """
    kept = {name: _plain(name, value) for name, value in given.items() if name not in _NOT_REPEATED}
    if kept.get("max_tokens_per_row") == "auto":
        kept["max_tokens_per_row"] = trainer.row_plan.max_tokens_per_row
    packages = ", ".join(f"{name} {version(name)}" for name in ("flexdpo", "torch", "transformers"))
    text = (
        f"# flexdpo train --config {folder / RUN_FILE} repeats this run, bit for bit with the same data, versions,\n"
        f"# devices and number of threads: {packages}, Python {platform.python_version()},\n"
        f"# {trainer.args.world_size} processes on {trainer.args.device.type}, {torch.get_num_threads()} threads\n"
    )
    (folder / RUN_FILE).write_text(text + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _plain(name: str, value: Any) -> Any:
    if name == "model_init_kwargs" and isinstance(value, str) and value.startswith("{"):
        return json.dumps({key: each for key, each in json.loads(value).items() if key != "token"})
    if isinstance(value, list | tuple):
        return [_plain("", each) for each in value]
    return getattr(value, "value", value)
