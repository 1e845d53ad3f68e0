"""``DPOTrainer``: transformers' ``Trainer`` on shared, packed rows, with TRL's names for the same things."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from flexdpo.attention.row_mask import Impl
from flexdpo.attention.settings import kernel_settings_as
from flexdpo.config import DPOConfig
from flexdpo.data.balance import balance
from flexdpo.data.cache import tokenizer_digest
from flexdpo.data.lengths import (
    has_one_pair_each,
    predicted_costs,
    require_company,
    require_room,
    token_counts,
    tokens_needed,
)
from flexdpo.data.regroup import regroup_by_prompt
from flexdpo.data.stream import StreamedPreferences, is_stream
from flexdpo.data.tokenize import LABELS_COLUMN, TOKENISED_COLUMNS, tokenize_preferences
from flexdpo.data.workers import plain_worker_errors
from flexdpo.errors import FlexdpoError
from flexdpo.hf.compilation import compile_decoder_layers, decoder_layers
from flexdpo.hf.prepare import prepare_model, unwrap_model
from flexdpo.hf.randomness import disable_dropout, require_no_draws
from flexdpo.hf.row_dependence import limits_of
from flexdpo.objective.logps import response_logps
from flexdpo.objective.router import RouterLoss
from flexdpo.reference.fingerprints import model_fingerprint, settings_fingerprint, weights_sample
from flexdpo.reference.sync import mix_into_reference
from flexdpo.training import adapters, distribution, model_loading
from flexdpo.training.batch import REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN, PackedBatch, PackingCollator
from flexdpo.training.checkpoints import (
    data_digest,
    file_record,
    last_checkpoint,
    load_reference,
    require_same_run,
    require_same_schedule,
    run_record,
    save_reference,
    steps_of,
    tokens_of,
    write_record,
    writing_checkpoint,
)
from flexdpo.training.finite import StepGuard, require_finite_weights
from flexdpo.training.metrics import MeanMetrics
from flexdpo.training.output_lock import holding_output
from flexdpo.training.precompute import Precompute
from flexdpo.training.row_plan import RowPlan
from flexdpo.training.start_proof import ProofAtStart
from flexdpo.training.step import BatchLoss, Runner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset
    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import EvalLoopOutput

    from flexdpo.data.tokenize import DataReport
    from flexdpo.layout.row import Row
    from flexdpo.objective.logps import ResponseLogps
    from flexdpo.proof.prove import Proof

logger = logging.get_logger(__name__)

# of a stream, before training
_PREVIEWED_ROWS = 64


class DPOTrainer(Trainer):
    """Trains a causal LM on preferences; every distinct token of a group runs once, and groups share packed rows.

    The pairs of each optimizer step are those that transformers' ``Trainer`` would take with the same settings.

    Args:
        model: A prepared or unprepared causal LM, a ``PeftModel``, or a name or folder to load it from.
        ref_model: The reference; by default a frozen copy of the model, or the model without its adapter.
        args: Settings.
        train_dataset: Preferences as text or messages, or tokenised (see :func:`tokenize_preferences`); or a stream of
            them (see :class:`~flexdpo.data.stream.StreamedPreferences`).
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
    data_collator: Any
    # what the run proved before its first step
    proof: Proof | None = None

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
        args = args if args is not None else DPOConfig(f"{model_loading.model_name(model)}-DPO")
        if compute_metrics is not None:
            raise FlexdpoError("compute_metrics needs full logits, which are never computed; read the logged metrics")
        if ref_model is not None and ref_model is model:
            raise FlexdpoError("model and ref_model are the same object; leave ref_model out to get a frozen copy")
        self.objective = args.objective()
        self.impl: Impl = args.attn_impl  # type: ignore[assignment]
        self._metrics = {"train": MeanMetrics(), "eval": MeanMetrics()}
        # sum of the losses of the examples that were evaluated, and their number
        self._eval_loss = torch.zeros(2, dtype=torch.float64)
        # this process's, in training
        self.tokens = {"run": 0, "unshared": 0}
        self._record: dict[str, Any] | None = None
        self.data_reports: dict[str, DataReport] = {}

        # adapters draw their first weights from this seed
        set_seed(args.seed)
        model, processing_class = model_loading.load_parts(model, processing_class, args)
        if peft_config is not None:
            model = adapters.add_adapter(model, peft_config)
        adapters.require_trainable(model)
        prepare_model(model, impl=self.impl)
        self._router = RouterLoss.of(model, args.router_aux_loss_coef)
        reference = self._reference_for(model, ref_model, args, processing_class)
        # what an adapter's policy was before its first step takes no second model
        self._at_start: adapters.AtStart | None = None
        if reference is None and self.objective.needs_reference and adapters.is_peft_model(model):
            self._at_start = adapters.at_start_of(model, fresh=peft_config is not None)
        self._fingerprints = self._fingerprints_of(model, reference, args, fresh=peft_config is not None)
        for part in (model, reference):
            _without_draws(part, args)
        precompute = args.precompute_ref_log_probs and self.objective.needs_reference
        # taken before the weights are moved, wrapped or sharded
        fingerprint = self._fingerprint(model, reference) if precompute else ""

        self._start_settings = args
        train_data = self._tokenised(train_dataset, processing_class, "train", model)
        eval_data = self._tokenised_all(eval_dataset, processing_class, model)
        self.row_plan = self._plan_rows(train_data, eval_data, model, reference is not None)
        if not precompute:
            self._compile(model, reference)
        collator = PackingCollator(
            unrelated_responses=self.objective.needs_unrelated_responses,
            limits=limits_of(model).limits,
            **self.row_plan.collation,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # the loss is a mean over pairs, scaled for accumulation like any other
        self.model_accepts_loss_kwargs = False
        distribution.require_supported(self.accelerator, unwrap_model(model))
        self._in_step = distribution.runs_in_step(self.accelerator)
        # what users put in place of data_collator need not pack anything else
        self._packing = self.data_collator = replace(collator, with_idle_row=self._in_step)
        self.ref_model = None if reference is None else distribution.place_reference(reference, self.accelerator)
        self._guard = StepGuard(self.accelerator.unwrap_model(self.model), self.accelerator)
        self.add_callback(_GuardedStep(self._guard))
        if precompute:
            self._precompute(fingerprint)
            # rows of a whole dataset come in more lengths than those of a step
            self._compile(model)
        if args.prove:
            agrees = ref_model is None and self.objective.needs_reference
            self.add_callback(ProofAtStart(self, reference_is_policy=agrees))
        if args.sync_ref_model:
            self.add_callback(_SyncReference(self._reference_to_move()))

    # --- models ------------------------------------------------------------------------------------------------------

    def _compile(self, *parts: nn.Module | None) -> None:
        args = self._start_settings
        # one compiled layer for each length only where the plan keeps lengths few
        dynamic = self.row_plan.kernels.dynamic(args.device.type)
        for part in parts:
            if part is None or not args.compile_layers:
                continue
            if args.compiles_unasked and decoder_layers(part) is None:
                logger.warning(f"{type(part).__name__}: its decoder layers are not found, so they run uncompiled")
            else:
                compile_decoder_layers(part, **{**args.compile_options, "dynamic": dynamic})

    def _reference_for(
        self, model: nn.Module, ref_model: nn.Module | None, args: DPOConfig, tokenizer: PreTrainedTokenizerBase
    ) -> nn.Module | None:
        if not self.objective.needs_reference:
            if ref_model is not None:
                raise FlexdpoError(f"loss_type {', '.join(args.loss_type)} uses no reference; leave ref_model out")
            return None
        if ref_model is not None:
            model_loading.require_vocabulary(unwrap_model(ref_model), tokenizer, "reference model")
            prepare_model(ref_model, impl=self.impl)
            ref_model.requires_grad_(False)
            evaluated: nn.Module = ref_model.eval()
            return evaluated
        sharded = distribution.is_sharded(args)
        if adapters.is_peft_model(model):
            if sharded and args.precompute_ref_log_probs:
                raise FlexdpoError(
                    "precompute_ref_log_probs with an adapter would run the whole model in every process before it is "
                    "sharded; leave it out, an adapter's reference takes no memory"
                )
            return None
        if args.precompute_ref_log_probs and not sharded:
            # the policy itself is the reference before its first step
            return None
        return model_loading.frozen_copy(model)

    def reference_logps(self, row: Row) -> ResponseLogps:
        """Log-probabilities of the responses of a row under the reference, without gradients."""
        with torch.no_grad():
            if self.ref_model is not None:
                return response_logps(self.ref_model, row)
            if self._at_start is not None:
                with self._at_start():
                    return response_logps(self.model, row)
            if self.state.global_step > 0:
                raise FlexdpoError(
                    "the reference was not kept in memory (precompute_ref_log_probs=True) and the policy has been "
                    "trained since; give this dataset to the trainer as eval_dataset, or pass ref_model"
                )
            return response_logps(self.model, row)

    def _reference_to_move(self) -> nn.Module:
        if self.ref_model is None:
            raise FlexdpoError(
                "sync_ref_model needs a reference model of its own, and a model with an adapter has none; leave "
                "sync_ref_model or peft_config out"
            )
        reference: nn.Module = self.ref_model
        if any(hasattr(parameter, "ds_id") for parameter in reference.parameters()):
            raise FlexdpoError(
                "sync_ref_model cannot move a reference that ZeRO-3 has spread over the processes; use FSDP2 or ZeRO-2"
            )
        return reference

    def _fingerprint(self, model: nn.Module, reference: nn.Module | None) -> str:
        """The reference in a few letters; taken before its weights are moved, wrapped or sharded."""
        with self._at_start() if self._at_start is not None else contextlib.nullcontext():
            return model_fingerprint(reference if reference is not None else model)

    def _fingerprints_of(
        self, model: nn.Module, reference: nn.Module | None, args: DPOConfig, *, fresh: bool
    ) -> dict[str, str]:
        """What a checkpoint does not hold itself, for its record: settings, weights that stay, and the reference."""
        parts = [part for part in (model, reference) if part is not None]
        unknown = any(p.is_meta or hasattr(p, "ds_id") for part in parts for p in part.parameters())
        if unknown or args.process_index > 0:
            # the first process has the weights, and looks at the record for all
            return {}
        found = {
            "model settings": settings_fingerprint(model),
            "frozen weights": weights_sample(model, trainable=False),
        }
        if self.objective.needs_reference and not fresh:
            kept = model if reference is None else reference
            found["reference weights"] = weights_sample(kept, trainable=True)
        return found

    # --- data --------------------------------------------------------------------------------------------------------

    def _tokenised(
        self, dataset: Any, tokenizer: PreTrainedTokenizerBase, name: str, model: nn.Module
    ) -> Dataset | StreamedPreferences | None:
        if dataset is None:
            return None
        args = self._start_settings
        if is_stream(dataset):
            stream = StreamedPreferences.for_run(
                dataset,
                tokenizer,
                args,
                name=name,
                training=name == "train",
                max_positions=model_loading.position_limit(unwrap_model(model)),
                shuffle_buffer=args.stream_shuffle_buffer,
            )
            beginning = stream.preview(_PREVIEWED_ROWS)
            (logger.warning if beginning.skipped or beginning.notes else logger.info)(beginning.summary())
            return stream
        if args.stream_shuffle_buffer and name == "train":
            raise FlexdpoError(
                f"stream_shuffle_buffer={args.stream_shuffle_buffer} has no effect: the training data are no stream; "
                "a dataset in memory is shuffled as a whole"
            )
        # one process fills the cache that the others read
        with args.main_process_first(desc=f"tokenising {name}"):
            tokenised = tokenize_preferences(
                dataset,
                tokenizer,
                name=name,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                num_proc=args.dataset_num_proc,
            )
            data = regroup_by_prompt(tokenised.dataset) if args.regroup_prompts else tokenised.dataset
        report = tokenised.report
        # what was left out is said at a level that transformers shows by default
        (logger.warning if report.skipped or report.notes else logger.info)(report.summary())
        self.data_reports[name] = report
        model_loading.require_positions(unwrap_model(model), report.longest)
        budget = args.max_tokens_per_row
        unrelated = self.objective.needs_unrelated_responses
        if isinstance(budget, int):
            require_room(data, budget, args.room_multiple, unrelated_responses=unrelated)
        if unrelated:
            require_company(data, args, name)
        return data

    def _tokenised_all(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> Any:
        if isinstance(dataset, dict):
            return {name: self._tokenised(part, tokenizer, name, model) for name, part in dataset.items()}
        return self._tokenised(dataset, tokenizer, "eval", model)

    def _plan_rows(self, train_data: Any, eval_data: Any, model: nn.Module, reference: bool) -> RowPlan:
        args = self._start_settings
        datasets = [train_data, *(eval_data.values() if isinstance(eval_data, dict) else [eval_data])]
        sized = [data for data in datasets if hasattr(data, "num_rows")]
        longest, unrelated = 0, self.objective.needs_unrelated_responses
        if args.max_tokens_per_row == "auto":
            counts = [tokens_needed(data, unrelated_responses=unrelated) for data in sized]
            longest = max((int(count.max()) for count in counts), default=0)
        plan = RowPlan.of(args, unwrap_model(model), reference=reference, longest=longest)
        return plan.with_buckets(sized[0] if sized else None, args, unrelated_responses=unrelated)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*TOKENISED_COLUMNS, LABELS_COLUMN, REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Sample as ``Trainer`` does; an example's length is that of its responses behind a prompt each."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        name = self.args.length_column_name
        if self.args.train_sampling_strategy != "random" and name not in dataset.column_names:
            dataset = dataset.add_column(name, token_counts(dataset, shared=False))
        return super()._get_train_sampler(dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As ``Trainer``'s, with each step's pairs dealt out to the processes by what they cost."""
        if isinstance(self.train_dataset, StreamedPreferences):
            # auto_find_batch_size may have made it smaller
            self.train_dataset.batch_size = self._train_batch_size
        loader: DataLoader[Any] = super().get_train_dataloader()
        args = self.args
        wanted = args.balance_processes and args.world_size > 1 and self.objective.is_mean_over_pairs
        # which tokens stand together decides what balances them
        wanted = wanted and self._router is None
        if wanted and hasattr(self.train_dataset, "num_rows") and has_one_pair_each(self.train_dataset):
            hidden = unwrap_model(self.model).config.get_text_config().hidden_size
            balance(loader, predicted_costs(self.train_dataset, hidden), args.world_size)
        return loader

    def _precompute(self, fingerprint: str) -> None:
        was_training = self.model.training
        self.model.eval()

        def run(row: Row) -> ResponseLogps:
            with self.compute_loss_context_manager():
                return self.reference_logps(row)

        tokenizer = tokenizer_digest(self.processing_class)
        budget, limits = self.row_plan.max_tokens_per_row, limits_of(self.model).limits
        work = Precompute(self.args, self.accelerator, run, fingerprint, tokenizer, budget, limits)
        # rows of a whole dataset come in all lengths
        with kernel_settings_as(self.row_plan.kernels_of_any_length):
            self.train_dataset = work.add_columns(self.train_dataset, "train")
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: work.add_columns(part, name) for name, part in self.eval_dataset.items()}
            else:
                self.eval_dataset = work.add_columns(self.eval_dataset, "eval")
        self.model.train(was_training)
        self.ref_model = None

    # --- the step ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As ``Trainer``'s; a mean over tokens is one over the tokens of all batches of the step."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self.objective.averages_tokens and samples:
            tokens = sum(sample["batch"].totals.supervised_tokens for sample in samples) / len(samples)
            for sample in samples:
                totals = replace(sample["batch"].totals, supervised_tokens=tokens)
                sample["batch"] = replace(sample["batch"], totals=totals)
        return samples, items

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
        # a step that is interrupted leaves nothing of itself to the next one
        with self._guard.all_or_nothing():
            return self._run_batch(model, self._on_device(inputs))

    def _run_batch(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        scale = 1.0 / self.current_gradient_accumulation_steps
        options = distribution.backward_options(self.accelerator)

        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss * scale, **options)

        runner = replace(
            self._runner(model),
            backward=backward,
            no_sync=lambda: distribution.held_gradients(self.accelerator, model),
        )
        with kernel_settings_as(self.row_plan.kernels):
            result = runner(batch)
        self._guard.add(runner, batch, result)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        self.tokens["run"] += batch.tokens_run
        self.tokens["unshared"] += batch.tokens_unshared
        self._metrics["train"].add(result.metrics)
        step_loss: Tensor = (result.loss * scale).to(torch.float32)
        return step_loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm that ``Trainer`` logs, asked for before every step of the optimizer; here it is looked at too."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._guard.require_finite(norm, where=f"step {self.state.global_step + 1}")
        return norm

    def _on_device(self, inputs: dict[str, Any]) -> PackedBatch:
        batch: PackedBatch = self._prepare_inputs(inputs)["batch"]
        # the copies need not wait for each other: the data loader pinned their memory
        return batch.to(self.args.device, non_blocking=True)

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
        with kernel_settings_as(self.row_plan.kernels):
            return self._runner(model)(self._on_device(inputs)).loss

    def _runner(self, model: nn.Module) -> Runner:
        return Runner(
            model,
            self.objective,
            reference=self.reference_logps,
            autocast=self.compute_loss_context_manager,
            average=lambda value: self.accelerator.reduce(value, reduction="mean"),
            router=self._router,
            agree=(lambda rows: distribution.largest(self.accelerator, rows)) if self._in_step else None,
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: ARG002
        ignore_keys: list[str] | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, None, None]:
        """Compute the loss and the metrics of an evaluation batch."""
        distinct = self._distinct_examples(inputs["example_rows"])
        # a process that has only repeats runs them along with the others and counts none
        repeats = not any(distinct)
        if not repeats and not all(distinct):
            inputs = {**inputs, "batch": self._packing.packed(*inputs["batch"].only(distinct))}
        batch = self._on_device(inputs)
        # the lengths were chosen for the batches of training
        with torch.no_grad(), kernel_settings_as(self.row_plan.kernels_of_any_length):
            result: BatchLoss = self._runner(model)(batch)
        if not repeats:
            self._metrics["eval"].add(result.metrics)
        self._eval_loss = self._eval_loss + torch.stack(
            [result.loss.double() * sum(distinct), result.loss.new_full((), sum(distinct), dtype=torch.float64)]
        )
        return result.loss.to(torch.float32), None, None

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
            require_same_schedule(Path(resume_from_checkpoint), self.args)
            if self.args.sync_ref_model:
                load_reference(Path(resume_from_checkpoint), self._reference_to_move(), self.args.process_index)
            # what the run had counted goes on in one process; the log adds them up
            if self.args.process_index == 0:
                self.tokens |= tokens_of(Path(resume_from_checkpoint))
        stream = self.train_dataset if isinstance(self.train_dataset, StreamedPreferences) else None
        if stream is not None:
            done = steps_of(Path(resume_from_checkpoint)) if resume_from_checkpoint else 0
            stream.closed = done >= self.args.max_steps
        writes = self.args.should_save and self.args.save_strategy != "no"
        with (
            holding_output(Path(str(self.args.output_dir)), is_owner=writes),
            plain_worker_errors(self.args.dataloader_num_workers),
        ):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if stream is not None:
            self.data_reports["train"] = stream.report
            logger.warning(stream.report.summary())
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch as ``Trainer`` does, but none beyond the last step.

        ``Trainer`` looks at the number of steps only after each, so a run that is continued at its end would go on.
        """
        if self.state.global_step >= self.state.max_steps:
            logger.warning(
                f"the checkpoint has all {self.state.max_steps} steps of this run, so there is nothing left to do"
            )
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as ``Trainer`` does; under FSDP the finished model is saved whole, however its checkpoints are."""
        if not _internal_call:
            require_finite_weights(self._guard.model, self.accelerator, "the model")
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        kept = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(kept)

    def _run_record(self) -> dict[str, Any]:
        if self._record is None:
            data = self.train_dataset
            if isinstance(data, StreamedPreferences):
                # its beginning must do
                data = data.sample(256)
            self._record = run_record(self.args, data_digest(data, TOKENISED_COLUMNS), self._fingerprints)
        return self._record

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as ``Trainer`` does, mark the checkpoint as complete, and only then let older ones go."""
        output_dir = self._get_output_dir(trial=trial)
        folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        require_finite_weights(self._guard.model, self.accelerator, f"the checkpoint {folder}")
        tokens = self.total_tokens()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with writing_checkpoint(folder, is_writer=self.args.should_save):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            if self.args.sync_ref_model:
                save_reference(folder, self._reference_to_move(), self.args.process_index)
            # the record vouches for what all processes have written
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                # the one written before lacks the limit
                torch.save(self.args, folder / TRAINING_ARGS_NAME)
                proof = None if self.proof is None else self.proof.figures()
                vouched = {"tokens": tokens, "files": file_record(folder), "proof": proof}
                write_record(folder, {**self._run_record(), **vouched})
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _distinct_examples(self, example_rows: Tensor) -> list[bool]:
        """Which examples of an evaluation batch count: all but repeats that fill up the last batch of some ranks."""
        state = self.accelerator.gradient_state
        if (example_rows < 0).any():
            # a stream marks its repeats itself, for nobody knows its length
            return [row >= 0 for row in example_rows.tolist()]
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return [True] * len(example_rows)
        distinct = state.remainder - self.args.process_index * self.args.eval_batch_size
        return [example < distinct for example in range(len(example_rows))]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the training metrics added to the lines that carry a training loss."""
        if "loss" in logs:
            logs.update(self._metrics["train"].collect(self.accelerator))
            logs.update({f"tokens/{name}": count for name, count in self.total_tokens().items()})
        super().log(logs, start_time)

    def total_tokens(self) -> dict[str, int]:
        """Tokens of the run so far, over all processes, each of which must call this."""
        counts = torch.tensor(list(self.tokens.values()), device=self.args.device)
        totals = self.accelerator.reduce(counts, reduction="sum").tolist()
        return dict(zip(self.tokens, map(int, totals), strict=True))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as ``Trainer`` does, with the preference metrics added."""
        self._metrics["eval"].clear()
        self._eval_loss = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with plain_worker_errors(self.args.dataloader_num_workers):
            output: EvalLoopOutput = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self._metrics["eval"].collect(self.accelerator)
        if self.args.world_size > 1:
            # transformers' own counts what fills up the last batches
            total, examples = self.accelerator.reduce(self._eval_loss, reduction="sum").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(examples, 1)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
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


class _GuardedStep(TrainerCallback):
    """Holds ``Trainer`` to its word that the gradient's norm is asked for before the optimizer steps."""

    def __init__(self, guard: StepGuard) -> None:
        self.guard = guard

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.guard.ran:
            raise RuntimeError(
                "transformers' Trainer did not ask for the gradient's norm before the optimizer's step, so it was not "
                "looked at; this version of transformers is not supported"
            )


def _without_draws(model: nn.Module | None, args: DPOConfig) -> None:
    """Set what makes a model draw random numbers to 0, or refuse it, as the settings say."""
    if model is not None and args.disable_dropout:
        disable_dropout(model)
    elif model is not None:
        require_no_draws(model, "disable_dropout=False")


class _SyncReference(TrainerCallback):
    """TR-DPO: moves the reference towards the policy every ``ref_model_sync_steps`` optimizer steps."""

    def __init__(self, reference: nn.Module) -> None:
        self.reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        if state.global_step % args.ref_model_sync_steps == 0:
            mix_into_reference(self.reference, model, args.ref_model_mixup_alpha)
