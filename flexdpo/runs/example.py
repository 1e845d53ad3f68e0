"""The built-in example from nothing to files: make the task and the model, warm up, train with DPO, judge, draw."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import trange
from transformers import ProgressCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from flexdpo.config import DPOConfig
from flexdpo.example.model import small_llama
from flexdpo.example.stdlib import read_standard_library
from flexdpo.example.task import (
    HELD_OUT_PAIRS,
    as_dataset,
    as_warm_up_dataset,
    build_task,
    longer_is_chosen,
    swap_prompts,
)
from flexdpo.hf.forward_layout import ATTN_IMPLEMENTATION
from flexdpo.runs.job import (
    CURVES_FILE,
    MASK_FILE,
    METRICS_FILE,
    MetricsFile,
    draw_example_mask,
    remove_earlier_run,
    require_output_dir,
)
from flexdpo.runs.step_times import StepTimes, measure_step_times
from flexdpo.show.plots import draw_training_curves
from flexdpo.training.output_lock import holding_output
from flexdpo.training.trainer import DPOTrainer

if TYPE_CHECKING:
    from flexdpo.example.task import BodyTask

_ACCURACY, _MARGIN = "rewards/accuracies", "rewards/margins"


@dataclass(frozen=True)
class Recipe:
    """How long and how fast the example trains; both learning rates fall linearly to zero."""

    warm_up_steps: int = 400  # of next-token training
    warm_up_batch: int = 2  # sequences; the model learns to copy after a number of steps rather than of tokens
    warm_up_learning_rate: float = 3e-3
    dpo_steps: int = 1400
    dpo_batch: int = 4  # pairs, an even number: the two pairs that reject each other are learned from in one step
    dpo_learning_rate: float = 1e-3
    beta: float = 0.1
    held_out_pairs: int = HELD_OUT_PAIRS
    timing_rounds: int = 12  # steps timed with sharing, and as many without, in alternation


@dataclass(frozen=True)
class ExampleResult:
    """What the example came to; metrics of held-out pairs have the trainer's names without ``eval_``."""

    output_dir: Path  # model, tokenizer, metrics and pictures
    functions: int  # of the standard library that were read
    train_pairs: int  # distinct ones
    held_out_pairs: int  # of modules that nothing was trained on
    before: dict[str, float]
    after: dict[str, float]
    strangers: dict[str, float]  # after DPO, with every prompt replaced by one of another module
    warm_up_accuracy: float  # of the warmed-up model alone, judged by its log-probabilities
    longer_accuracy: float  # of the rule "the longer body is the right one"
    tokens_run: int  # in DPO training
    tokens_unshared: int  # that an ordinary trainer would have run
    step_times: StepTimes  # measured side by side after training
    seconds: float = 0.0  # the whole run, without imports

    @property
    def accuracy(self) -> float:
        """Held-out reward accuracy after DPO."""
        return self.after[_ACCURACY]

    @property
    def stranger_accuracy(self) -> float:
        """Reward accuracy after DPO with strangers' prompts."""
        return self.strangers[_ACCURACY]

    def to_json(self) -> str:
        """Every figure as one line of JSON, for ``metrics.jsonl``."""
        return json.dumps({"phase": "final", **asdict(self), "output_dir": str(self.output_dir)})

    def table(self) -> str:
        """The figures in aligned lines, for people."""
        times = self.step_times
        # before DPO policy and reference are one model: every reward is 0, and the trainer counts a tie as no win
        before = "all tied" if self.before[_MARGIN] == 0 else f"{self.before[_ACCURACY]:.3f}"
        return "\n".join(
            [
                _line("Which body belongs to this function?", "before DPO", "after DPO"),
                _line(f"reward accuracy on {self.held_out_pairs} held-out pairs", before, f"{self.accuracy:.3f}"),
                _line("reward margin", f"{self.before[_MARGIN]:.3f}", f"{self.after[_MARGIN]:.3f}"),
                _line("control: reward accuracy, strangers' prompts", "", f"{self.stranger_accuracy:.3f}"),
                _line("control: the model's log-probability alone", f"{self.warm_up_accuracy:.3f}", ""),
                _line('control: the rule "longer is chosen"', f"{self.longer_accuracy:.3f}", ""),
                "",
                _line("Cost of a DPO step", "ordinary", "shared"),
                _line("tokens, whole training", f"{self.tokens_unshared:,}", f"{self.tokens_run:,}"),
                _line("milliseconds per step", f"{1e3 * times.unshared:.1f}", f"{1e3 * times.shared:.1f}"),
                _line("milliseconds to lay a batch out before", "", f"{1e3 * times.laying_out:.1f}"),
                f"{self.tokens_unshared / self.tokens_run:.2f} times fewer tokens, "
                f"{times.unshared / times.shared:.2f} times faster steps, losses equal to {times.loss_gap:.0e}",
                "",
                f"{self.train_pairs} pairs from {self.functions} functions of the standard library",
                f"{self.seconds:.0f} seconds, written to {self.output_dir}",
            ]
        )


def _line(label: str, *cells: str) -> str:
    return (f"{label:<46}" + "".join(f"{cell:>14}" for cell in cells)).rstrip()


def run_example(
    output_dir: Path | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    recipe: Recipe | None = None,
) -> ExampleResult:
    """Train a small Llama to tell a function's own body from a stranger's, and write everything down.

    Model and tokenizer, ``metrics.jsonl``, ``training.png`` and ``mask.png`` go to ``output_dir``, by default a fresh
    ``flexdpo-example``, ``flexdpo-example-2``, ... here; ``overwrite`` takes a folder that is not empty. ``seed`` draws
    the held-out modules, the pairs, the first weights and the order of training.

    Raises:
        FlexdpoError: if the folder is not empty, or the standard library has no source or too few functions.
    """
    start = time.perf_counter()
    recipe = recipe or Recipe()
    config = _config(fresh_output_dir() if output_dir is None else output_dir, seed)
    with holding_output(Path(str(config.output_dir)), is_owner=True):
        output = require_output_dir(config, overwrite=overwrite)
        return _run(output, seed, recipe, start)


def _run(output: Path, seed: int, recipe: Recipe, start: float) -> ExampleResult:
    metrics_file = output / METRICS_FILE
    remove_earlier_run(output)
    library = read_standard_library(progress=True)
    task = build_task(library, seed, recipe.held_out_pairs)
    model = small_llama(task.tokenizer, seed, ATTN_IMPLEMENTATION)
    _warm_up(model, task, output, seed, recipe)

    trainer = _dpo_trainer(model, task, output, seed, recipe)
    warm_up_accuracy = reference_accuracy(trainer)
    # policy and reference are one model here, so a few pairs say what all would: no reward, every pair a tie
    before = _judge(trainer, trainer.eval_dataset.select(range(min(32, len(task.held_out)))))
    trainer.train()
    trainer.save_model()
    result = ExampleResult(
        output_dir=output,
        functions=len(library.functions),
        train_pairs=min(len(task.train), recipe.dpo_steps * recipe.dpo_batch),
        held_out_pairs=len(task.held_out),
        before=before,
        after=_judge(trainer),
        strangers=_judge(trainer, as_dataset(swap_prompts(task.held_out[::2], seed)), prefix="strangers"),
        warm_up_accuracy=warm_up_accuracy,
        longer_accuracy=longer_is_chosen(task.held_out),
        tokens_run=trainer.tokens["run"],
        tokens_unshared=trainer.tokens["unshared"],
        step_times=measure_step_times(trainer, recipe.timing_rounds),
    )
    history = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    draw_training_curves(history, output / CURVES_FILE)
    draw_example_mask(trainer, output / MASK_FILE)
    result = replace(result, seconds=time.perf_counter() - start)
    with metrics_file.open("a", encoding="utf-8") as file:
        file.write(result.to_json() + "\n")
    return result


def fresh_output_dir(parent: Path | None = None) -> Path:
    """Make and return the first of ``flexdpo-example``, ``flexdpo-example-2``, ... not yet in ``parent``, or here."""
    for number in itertools.count(1):
        folder = (parent or Path()) / ("flexdpo-example" if number == 1 else f"flexdpo-example-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        break
    return folder


# --- training and judging ---------------------------------------------------------------------------------------------


class _Progress(ProgressCallback):
    """Progress bars that name the phase and carry the latest figures, instead of printing every logged line."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Judging")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        names = {"loss": "loss", _ACCURACY: "accuracy"}
        shown = {short: f"{logs[name]:.3f}" for name, short in names.items() if name in (logs or ())}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


def _config(output: Path, seed: int, **settings: Any) -> DPOConfig:
    return DPOConfig(
        str(output),
        seed=seed,
        # on a GPU float32 attention runs without tensor cores and takes minutes to compile; a CPU gains nothing
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        torch_compile=False,  # so small a model is done before it pays
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        lr_scheduler_type="linear",
        logging_steps=20,
        **settings,
    )


def _warm_up(model: Any, task: BodyTask, output: Path, seed: int, recipe: Recipe) -> None:
    """Teach the model the language: next tokens of prompts and the bodies that follow them."""
    config = _config(
        output,
        seed,
        loss_type="sft",
        max_steps=recipe.warm_up_steps,
        warmup_steps=min(20, recipe.warm_up_steps // 10),
        per_device_train_batch_size=recipe.warm_up_batch,
        learning_rate=recipe.warm_up_learning_rate,
    )
    _trainer("Warm-up", model, task, config, train_dataset=as_warm_up_dataset(task.train)).train()


def _dpo_trainer(model: Any, task: BodyTask, output: Path, seed: int, recipe: Recipe) -> DPOTrainer:
    config = _config(
        output,
        seed,
        beta=recipe.beta,
        max_steps=recipe.dpo_steps,
        warmup_steps=min(10, recipe.dpo_steps // 10),
        per_device_train_batch_size=recipe.dpo_batch,
        per_device_eval_batch_size=recipe.dpo_batch,
        learning_rate=recipe.dpo_learning_rate,
        train_sampling_strategy="sequential",  # the task's order keeps together what belongs together
    )
    datasets = {"train_dataset": as_dataset(task.train), "eval_dataset": as_dataset(task.held_out)}
    return _trainer("DPO", model, task, config, **datasets)


def _trainer(title: str, model: Any, task: BodyTask, config: DPOConfig, **datasets: Any) -> DPOTrainer:
    metrics = MetricsFile(Path(str(config.output_dir)) / METRICS_FILE, phase=title.lower())
    trainer = DPOTrainer(model, None, config, processing_class=task.tokenizer, callbacks=[metrics], **datasets)
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(_Progress(title))
    return trainer


def _judge(trainer: DPOTrainer, dataset: Any = None, prefix: str = "eval") -> dict[str, float]:
    """Evaluate and return the metrics under their bare names."""
    metrics = trainer.evaluate(dataset, metric_key_prefix=prefix)
    return {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}


def reference_accuracy(trainer: DPOTrainer) -> float:
    """Share of held-out pairs whose chosen response is the likelier one under the reference model alone."""
    data, size = trainer.eval_dataset, trainer.args.per_device_eval_batch_size
    wins = 0
    for start in trange(0, len(data), size, desc="Judging the warmed-up model"):
        examples = [data[i] for i in range(start, min(start + size, len(data)))]
        for row in trainer.data_collator(examples)["batch"].to(trainer.args.device).rows:
            sums = trainer.reference_logps(row).sums
            chosen, rejected = row.edges.unbind(dim=1)
            wins += int((sums[chosen] > sums[rejected]).sum())
    return wins / len(data)
