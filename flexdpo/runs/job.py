"""A training run from names to files: load, evaluate, train, evaluate, save, and draw what happened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flexdpo.data.stream import StreamedPreferences
from flexdpo.errors import FlexdpoError
from flexdpo.layout.row import TILE
from flexdpo.show.draw import draw
from flexdpo.show.plots import draw_training_curves
from flexdpo.training.batch import PackingCollator
from flexdpo.training.distribution import is_sharded
from flexdpo.training.metrics import MetricsFile
from flexdpo.training.output_lock import LOCK_FILE, holding_output
from flexdpo.training.trainer import DPOTrainer

if TYPE_CHECKING:
    from flexdpo.config import DPOConfig
    from flexdpo.runs.settings import Job

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "training.png"
MASK_FILE = "mask.png"


def run_job(job: Job, config: DPOConfig) -> str:
    """Train, save model, tokenizer, metrics and pictures to ``config.output_dir``, and return the final table."""
    with holding_output(Path(str(config.output_dir)), is_owner=config.process_index == 0):
        return _run(job, config)


def _run(job: Job, config: DPOConfig) -> str:
    output = require_output_dir(config, overwrite=job.overwrite_output_dir)
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
    # a model that is sharded when training begins cannot be evaluated before it
    sharded = is_sharded(config)
    before = trainer.evaluate() if eval_data is not None and not sharded else {}
    # training begins a history of its own
    history = list(trainer.state.log_history)
    checkpoint = str(config.resume_from_checkpoint or "false")
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(checkpoint.lower(), checkpoint))
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
    width = max(len(label) for label, _ in rows)
    reports = [line.strip() for report in trainer.data_reports.values() for line in report.summary().splitlines()]
    return "\n".join([*reports, *(f"{label:<{width}}  {value}" for label, value in rows)])
