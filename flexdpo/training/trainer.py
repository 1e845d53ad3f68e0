"""``DPOTrainer``: transformers' ``Trainer`` on shared, packed rows, with TRL's names for the same things."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from flexdpo.attention.settings import kernel_settings_as
from flexdpo.config import DPOConfig
from flexdpo.data.balance import balance
from flexdpo.data.images import processing_digest, tokenizer_of
from flexdpo.data.lengths import has_one_pair_each, predicted_costs, token_counts
from flexdpo.data.pictures import holds_images
from flexdpo.data.workers import plain_worker_errors
from flexdpo.errors import FlexdpoError, found, quoted
from flexdpo.hf.compilation import compile_decoder_layers, decoder_layers
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.randomness import disable_dropout, require_no_draws
from flexdpo.hf.row_dependence import limits_of
from flexdpo.hf.unwrap import unwrap_model
from flexdpo.objective.logps import response_logps
from flexdpo.objective.router import RouterLoss
from flexdpo.reference.cache import ReferenceIdentity
from flexdpo.reference.fingerprints import model_fingerprint
from flexdpo.training import adapters, distribution, model_loading
from flexdpo.training.batch import COLUMNS, PackedBatch, PackingCollator, distinct_examples
from flexdpo.training.finite import Ran, StepGuard
from flexdpo.training.resumable import LOGGED, ResumableTrainer
from flexdpo.training.run_data import RunData, may_run_in_pieces
from flexdpo.training.run_reference import SyncReference, fingerprints, reference_model, with_reference
from flexdpo.training.start_proof import ProofAtStart
from flexdpo.training.step import BatchLoss, MeanMetrics, Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from datasets import Dataset
    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from transformers.trainer_utils import EvalLoopOutput

    from flexdpo.layout.row import Row
    from flexdpo.objective.logps import ResponseLogps

logger = logging.get_logger(__name__)


class DPOTrainer(ResumableTrainer):
    """Trains a causal LM on preferences; every distinct token of a group runs once, and groups share packed rows.

    The pairs of each optimizer step are those that transformers' ``Trainer`` would take with the same settings.
    ``ref_model`` is by default a frozen copy of the model, or the model without its adapter. Datasets, to evaluate on
    also a dict of them, hold preferences as text or messages, tokenised or not, or are a stream of them.
    ``processing_class`` is the tokenizer, or the processor for data with images; by default from the model's name.

    Raises ``FlexdpoError`` if the data, the settings or the model cannot be used; the message says what to change.
    """

    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        model: Any,
        ref_model: nn.Module | None = None,
        args: DPOConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        compute_metrics: Any = None,
    ) -> None:
        if compute_metrics is not None:
            raise FlexdpoError("compute_metrics needs full logits, which are never computed; read the logged metrics")
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        if isinstance(ref_model, str | os.PathLike):
            raise FlexdpoError(
                f"ref_model must be a loaded model, got {found(ref_model)}; load it with "
                'AutoModelForCausalLM.from_pretrained(..., attn_implementation="flexdpo")'
            )
        if ref_model is not None and ref_model is model:
            raise FlexdpoError("model and ref_model are the same object; leave ref_model out to get a frozen copy")
        args = DPOConfig(f"{model_loading.model_name(model)}-DPO") if args is None else args
        if not isinstance(args, DPOConfig):
            raise FlexdpoError(
                f"args must be a flexdpo.DPOConfig, got {type(args).__module__}.{type(args).__name__}; make one with "
                "the same settings, whose names are TRL's"
            )
        self.objective = args.objective()
        # adapters draw their first weights from this seed
        set_seed(args.seed)
        images = holds_images([train_dataset, eval_dataset])
        model, processing_class = model_loading.load_parts(model, processing_class, args, images=images)
        model, reference = self._prepare_models(model, ref_model, peft_config, tokenizer_of(processing_class), args)
        limit = model_loading.position_limit(unwrap_model(model))
        in_pieces = may_run_in_pieces(args, model, router=self._router is not None)
        unrelated, limits = self.objective.needs_unrelated_responses, limits_of(model).limits
        data = RunData(args, processing_class, limit, unrelated, limits, in_pieces)
        train_data, eval_data = data.tokenised(train_dataset, "train"), data.tokenised(eval_dataset, "eval")
        self._data, self.data_reports = data, data.reports
        self.row_plan = data.row_plan(train_data, eval_data, unwrap_model(model), reference=reference is not None)
        precompute = args.precompute_ref_log_probs and self.objective.needs_reference
        if not precompute:
            self._compile(args, model, reference)
        collator = PackingCollator(
            unrelated_responses=unrelated, limits=limits, images=data.images, **self.row_plan.collation
        )
        try:
            super().__init__(
                model=model, args=args, data_collator=collator, train_dataset=train_data, eval_dataset=eval_data,
                processing_class=processing_class, callbacks=callbacks, optimizers=optimizers,
            )  # fmt: skip
        except FlexdpoError:
            raise
        except (ValueError, ImportError) as error:  # settings that do not go together, packages that are missing
            raise FlexdpoError(f"transformers refuses these settings: {' '.join(str(error).split())}") from error
        if self.optimizer is not None:
            adapters.require_moving(self.optimizer, self.model, sharded=False)
        self._prepare_step(reference)
        if precompute:
            self._precompute()
            # rows of a whole dataset come in more lengths than those of a step
            self._compile(args, model)
        if args.prove:
            agrees = ref_model is None and self.objective.needs_reference
            self.add_callback(ProofAtStart(self, reference_is_policy=agrees))
        if args.sync_ref_model:
            self.add_callback(SyncReference(self.ref_model))

    def _prepare_models(
        self, model: Any, ref_model: nn.Module | None, peft_config: Any, tokenizer: Any, args: DPOConfig
    ) -> tuple[Any, nn.Module | None]:
        """The policy and its reference, exact on packed rows and drawing nothing at random, and what they began as."""
        if peft_config is not None:
            model = adapters.add_adapter(model, peft_config)
        adapters.require_trainable(model)
        prepare_model(model, impl=args.attn_impl)  # type: ignore[arg-type]
        self._router = RouterLoss.of(model, args.router_aux_loss_coef)
        reference = reference_model(model, ref_model, args, tokenizer)
        # what an adapter's policy was before its first step takes no second model
        self._at_start: adapters.AtStart | None = None
        if reference is None and self.objective.needs_reference and adapters.is_peft_model(model):
            self._at_start = adapters.at_start_of(model, fresh=peft_config is not None)
        # taken before the weights are moved, wrapped or sharded
        self._fingerprints = fingerprints(model, reference, args, fresh=peft_config is not None)
        for part in (model, reference):
            if part is not None and args.disable_dropout:
                disable_dropout(part)
            elif part is not None:
                require_no_draws(part, "disable_dropout=False")
        if args.precompute_ref_log_probs and self.objective.needs_reference:
            with self._at_start() if self._at_start is not None else contextlib.nullcontext():
                self._reference_fingerprint = model_fingerprint(model if reference is None else reference)
        return model, reference

    def _compile(self, args: DPOConfig, *parts: nn.Module | None) -> None:
        # one compiled layer for each length only where the plan keeps lengths few
        dynamic = self.row_plan.kernels.dynamic(args.device.type)
        for part in parts:
            if part is None or not args.compile_layers:
                continue
            if args.compiles_unasked and decoder_layers(part) is None:
                logger.warning(f"{type(part).__name__}: its decoder layers are not found, so they run uncompiled")
            else:
                compile_decoder_layers(part, dynamic=dynamic, **args.layer_compile_options)

    def _prepare_step(self, reference: nn.Module | None) -> None:
        """Take the step over from ``Trainer``, which knows by now how many processes run it."""
        # accelerate would take torch's seed as it stands when training begins, which a continued run may have otherwise
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.accelerator.dataloader_config.data_seed = seed
        # the loss is a mean over pairs, scaled for accumulation like any other
        self.model_accepts_loss_kwargs = False
        distribution.require_supported(self.accelerator, unwrap_model(self.model), images=bool(self._data.images))
        self._across_processes = distribution.hooks_of(self.accelerator)
        # what users put in place of data_collator need not pack anything else
        self._packing = self.data_collator = replace(
            self.data_collator, with_idle_row=distribution.runs_in_step(self.accelerator)
        )
        self.ref_model = None if reference is None else distribution.place_reference(reference, self.accelerator)
        self._guard = StepGuard(self.accelerator.unwrap_model(self.model), self.accelerator)
        self.add_callback(self._guard)
        self._flops_per_token = 6 * int(unwrap_model(self.model).num_parameters(exclude_embeddings=True))
        self.tokens = dict.fromkeys(["run", "unshared"] if self._data.images is None else LOGGED, 0)
        self._metrics = {"train": MeanMetrics(), "eval": MeanMetrics()}
        # sum of the losses of the examples that were evaluated, and their number
        self._eval_loss = torch.zeros(2, dtype=torch.float64)

    def _precompute(self) -> None:
        # values of another precision are other values; lengths need not be named, for tokens name themselves
        precision = (("mixed_precision", str(self.accelerator.mixed_precision)),)
        digest = processing_digest(self.processing_class)
        self.reference_identity = ReferenceIdentity(self._reference_fingerprint, digest, precision)
        was_training = self.model.training
        self.model.eval()
        # rows of a whole dataset come in all lengths
        with kernel_settings_as(self.row_plan.kernels_of_any_length):
            self.train_dataset = with_reference(self, self.train_dataset, "train")
            self.eval_dataset = with_reference(self, self.eval_dataset, "eval")
        self.model.train(was_training)
        self.ref_model = None

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

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Sample as ``Trainer`` does; an example's length is that of its responses behind a prompt each."""
        dataset, name = self.train_dataset if train_dataset is None else train_dataset, self.args.length_column_name
        if self.args.train_sampling_strategy != "random" and name not in dataset.column_names:
            dataset = dataset.add_column(name, token_counts(dataset, shared=False))
        return super()._get_train_sampler(dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As ``Trainer``'s, with each step's pairs assigned to the processes by what they cost."""
        if self._stream is not None:
            # auto_find_batch_size may have made it smaller
            self._stream.batch_size = self._train_batch_size
        loader: DataLoader[Any] = super().get_train_dataloader()
        args = self.args
        wanted = args.balance_processes and args.world_size > 1 and self.objective.is_mean_over_pairs
        # which tokens stand together decides what balances them
        wanted = wanted and self._router is None
        if wanted and hasattr(self.train_dataset, "num_rows") and has_one_pair_each(self.train_dataset):
            hidden = unwrap_model(self.model).config.get_text_config().hidden_size
            costs = predicted_costs(self.train_dataset, hidden, limits_of(self.model).limits)
            balance(loader, costs, args.world_size, args.gradient_accumulation_steps)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As ``Trainer``'s; a mean over tokens is one over the tokens of all batches of the step."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self.objective.averages_tokens and samples:
            tokens = sum(sample["batch"].totals.supervised_tokens for sample in samples) / len(samples)
            for sample in samples:
                totals = replace(sample["batch"].totals, supervised_tokens=tokens)
                sample["batch"] = replace(sample["batch"], totals=totals)
        return samples, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Run one batch of pairs: its rows one after another, gradients accumulated to the unpacked batch's."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        scale = 1.0 / self.current_gradient_accumulation_steps
        # DeepSpeed would scale for accumulation once more, and so does accelerate where transformers 5.3 tells it of it
        scaled = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}

        def backward(loss: Tensor) -> None:
            again = 1 if scaled else self.accelerator.gradient_accumulation_steps
            self.accelerator.backward(loss * scale * again, **scaled)

        # a step that is interrupted leaves nothing of itself to the next one
        with self._guard.all_or_nothing(), kernel_settings_as(self.row_plan.kernels):
            batch = self._on_device(inputs)
            runner = self._runner(model, backward)
            result = runner(batch)
            self._guard.ran.append(Ran(runner, batch, result))
            every = self.args.torch_empty_cache_steps
            if every is not None and self.state.global_step % every == 0:
                clear_device_cache()
            for name in self.tokens:
                self.tokens[name] += getattr(batch, LOGGED[name].replace("/", "_"))
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

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Compute the loss of a batch without a backward pass."""
        if return_outputs:
            raise FlexdpoError("a packed batch has no outputs per example; use return_outputs=False")
        with kernel_settings_as(self.row_plan.kernels):
            return self._runner(model)(self._on_device(inputs)).loss

    def _runner(self, model: nn.Module, backward: Callable[[Tensor], None] | None = None) -> Runner:
        settings = {"autocast": self.compute_loss_context_manager, "router": self._router, "backward": backward}
        return Runner(model, self.objective, self.reference_logps, **{**self._across_processes, **settings})

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Compute the loss and the metrics of an evaluation batch."""
        distinct = distinct_examples(inputs["example_rows"], self.args, self.accelerator)
        # a process that has only repeats runs them along with the others and counts none
        if 0 < len(distinct) < len(inputs["example_rows"]):
            inputs = {**inputs, "batch": self._packing.packed(*inputs["batch"].only(distinct))}
        batch = self._on_device(inputs)
        # the lengths were chosen for the batches of training
        with torch.no_grad(), kernel_settings_as(self.row_plan.kernels_of_any_length):
            result: BatchLoss = self._runner(model)(batch)
        if distinct:
            self._metrics["eval"].add(result.metrics)
        count = result.loss.new_full((), len(distinct), dtype=torch.float64)
        self._eval_loss = self._eval_loss + torch.stack([result.loss * count, count])
        return result.loss.to(torch.float32), None, None

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Of a training step on the tokens that really run, 6 per token and parameter."""
        return int(inputs["batch"].tokens_run) * self._flops_per_token

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the training metrics added to the lines that carry a training loss."""
        if "loss" in logs:
            logs.update(self._metrics["train"].collect(self.accelerator))
            logs.update({LOGGED[name]: count for name, count in self.total_tokens().items()})
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as ``Trainer`` does, with the preference metrics added."""
        self._metrics["eval"] = MeanMetrics()
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

    def predict(self, *_: Any, **__: Any) -> Any:
        """Raise: there are no predictions."""
        raise FlexdpoError("a packed batch has no predictions, only a loss and metrics; call evaluate")

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on ``eval_dataset``, tokenised or not, or on the one given to the trainer."""
        known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(eval_dataset, str) and eval_dataset not in known:
            raise FlexdpoError(f"no eval_dataset is called {eval_dataset!r}, found {quoted(known)}; name one of them")
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._data.tokenised(eval_dataset, "eval")
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics
