"""What a checkpoint was made of, so that a run is continued with the same data and settings or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from flexdpo.errors import FlexdpoError, first_line
from flexdpo.objective.head import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from torch import Tensor, nn

    from flexdpo.training.config import DPOConfig

RECORD_FILE = "flexdpo_run.json"
# settings that decide which pairs a step sees and what it learns from them; a longer run may change the others
RECORDED_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "stream_shuffle_buffer",
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "discopop_tau",
    "rpo_alpha",
    "simpo_gamma",
    "cpo_alpha",
    "desirable_weight",
    "undesirable_weight",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "max_length",
    "learning_rate",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "world_size",
)


def run_record(config: DPOConfig, data_digest: str) -> dict[str, Any]:
    """The data and the settings of a run, as plain JSON values."""
    settings = {name: getattr(config, name) for name in RECORDED_SETTINGS}
    return {"data": data_digest, "settings": json.loads(json.dumps(settings, default=str))}


def tokens_of(folder: Path) -> dict[str, int]:
    """How many tokens all processes had run when a checkpoint of this run was made, as :func:`write_record` stored."""
    stored = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")).get("tokens", {})
    return {name: int(count) for name, count in stored.items()}


def steps_of(folder: Path) -> int:
    """Optimizer steps that a run had taken when a checkpoint was made."""
    return int(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])


def save_reference(folder: Path, reference: nn.Module, process_index: int) -> None:
    """Store a reference that moves: the whole of it by the first process, or each process's shard."""
    weights = _own_weights(reference)
    if process_index == 0 or _is_spread(reference):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, _reference_file(folder, reference, process_index))


def load_reference(folder: Path, reference: nn.Module, process_index: int) -> None:
    """Bring a reference to where it had moved when :func:`save_reference` stored it, in place.

    Raises:
        FlexdpoError: if the checkpoint holds none, or that of another model.
    """
    path = _reference_file(folder, reference, process_index)
    if not path.is_file():
        raise FlexdpoError(
            f"{folder} does not hold the reference that sync_ref_model had moved ({path.name} is missing); start the "
            "run again, or continue from another checkpoint"
        )
    stored, weights = load_file(path), _own_weights(reference)
    if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in weights.items()}:
        raise FlexdpoError(f"{path} holds the reference of another model; continue with the model of this checkpoint")
    for name, value in weights.items():
        value.copy_(stored[name])


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of each weight; tied ones once."""
    return {
        name: weight.to_local() if isinstance(weight, DTensor) else weight.detach()
        for name, weight in ((name, parameter.detach()) for name, parameter in base_model(model).named_parameters())
    }


def _is_spread(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _reference_file(folder: Path, reference: nn.Module, process_index: int) -> Path:
    return folder / (f"reference-{process_index}.safetensors" if _is_spread(reference) else "reference.safetensors")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Store a record in a checkpoint folder, last of all files: a folder without one was not written to its end."""
    unfinished = folder / f"{RECORD_FILE}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / RECORD_FILE)


@contextmanager
def writing_checkpoint(folder: Path, *, is_writer: bool) -> Iterator[None]:
    """Hold a checkpoint folder for incomplete until its record is written, and say plainly when it cannot be written.

    Args:
        folder: Is about to be written; a complete checkpoint of an earlier run may stand there.
        is_writer: Whether this process is the one that writes the record.

    Raises:
        FlexdpoError: where the disk is full or refuses to be written to; the message names the checkpoint that is left.
    """
    if is_writer:
        (folder / RECORD_FILE).unlink(missing_ok=True)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a failed write as a RuntimeError like many others
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in _TORCH_WRITERS):
            raise
        try:
            left = f"{last_checkpoint(folder.parent)} is complete: make room and go on with resume_from_checkpoint=True"
        except FlexdpoError:
            left = "there is no complete one yet: make room and start the run again"
        raise FlexdpoError(f"the checkpoint {folder} cannot be written ({first_line(error)}); {left}") from error


_TORCH_WRITERS = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream error")


def last_checkpoint(output_dir: Path) -> Path:
    """Return the newest complete checkpoint of a run; what a crash left half-written is passed over.

    Raises:
        FlexdpoError: if there is none.
    """
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.rsplit("-", 1)[1]
        if number.isdigit() and (folder / RECORD_FILE).is_file():
            steps[int(number)] = folder
    if not steps:
        raise FlexdpoError(f"no complete checkpoint in {output_dir}; start the run without resume_from_checkpoint")
    return steps[max(steps)]


def require_same_run(folder: Path, record: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made from other data or with other settings.

    Raises:
        FlexdpoError: naming the setting and both values, or saying that the data differ.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise FlexdpoError(f"{folder} is no checkpoint of flexdpo: it has no {RECORD_FILE}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings, data = stored["settings"], stored["data"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FlexdpoError(f"{path} is damaged ({type(error).__name__}); continue from an older checkpoint") from error
    for name, value in record["settings"].items():
        if settings.get(name) != value:
            raise FlexdpoError(
                f"{folder} was made with {name}={settings.get(name)!r} and this run has {value!r}; continue with the "
                "same setting, or start a new run in another output_dir"
            )
    if data != record["data"]:
        raise FlexdpoError(
            f"{folder} was made from other training data (or the same data tokenised otherwise); continue with the "
            "same data, or start a new run in another output_dir"
        )


def data_digest(dataset: Dataset, columns: tuple[str, ...]) -> str:
    """A digest of the tokens of a dataset, independent of files, caches and Arrow chunks.

    Args:
        dataset: A tokenised dataset.
        columns: The columns to look at, integers or (lists of) lists of integers.
    """
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=4096):
        for name in columns:
            values = table.column(name).combine_chunks()
            while hasattr(values, "flatten") and hasattr(values, "value_lengths"):
                digest.update(values.value_lengths().to_numpy(zero_copy_only=False).astype("int64").tobytes())
                values = values.flatten()
            digest.update(values.to_numpy(zero_copy_only=False).astype("int64").tobytes())
    return digest.hexdigest()
