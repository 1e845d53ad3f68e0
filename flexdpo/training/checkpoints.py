"""What a checkpoint was made of, so that a run is continued with the same data and settings or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import SchedulerType
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from flexdpo.data.draft import IMAGES_COLUMN
from flexdpo.data.images import told_of_images
from flexdpo.effects import WITHOUT_EFFECT, learning_rates
from flexdpo.errors import FlexdpoError, first_line
from flexdpo.hf.unwrap import base_model
from flexdpo.training.distribution import local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from torch import Tensor, nn

    from flexdpo.config import DPOConfig

RECORD_FILE = "flexdpo_run.json"
_WHOLE_REFERENCE = "reference.safetensors"
# enable_jit_checkpoint takes its mark away when the checkpoint is complete
_NOT_KEPT = (RECORD_FILE, f"{RECORD_FILE}.tmp", "checkpoint-is-incomplete.txt")
# settings with no say in what is learned, or what their names begin with. All others must be those of the checkpoint,
# the ones that transformers will add included
_FREE_SETTINGS = (
    # where and when a run writes and looks
    "output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug", "logging_", "log_", "save_", "eval_",
    "hub_", "push_to_hub", "include_", "trackio_", "load_best_model_at_end", "metric_for_best_model", "prove",
    "greater_is_better", "resume_from_checkpoint", "restore_callback_states", "enable_jit_checkpoint", "do_",
    "prediction_loss_only", "per_device_eval_batch_size",
    # how it is laid out on a machine
    "max_tokens_per_row", "pad_to_multiple_of", "sharing", "balance_processes", "attn_", "torch_", "use_cpu",
    "use_cache", "gradient_checkpointing", "activation_checkpointing", "keep_attention", "precompute_ref_",
    "dataset_num_proc", "skip_memory_metrics", "dataloader_", "ddp_", "fsdp", "deepspeed", "accelerator_config",
    "parallelism_config", "trust_remote_code", "local_rank", "remove_unused_columns", "length_column_name",
    # a longer run; ``require_same_schedule`` looks at what they decide
    "max_steps", "num_train_epochs",
)  # fmt: skip
# files up to this size are vouched for by their digest, larger ones by their size
_DIGESTED_BYTES = 2**24


def run_record(config: DPOConfig, data_digest: str, model: dict[str, str] | None = None) -> dict[str, Any]:
    """The data and the settings of a run, as plain JSON values."""
    settings = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name == "dataloader_drop_last"
        or (field.init and field.name not in WITHOUT_EFFECT and not field.name.startswith(("_", *_FREE_SETTINGS)))
    }
    if isinstance(settings["model_init_kwargs"], dict):
        # whose access it was is nobody else's
        settings["model_init_kwargs"] = {k: v for k, v in settings["model_init_kwargs"].items() if k != "token"}
    settings["world_size"] = config.world_size
    return {
        "data": data_digest,
        "settings": json.loads(json.dumps(settings, default=str)),
        "model": model or {},
        "save_only_model": config.save_only_model,
    }


def file_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Name, size and (of small ones) digest of every file that lies in a checkpoint, the record itself excepted."""
    return {
        path.relative_to(folder).as_posix(): _vouched(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_KEPT
    }


def _vouched(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _DIGESTED_BYTES:
        return {"bytes": size}
    return {"bytes": size, "blake2b": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}


def save_reference(folder: Path, reference: nn.Module, process_index: int) -> None:
    """Store a reference that moves: the whole of it by the first process, or each process's shard."""
    name, weights = _held_of(reference, process_index)
    if process_index == 0 or name != _WHOLE_REFERENCE:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / name)


def load_reference(folder: Path, reference: nn.Module, process_index: int) -> None:
    """Bring a reference to where it had moved when it was stored, in place; refuse that of another model, or none."""
    file, weights = _held_of(reference, process_index)
    path = folder / file
    if not path.is_file():
        raise FlexdpoError(
            f"{folder} does not hold the reference that sync_ref_model had moved ({file} is missing); start the run "
            "again, or continue from another checkpoint"
        )
    stored = load_file(path)
    if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in weights.items()}:
        raise FlexdpoError(f"{path} holds the reference of another model; continue with the model of this checkpoint")
    for name, value in weights.items():
        value.copy_(stored[name])


def _held_of(reference: nn.Module, process_index: int) -> tuple[str, dict[str, Tensor]]:
    """The file that what this process holds of a reference is kept in, and its weights; tied ones once."""
    weights = {name: parameter.detach() for name, parameter in base_model(reference).named_parameters()}
    spread = any(isinstance(weight, DTensor) for weight in weights.values())
    file = f"reference-{process_index}.safetensors" if spread else _WHOLE_REFERENCE
    return file, {name: local(weight) for name, weight in weights.items()}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Store a record in a checkpoint folder, last of all files: a folder without one was not written to its end."""
    with (folder / f"{RECORD_FILE}.tmp").open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(folder / RECORD_FILE)


@contextmanager
def plain_write_errors(what: str, output_dir: Path) -> Iterator[None]:
    """Say plainly when something of a run cannot be written, and which checkpoint there is to go on from."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a failed write as a RuntimeError like many others
        writers = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream error")
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in writers):
            raise
        try:
            left = f"{last_checkpoint(output_dir)} is complete: make room and go on with resume_from_checkpoint=True"
        except FlexdpoError:
            left = "there is no complete checkpoint yet: make room and start the run again"
        raise FlexdpoError(f"{what} cannot be written ({first_line(error)}); {left}") from error


def last_checkpoint(output_dir: Path, *, but: Path | None = None) -> Path:
    """Return the newest complete checkpoint of a run; what a crash left half-written is passed over, and ``but`` is."""
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.rsplit("-", 1)[1]
        if folder != but and number.isdigit() and (folder / RECORD_FILE).is_file():
            steps[int(number)] = folder
    if not steps:
        raise FlexdpoError(f"no complete checkpoint in {output_dir}; start the run without resume_from_checkpoint")
    return steps[max(steps)]


def require_same_run(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Refuse a checkpoint that was made from other data, with other settings or for another model, or is damaged.

    Returns its record. The error names the setting and both values, what differs, or the file that was changed.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise FlexdpoError(f"{folder} is no checkpoint of flexdpo: it has no {RECORD_FILE}")
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings, data, model = stored["settings"], stored["data"], stored["model"]
        files = {str(name): (dict(before), before["bytes"]) for name, before in stored["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FlexdpoError(f"{path} is damaged ({type(error).__name__}); {_another(folder)}") from error
    for name, (before, size) in files.items():
        file = folder / name
        if not file.is_file():
            raise FlexdpoError(f"{folder} lacks {name}, which was saved with it; {_another(folder)}")
        if _vouched(file) != before:
            raise FlexdpoError(
                f"{file} is not as it was saved ({file.stat().st_size} bytes, saved {size}); {_another(folder)}"
            )
    if stored.get("save_only_model"):
        raise FlexdpoError(
            f"{folder} was saved with save_only_model=True, without the optimizer's state, so the run cannot go on "
            "from it; start a new run with this folder as the model, or continue from another checkpoint"
        )
    # a setting that only one of two versions of transformers has is left out
    for name in sorted(record["settings"].keys() & settings.keys()):
        value, before = record["settings"][name], settings[name]
        if value != before:
            raise FlexdpoError(
                f"{folder} was made with {name}={before!r} and this run has {value!r}; continue with the "
                "same setting, or start a new run in another output_dir"
            )
    if data != record["data"]:
        raise FlexdpoError(
            f"{folder} was made from other training data (or the same data tokenised otherwise); continue with the "
            "same data, or start a new run in another output_dir"
        )
    for name, value in record["model"].items():
        if model.get(name, value) != value:
            raise FlexdpoError(
                f"{folder} belongs to a run with other {name}; give model, adapter and reference as it began with "
                "them, or start a new run in another output_dir"
            )
    return stored


def _another(folder: Path) -> str:
    """What to do instead of continuing from a damaged checkpoint."""
    try:
        return f"continue from {last_checkpoint(folder.parent, but=folder)}"
    except FlexdpoError:
        return "there is no other checkpoint beside it, so start the run again"


def require_same_schedule(folder: Path, config: DPOConfig) -> int:
    """Refuse to make a run longer or shorter where the steps behind it, whose number it returns, had other rates."""
    state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    before, done = int(state["max_steps"]), int(state["global_step"])
    now = config.max_steps
    if now <= 0:
        now = round(before * config.num_train_epochs / state["num_train_epochs"])

    def rates(total: int) -> list[float]:
        warmup = config.get_warmup_steps(total)
        return learning_rates(config.lr_scheduler_type, warmup, config.lr_scheduler_kwargs, total=total, steps=done)

    if rates(now) != rates(before):
        raise FlexdpoError(
            f"{folder} belongs to a run of {before} steps and this one would have {now}, so the schedule "
            f"{SchedulerType(config.lr_scheduler_type).value!r} would have given the first {done} steps other learning "
            "rates; continue with the same max_steps and num_train_epochs, or start a new run in another output_dir"
        )
    return done


def data_digest(dataset: Dataset, columns: tuple[str, ...]) -> str:
    """A digest of the tokens and images of a dataset, independent of files, caches and Arrow chunks."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=4096):
        for name in columns:
            values = table.column(name).combine_chunks()
            while hasattr(values, "flatten") and hasattr(values, "value_lengths"):
                digest.update(values.value_lengths().to_numpy(zero_copy_only=False).astype("int64").tobytes())
                values = values.flatten()
            digest.update(values.to_numpy(zero_copy_only=False).astype("int64").tobytes())
        if IMAGES_COLUMN in table.column_names:
            digest.update(repr([[image["digest"] for image in row] for row in told_of_images(table)]).encode())
    return digest.hexdigest()
