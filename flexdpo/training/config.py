"""The settings of a preference-training run, under TRL's and transformers' names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from flexdpo.attention.row_mask import resolve_impl
from flexdpo.errors import FlexdpoError
from flexdpo.objective.losses import LOSS_TYPES, Objective

TRUNCATION_MODES = ("keep_start",)


@dataclass
class DPOConfig(TrainingArguments):
    """Settings of :class:`~flexdpo.training.trainer.DPOTrainer`; a field that TRL has means what it means there.

    All fields of ``transformers.TrainingArguments`` are taken too. ``per_device_train_batch_size`` counts pairs.
    Different from ``TrainingArguments``: ``learning_rate`` is 1e-6, ``logging_steps`` 10, and ``bf16`` is on by default
    where the GPU has it.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of the optimizer."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every this many optimizer steps; below 1, a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN losses out of the log; training stops at the first one anyway."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 mixed precision; by default on where the GPU has it and fp16 is off."},
    )

    beta: float = field(
        default=0.1,
        metadata={"help": "Strength of the pull towards the reference model; higher stays closer to it."},
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"Losses to add up: {', '.join(LOSS_TYPES)}."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per loss; 1 for each by default."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Probability that a preference is labelled the wrong way round (cDPO), below 0.5."},
    )

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt plus response in tokens; what is longer is cut on the right."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "How to cut: keep_start keeps the beginning, so that prompts stay equal."},
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the dataset."})

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments for AutoModelForCausalLM.from_pretrained, as JSON, when the model is a name."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let models and tokenizers from the hub run their own code."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Turn dropout off in the policy and the reference model; shared tokens cannot have it."},
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference model's log-probabilities once before training and drop the model."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs per forward pass while precomputing; by default the training batch size."},
    )

    max_tokens_per_row: int | None = field(
        default=None,
        metadata={
            "help": "Longest packed row in tokens. The pairs of a batch are split into as many rows as this needs; "
            "what is learned stays the same. By default a batch is one row."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Pad rows to a multiple of this many tokens; by default 128 on a GPU and none on a CPU."},
    )
    attn_impl: str = field(
        default="auto",
        metadata={"help": "Attention kernel: auto, flex (compiled FlexAttention) or sdpa (chunks of queries)."},
    )

    def __post_init__(self) -> None:
        loss_type: list[str] | str = self.loss_type
        self.loss_type = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        self.objective()
        resolve_impl(self.attn_impl, torch.device("cpu"))
        if self.truncation_mode not in TRUNCATION_MODES:
            raise FlexdpoError(
                f"truncation_mode={self.truncation_mode!r} is not supported: cutting on the left cuts every response's "
                "copy of the prompt at another place, so nothing would be shared; use 'keep_start'"
            )
        for name in ("max_length", "max_tokens_per_row", "pad_to_multiple_of", "precompute_ref_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FlexdpoError(f"{name} must be at least 1, got {value}; leave it out for no limit")
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.fp16
        super().__post_init__()

    def objective(self) -> Objective:
        """The losses these settings ask for."""
        weights = None if self.loss_weights is None else tuple(self.loss_weights)
        return Objective(tuple(self.loss_type), weights, self.beta, self.label_smoothing)

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this many tokens."""
        if self.pad_to_multiple_of is not None:
            return self.pad_to_multiple_of
        # whole tiles let FlexAttention skip its bounds checks; the CPU path has no tiles
        return 128 if self.device.type == "cuda" else 1
