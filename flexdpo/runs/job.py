"""A training run from names to files: load, evaluate, train, evaluate, save, and draw what happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexdpo.config import DPOConfig
from flexdpo.data.stream import StreamedPreferences
from flexdpo.data.tokenize import load_preference_dataset
from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import TILE
from flexdpo.show.draw import draw
from flexdpo.show.plots import draw_training_curves
from flexdpo.training.batch import PackingCollator
from flexdpo.training.distribution import is_sharded
from flexdpo.training.metrics import MetricsFile
from flexdpo.training.output_lock import LOCK_FILE, holding_output
from flexdpo.training.trainer import DPOTrainer

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "training.png"
MASK_FILE = "mask.png"


@dataclass(frozen=True)
class Job:
    """What to train on what.

    Attributes:
        model_name_or_path: A folder saved with ``save_pretrained``, or a hub name.
        dataset_name: See :func:`flexdpo.load_preference_dataset`.
        dataset_config: Configuration of a hub dataset.
        train_split: Split to train on.
        test_split: Split of the same dataset to evaluate on.
        eval_dataset_name: Another dataset to evaluate on.
        streaming: Read datasets as they are needed.
        columns: Which column is which, in all of them.
        overwrite_output_dir: Write into a folder that is not empty.
        load_kwargs: For ``AutoModelForCausalLM.from_pretrained``.
        peft_config: A ``peft.PeftConfig`` to train an adapter.
    """

    model_name_or_path: str
    dataset_name: str
    dataset_config: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    eval_dataset_name: str | None = None
    streaming: bool = False
    columns: dict[str, str] | None = None
    overwrite_output_dir: bool = False
    load_kwargs: dict[str, Any] = field(default_factory=dict)
    peft_config: Any = None

    def load(self, name: str, split: str, config_name: str | None = None) -> Any:
        """One split of a dataset, or a stream of it."""
        return load_preference_dataset(
            name, split=split, config_name=config_name, streaming=self.streaming, columns=self.columns
        )


def run_job(job: Job, config: DPOConfig) -> str:
    """Train, save model, tokenizer, metrics and pictures to ``config.output_dir``, and return the final table."""
    with holding_output(Path(str(config.output_dir)), is_owner=config.process_index == 0):
        return _run(job, config)


def _run(job: Job, config: DPOConfig) -> str:
    output = require_output_dir(config, overwrite=job.overwrite_output_dir)
    train_data = job.load(job.dataset_name, job.train_split, job.dataset_config)
    eval_data = _eval_data(job)
    init_kwargs = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    config.model_init_kwargs = {**init_kwargs, **job.load_kwargs} or None
    trainer = DPOTrainer(
        job.model_name_or_path,
        None,
        config,
        train_dataset=train_data,
        eval_dataset=eval_data,
        peft_config=job.peft_config,
        callbacks=[MetricsFile(output / METRICS_FILE)],
    )
    # a model that is sharded when training begins cannot be evaluated before it
    sharded = is_sharded(config)
    before = trainer.evaluate() if eval_data is not None and not sharded else {}
    # training begins a history of its own
    history = list(trainer.state.log_history)
    trainer.train(resume_from_checkpoint=_checkpoint(config))
    after = trainer.evaluate() if eval_data is not None else {}
    trainer.save_model()
    if trainer.is_world_process_zero():
        draw_training_curves([*history, *trainer.state.log_history], output / CURVES_FILE)
        draw_example_mask(trainer, output / MASK_FILE)
    table = summary_table(trainer, before, after, output)
    # Python that goes down while threads of the group still hold tensors may abort, and fail a run that is done
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return table


def require_output_dir(config: DPOConfig, *, overwrite: bool) -> Path:
    """Return the output folder, which this run holds; refuse one that holds something unless that was asked for."""
    output = Path(str(config.output_dir))
    resuming = bool(config.resume_from_checkpoint)
    holds_something = output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir())
    if holds_something and not (overwrite or resuming) and config.process_index == 0:
        raise FlexdpoError(
            f"--output_dir {output} is not empty; name another, add --overwrite_output_dir, or continue the run in it "
            "with --resume_from_checkpoint true"
        )
    return output


def _eval_data(job: Job) -> Any:
    if job.eval_dataset_name is not None:
        return job.load(job.eval_dataset_name, job.test_split or "train")
    if job.test_split is not None:
        return job.load(job.dataset_name, job.test_split, job.dataset_config)
    return None


def _checkpoint(config: DPOConfig) -> str | bool | None:
    asked = str(config.resume_from_checkpoint or "false")
    return {"true": True, "false": None}.get(asked.lower(), asked)


def draw_example_mask(trainer: DPOTrainer, path: Path, groups: int = 3) -> None:
    """Draw the mask of one row: the first few groups of the training data."""
    data = trainer.train_dataset
    if isinstance(data, StreamedPreferences):
        data = data.sample(groups)
    collate = PackingCollator(pad_to_multiple_of=trainer.args.row_multiple)
    batch = collate([data[i] for i in range(min(groups, len(data)))])["batch"]
    draw(batch.rows[0], path=path, block_size=TILE)


def summary_table(trainer: DPOTrainer, before: dict[str, float], after: dict[str, float], output: Path) -> str:
    """What the run came to, in a few aligned lines."""
    tokens = trainer.total_tokens()
    rows: list[tuple[str, str]] = []
    for name, label in (("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin")):
        key = f"eval_{name}"
        if key in before:
            rows.append((f"held-out {label}, before and after", f"{before[key]:.3f}  {after[key]:.3f}"))
        elif key in after:
            rows.append((f"held-out {label}, after", f"{after[key]:.3f}"))
    rows += [
        ("tokens run in training", f"{tokens['run']:,}"),
        ("tokens the ordinary way", f"{tokens['unshared']:,}"),
        ("times fewer", f"{tokens['unshared'] / max(tokens['run'], 1):.2f}"),
        ("written to", str(output)),
    ]
    rows[:0] = [
        (line.strip(), "") for report in trainer.data_reports.values() for line in report.summary().splitlines()
    ]
    width = max(len(label) for label, value in rows if value)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in rows)
