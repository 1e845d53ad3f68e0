"""A training run from names to files: load, evaluate, train, evaluate, save, and draw what happened."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    logging,
)

from flexdpo.config import DPOConfig
from flexdpo.data.stream import StreamedPreferences
from flexdpo.errors import FlexdpoError, Interrupted, first_line
from flexdpo.hf.names import adapter_base, local_path
from flexdpo.layout.row import TILE
from flexdpo.runs.ready import require_ready, require_room_on_disk
from flexdpo.runs.run_file import RUN_FILE, write_run_file
from flexdpo.runs.settings import Job
from flexdpo.show.draw import draw
from flexdpo.show.plots import draw_training_curves
from flexdpo.training.adapters import is_peft_model
from flexdpo.training.batch import PackingCollator
from flexdpo.training.checkpoints import last_checkpoint
from flexdpo.training.distribution import is_sharded
from flexdpo.training.output_lock import LOCK_FILE, holding_output
from flexdpo.training.trainer import DPOTrainer

logger = logging.get_logger(__name__)

METRICS_FILE, CURVES_FILE, MASK_FILE = "metrics.jsonl", "training.png", "mask.png"
# what runs write, be it a model or an adapter, of one tokenizer or another
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", f"{PREFIX_CHECKPOINT_DIR}-*")
_WRITTEN = (
    *_WEIGHTS[:-1], "*.safetensors.index.json", "pytorch_model*.bin.index.json", CONFIG_NAME,
    GENERATION_CONFIG_NAME, "adapter_config.json", PROCESSOR_NAME, IMAGE_PROCESSOR_NAME,
    CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, FULL_TOKENIZER_FILE,
    "vocab.*", "merges.txt", "tokenizer.model", TRAINING_ARGS_NAME, "README.md", RUN_FILE, METRICS_FILE, CURVES_FILE,
    MASK_FILE,
)  # fmt: skip


class MetricsFile(TrainerCallback):
    """Appends every logged line to a JSONL file, one object per line."""

    def __init__(self, path: Path | str, **extra: Any) -> None:
        self.path = Path(path)
        self.extra = extra

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        """Write one line, on the main process only."""
        if logs is None or not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **self.extra, **logs}) + "\n")


def run_job(job: Job, config: DPOConfig, given: Mapping[str, Any]) -> str:
    """Train, save model, tokenizer, card, metrics and pictures to ``config.output_dir``, and return the final table.

    ``given`` are the options that ``flexdpo_run.yaml`` is to hold.
    """
    output = Path(str(config.output_dir))
    require_ready(job, config)
    with holding_output(output, is_owner=config.process_index == 0):
        require_output_dir(config, overwrite=job.overwrite_output_dir, model=job.model_name_or_path or "")
        try:
            return _run(job, config, given, output)
        except KeyboardInterrupt as stop:
            left = _left_to_go_on(output) if config.process_index == 0 else ""
            raise Interrupted(getattr(stop, "number", signal.SIGINT), left) from None


def _run(job: Job, config: DPOConfig, given: Mapping[str, Any], output: Path) -> str:
    adapter = job.peft_config()
    train_data, eval_data = job.train_data(), job.eval_data()
    config.model_init_kwargs = job.load_kwargs(config) or None
    trainer = DPOTrainer(
        job.model_name_or_path,
        None,
        config,
        train_dataset=train_data,
        eval_dataset=eval_data,
        peft_config=adapter,
        callbacks=[MetricsFile(output / METRICS_FILE)],
    )
    require_room_on_disk(trainer.model, config, adapter=is_peft_model(trainer.model))
    trainer.dataset_names = job.dataset_names
    if trainer.is_world_process_zero() and not config.resume_from_checkpoint:
        remove_earlier_run(output)
        write_run_file(output, given, trainer)
    # a model that is sharded when training begins cannot be evaluated before it
    before = trainer.evaluate() if eval_data is not None and not is_sharded(config) else {}
    wanted = config.metric_for_best_model
    if before and wanted and not {wanted, f"eval_{wanted}"} & before.keys():
        raise FlexdpoError(
            f"--metric_for_best_model {wanted} is none of what an evaluation gives: {', '.join(sorted(before))}"
        )
    # training begins a history of its own
    history = list(trainer.state.log_history)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    after = trainer.evaluate() if eval_data is not None else {}
    trainer.save_whole()
    trainer.figures = figures = figures_of(trainer, before, after)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        _draw(trainer, [*history, *trainer.state.log_history], output)
    if config.push_to_hub:
        # with the card and the pictures
        trainer.push_to_hub()
    reports = [line.strip() for report in trainer.data_reports.values() for line in report.summary().splitlines()]
    width = max(map(len, figures))
    table = [*reports, *(f"{label:<{width}}  {value}" for label, value in {**figures, "written to": output}.items())]
    # Python that goes down while threads of the group still hold tensors may abort, and fail a run that is done
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return "\n".join(table)


def _left_to_go_on(output: Path) -> str:
    """Which checkpoint an interrupted run has left, and the command that goes on."""
    file = output / RUN_FILE
    if not file.is_file():
        return "; nothing was trained yet"
    again = f"flexdpo train --config {file} --output_dir {output}"
    try:
        return f"; {last_checkpoint(output)} is complete, go on with: {again} --resume_from_checkpoint true"
    except FlexdpoError:
        return f"; there is no complete checkpoint yet, begin again with: {again} --overwrite_output_dir"


def _draw(trainer: DPOTrainer, history: list[dict[str, Any]], output: Path) -> None:
    """Draw curves and a mask; the model is saved, and no picture is worth a failed run."""
    try:
        draw_training_curves(history, output / CURVES_FILE)
        draw_example_mask(trainer, output / MASK_FILE)
    except Exception as error:  # a drawing library's, of any kind
        logger.warning(f"no picture could be drawn ({type(error).__name__}: {first_line(error)}); the model is saved")


def require_output_dir(config: DPOConfig, *, overwrite: bool, model: str = "") -> Path:
    """Return the output folder, which this run holds; refuse one that holds something unless that was asked for.

    What is written over is an earlier run, of which nothing is left: neither others' models, nor the ``model`` trained.
    """
    output = Path(str(config.output_dir))
    if overwrite and config.process_index == 0 and not config.resume_from_checkpoint:
        for name in filter(None, (model, model and adapter_base(model))):
            source = local_path(name)
            if source is not None and source.resolve().is_relative_to(output.resolve()):
                raise FlexdpoError(
                    f"--overwrite_output_dir would remove {name}, the model that is trained; give another --output_dir"
                )
        foreign = [path for pattern in _WEIGHTS for path in output.glob(pattern)]
        if foreign and not any((output / name).is_file() for name in (RUN_FILE, METRICS_FILE)):
            raise FlexdpoError(
                f"--output_dir {output} holds {foreign[0].name}, and is no run of flexdpo train that could be written "
                "over; remove it, or name another folder"
            )
    holds_something = output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir())
    if holds_something and not (overwrite or config.resume_from_checkpoint) and config.process_index == 0:
        raise FlexdpoError(
            f"--output_dir {output} is not empty; name another, add --overwrite_output_dir, or continue the run in it "
            "with --resume_from_checkpoint true"
        )
    return output


def remove_earlier_run(output: Path) -> None:
    """Remove what a run that is written over has left: it would be loaded, or gone on from, as this one's.

    Files that no run writes stay.
    """
    for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        # one that somebody has copied to another name stays, and what was moved and linked to loses its link alone
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir() and folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal():
            shutil.rmtree(folder)
    for pattern in _WRITTEN:
        for file in output.glob(pattern):
            file.unlink()


def draw_example_mask(trainer: DPOTrainer, path: Path, groups: int = 3) -> None:
    """Draw the mask of one row: the first few groups of the training data."""
    data = trainer.train_dataset
    if isinstance(data, StreamedPreferences):
        data = data.sample(groups)
    few = [data[i] for i in range(min(groups, len(data)))]
    batch = PackingCollator(pad_to_multiple_of=trainer.args.row_multiple)(few)["batch"]
    draw(batch.rows[0], path=path, block_size=TILE)


def figures_of(trainer: DPOTrainer, before: dict[str, float], after: dict[str, float]) -> dict[str, str]:
    """What the run came to."""
    tokens, figures = trainer.total_tokens(), dict[str, str]()
    # policy and reference begin as one model: every reward is 0, and a tie counts as no win
    tied = before.get("eval_rewards/margins") == 0 and before.get("eval_rewards/accuracies") == 0
    for name, label in (("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin")):
        key = f"eval_{name}"
        if key in before:
            first = "all tied" if tied else f"{before[key]:.3f}"
            figures[f"held-out {label}, before and after"] = f"{first}  {after[key]:.3f}"
        elif key in after:
            figures[f"held-out {label}, after"] = f"{after[key]:.3f}"
    return {
        **figures,
        "tokens run in training": f"{tokens['run']:,}",
        "tokens the ordinary way": f"{tokens['unshared']:,}",
        "times fewer": f"{tokens['unshared'] / max(tokens['run'], 1):.2f}",
        **(
            {"images encoded, and the ordinary way": f"{tokens['images']:,}  {tokens['images_unshared']:,}"}
            if "images" in tokens
            else {}
        ),
    }
