"""``DPOTrainer``: transformers' ``Trainer`` on shared, packed rows, with TRL's names for the same things."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from flexdpo.attention.row_mask import Impl
from flexdpo.errors import FlexdpoError
from flexdpo.hf.support import prepare_model, unwrap_model
from flexdpo.layout.packing import pack_groups
from flexdpo.objective.logps import response_logps
from flexdpo.training import models
from flexdpo.training.checkpoints import data_digest, last_checkpoint, require_same_run, run_record, write_record
from flexdpo.training.config import DPOConfig
from flexdpo.training.data import TOKENISED_COLUMNS, group_from_row, require_special_tokens, tokenize_preferences
from flexdpo.training.step import REFERENCE_COLUMN, BatchLoss, PackedBatch, PackingCollator, run_batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import EvalLoopOutput

    from flexdpo.layout.row import Row
    from flexdpo.training.data import DataReport

logger = logging.get_logger(__name__)


class DPOTrainer(Trainer):
    """Trains a causal LM on preferences; every distinct token of a group runs once, and groups share packed rows.

    The pairs of each optimizer step are those that transformers' ``Trainer`` would take with the same settings.

    Args:
        model: A prepared or unprepared causal LM, a ``PeftModel``, or a name or folder to load it from.
        ref_model: The reference; by default a frozen copy of the model, or the model without its adapter.
        args: Settings.
        train_dataset: Preferences as text or messages, or tokenised (see :func:`tokenize_preferences`).
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer; by default loaded from the model's name.
        peft_config: Wrap the model in this adapter.
        callbacks: As in ``Trainer``.
        optimizers: As in ``Trainer``.
        compute_metrics: Not supported, since the full logits never exist.

    Raises:
        FlexdpoError: if the data, the settings or the model cannot be used; the message says what to change.
    """

    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        ref_model: nn.Module | None = None,
        args: DPOConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        compute_metrics: Any = None,
    ) -> None:
        args = args if args is not None else DPOConfig(f"{models.model_name(model)}-DPO")
        if compute_metrics is not None:
            raise FlexdpoError("compute_metrics needs full logits, which are never computed; read the logged metrics")
        if ref_model is not None and ref_model is model:
            raise FlexdpoError("model and ref_model are the same object; leave ref_model out to get a frozen copy")
        self.objective = args.objective()
        self._sums: dict[str, dict[str, list[Tensor]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        # this process's, in training
        self.tokens = {"run": 0, "unshared": 0}
        self._record: dict[str, Any] | None = None
        self.data_reports: dict[str, DataReport] = {}

        # adapters draw their first weights from this seed
        set_seed(args.seed)
        if isinstance(model, str):
            processing_class = processing_class or models.load_tokenizer(
                model, trust_remote_code=args.trust_remote_code
            )
            init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
            model = models.load_model(model, trust_remote_code=args.trust_remote_code, **init_kwargs)
        if processing_class is None:
            name = unwrap_model(model).config._name_or_path
            if not name:
                raise FlexdpoError("the model was made in memory, so give its tokenizer as processing_class=")
            processing_class = models.load_tokenizer(name, trust_remote_code=args.trust_remote_code)
        require_special_tokens(processing_class)
        models.require_vocabulary(unwrap_model(model), processing_class)

        model = self._with_adapter(model, ref_model, peft_config)
        self.impl: Impl = args.attn_impl  # type: ignore[assignment]
        prepare_model(model, impl=self.impl)
        reference = self._reference_for(model, ref_model, args)
        if args.disable_dropout:
            for part in (model, reference):
                if part is not None:
                    models.disable_dropout(part)
        self._tokenizer_settings: dict[str, Any] = {
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "num_proc": args.dataset_num_proc,
        }
        self._main_process_first = args.main_process_first
        super().__init__(
            model=model,
            args=args,
            data_collator=PackingCollator(args.max_tokens_per_row, args.row_multiple),
            train_dataset=self._tokenised(train_dataset, processing_class, "train", model),
            eval_dataset=self._tokenised_all(eval_dataset, processing_class, model),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # the loss is a mean over pairs, scaled for accumulation like any other
        self.model_accepts_loss_kwargs = False
        if reference is not None:
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.ref_model = reference
        if args.precompute_ref_log_probs and self.objective.needs_reference:
            self._precompute()

    # --- models ------------------------------------------------------------------------------------------------------

    def _with_adapter(self, model: nn.Module, ref_model: nn.Module | None, peft_config: Any) -> nn.Module:
        if peft_config is not None:
            return models.add_adapter(model, peft_config)
        if models.is_peft_model(model) and ref_model is None and self.objective.needs_reference:
            # it came with a trained adapter, so the reference is that adapter and not the bare model
            models.add_reference_adapter(model)
        return model

    def _reference_for(self, model: nn.Module, ref_model: nn.Module | None, args: DPOConfig) -> nn.Module | None:
        if not self.objective.needs_reference:
            if ref_model is not None:
                raise FlexdpoError(f"loss_type {', '.join(args.loss_type)} uses no reference; leave ref_model out")
            return None
        if ref_model is not None:
            prepare_model(ref_model, impl=self.impl)
            return ref_model.requires_grad_(False).eval()
        if models.is_peft_model(model) or args.precompute_ref_log_probs:
            # the adapter is switched off, or the policy itself is the reference before its first step
            return None
        return models.frozen_copy(model)

    def reference_sums(self, row: Row) -> Tensor:
        """Log-probability of each response of a row under the reference, ``[R]``, without gradients."""
        with torch.no_grad():
            if self.ref_model is not None:
                return response_logps(self.ref_model, row).sums
            if models.is_peft_model(self.model):
                with models.reference_adapter(self.accelerator.unwrap_model(self.model)):
                    return response_logps(self.model, row).sums
            if self.state.global_step > 0:
                raise FlexdpoError(
                    "the reference was not kept in memory (precompute_ref_log_probs=True) and the policy has been "
                    "trained since; give this dataset to the trainer as eval_dataset, or pass ref_model"
                )
            return response_logps(self.model, row).sums

    # --- data --------------------------------------------------------------------------------------------------------

    def _tokenised(
        self, dataset: Any, tokenizer: PreTrainedTokenizerBase, name: str, model: nn.Module
    ) -> Dataset | None:
        if dataset is None:
            return None
        # one process fills the cache that the others read
        with self._main_process_first(desc=f"tokenising {name}"):
            tokenised = tokenize_preferences(dataset, tokenizer, name=name, **self._tokenizer_settings)
        report = tokenised.report
        # what was left out is said at a level that transformers shows by default
        (logger.warning if report.skipped or report.notes else logger.info)(report.summary())
        self.data_reports[name] = report
        models.require_positions(unwrap_model(model), report.longest)
        return tokenised.dataset

    def _tokenised_all(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> Any:
        if isinstance(dataset, dict):
            return {name: self._tokenised(part, tokenizer, name, model) for name, part in dataset.items()}
        return self._tokenised(dataset, tokenizer, "eval", model)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*TOKENISED_COLUMNS, REFERENCE_COLUMN]

    def _precompute(self) -> None:
        self.train_dataset = self._with_reference(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_reference(d, name) for name, d in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._with_reference(self.eval_dataset, "eval")
        self.ref_model = None

    def _with_reference(self, dataset: Any, name: str) -> Any:
        """Add the reference log-probability of every response as a column."""
        if dataset is None or REFERENCE_COLUMN in dataset.column_names:
            return dataset
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        batches = [range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size)]
        mine = batches[self.args.process_index :: self.args.world_size]
        found: list[tuple[int, list[float]]] = []
        was_training = self.model.training
        self.model.eval()
        for numbers in tqdm(mine, desc=f"Reference log-probabilities, {name}", disable=self.args.disable_tqdm):
            found += self._reference_of(dataset.select(numbers), numbers)
        self.model.train(was_training)
        values = dict(gather_object(found))
        return dataset.add_column(REFERENCE_COLUMN, [values[number] for number in range(len(dataset))])

    def _reference_of(self, dataset: Any, numbers: range) -> list[tuple[int, list[float]]]:
        groups = [group_from_row(example) for example in dataset]
        number_of = {id(group): number for group, number in zip(groups, numbers, strict=True)}
        rows = pack_groups(groups, self.args.max_tokens_per_row, pad_to_multiple_of=self.args.row_multiple)
        found = []
        for row in rows:
            with self.compute_loss_context_manager():
                sums = self.reference_sums(row.to(self.args.device)).tolist()
            for group in row.groups:
                count = len(group.response_ids)
                found.append((number_of[id(group)], sums[:count]))
                sums = sums[count:]
        return found

    # --- the step ----------------------------------------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Run one batch of pairs: its rows one after another, gradients accumulated to the unpacked batch's."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        batch = self._prepare_inputs(inputs)["batch"].to(self.args.device)
        scale = 1.0 / self.current_gradient_accumulation_steps

        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss * scale)

        result = run_batch(
            model,
            batch,
            self.objective,
            reference=self.reference_sums,
            backward=backward,
            no_sync=lambda: self.accelerator.no_sync(model),
            autocast=self.compute_loss_context_manager,
        )
        self._require_finite(result.loss, inputs)
        self.tokens["run"] += batch.tokens_run
        self.tokens["unshared"] += batch.tokens_unshared
        self._remember("train", result)
        step_loss: Tensor = (result.loss * scale).to(torch.float32)
        return step_loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002
    ) -> Any:
        """Compute the loss of a batch without a backward pass."""
        if return_outputs:
            raise FlexdpoError("a packed batch has no outputs per example; use return_outputs=False")
        batch = inputs["batch"].to(self.args.device)
        return run_batch(model, batch, self.objective, reference=self.reference_sums).loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: ARG002
        ignore_keys: list[str] | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, None, None]:
        """Compute the loss and the metrics of an evaluation batch."""
        batch = self._prepare_inputs(inputs)["batch"].to(self.args.device)
        with torch.no_grad():
            result = run_batch(
                model,
                batch,
                self.objective,
                reference=self.reference_sums,
                autocast=self.compute_loss_context_manager,
            )
        self._remember("eval", result, self._distinct_pairs(batch))
        return result.loss.to(torch.float32), None, None

    def _require_finite(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        if not torch.isfinite(loss):
            rows = ", ".join(str(row) for row in inputs["example_rows"].tolist())
            raise FlexdpoError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, in the batch of the dataset's rows "
                f"{rows} (counted from 0); training stops here and the last checkpoint stays. Lower the learning rate, "
                "or look at these rows"
            )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Floating-point operations of a training step on the tokens that really run (6 per token and parameter)."""
        parameters = int(unwrap_model(self.model).num_parameters(exclude_embeddings=True))
        return 6 * int(inputs["batch"].tokens_run) * parameters

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or continue from a checkpoint of the same data and settings (``True``: the last one in output_dir).

        Raises:
            FlexdpoError: if the checkpoint belongs to another run, or a loss is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(Path(str(self.args.output_dir))))
        if resume_from_checkpoint:
            require_same_run(Path(resume_from_checkpoint), self._run_record())
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _run_record(self) -> dict[str, Any]:
        if self._record is None:
            self._record = run_record(self.args, data_digest(self.train_dataset, TOKENISED_COLUMNS))
        return self._record

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as ``Trainer`` does, mark the checkpoint as complete, and only then let older ones go."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            output_dir = self._get_output_dir(trial=trial)
            write_record(Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self._run_record())
            rotate_checkpoints(
                output_dir=output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _remember(self, mode: str, result: BatchLoss, kept: Tensor | None = None) -> None:
        for name, values in result.metrics.items():
            counted = values if kept is None else values[kept]
            if len(counted):
                self._sums[mode][name].append(torch.stack([counted.sum(), counted.new_tensor(len(counted))]))

    def _distinct_pairs(self, batch: PackedBatch) -> Tensor | None:
        """Which pairs of an evaluation batch count: all but the repeats that fill up the last batch of some ranks."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        size = self.args.eval_batch_size
        distinct = state.remainder - self.args.process_index * size
        examples = [example for row in batch.pair_examples or [] for example in row]
        return torch.tensor([example < distinct for example in examples], dtype=torch.bool, device=self.args.device)

    def _collect(self, mode: str) -> dict[str, float]:
        """Means over all pairs since the last call, on all processes."""
        # a rank without a single pair still takes part, so the names come from all of them
        names = sorted({name for part in gather_object([sorted(self._sums[mode])]) for name in part})
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        totals = torch.stack([sum(self._sums[mode][name], nothing) for name in names])
        self._sums[mode].clear()
        totals = self.accelerator.reduce(totals, reduction="sum")
        return {name: (total / count).item() for name, (total, count) in zip(names, totals, strict=True)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the training metrics added to the lines that carry a training loss."""
        if "loss" in logs:
            logs.update(self._collect("train"))
            tokens = torch.tensor(list(self.tokens.values()), device=self.args.device)
            run, unshared = self.accelerator.reduce(tokens, reduction="sum").tolist()
            logs.update({"tokens/run": run, "tokens/unshared": unshared})
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as ``Trainer`` does, with the preference metrics added."""
        self._sums["eval"].clear()
        output: EvalLoopOutput = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._collect("eval").items()}
        output.metrics.update(metrics)
        return output

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate on ``eval_dataset``, tokenised or not, or on the one given to the trainer."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._tokenised_all(eval_dataset, self.processing_class, self.model)
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics


class MetricsFile(TrainerCallback):
    """Appends every logged line to a JSONL file, one object per line.

    Args:
        path: The file; an existing one is continued.
        extra: Fields added to every line.
    """

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
