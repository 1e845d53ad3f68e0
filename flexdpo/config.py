"""The settings of a preference-training run, under TRL's and transformers' names."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from flexdpo.attention.row_mask import resolve_impl
from flexdpo.attention.settings import KernelSettings
from flexdpo.errors import FlexdpoError, nearest
from flexdpo.hf.checkpointing import checkpointing_name
from flexdpo.layout.packing import SHARING
from flexdpo.layout.row import TILE, tile_multiple
from flexdpo.objective.divergences import F_DIVERGENCES
from flexdpo.objective.loss_types import LOSS_TYPES
from flexdpo.objective.objective import Objective

TRUNCATION_MODES = ("keep_start",)
_COMPILE_SETTINGS = {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}
_OBJECTIVE_SETTINGS = (
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
)


@dataclass
class DPOConfig(TrainingArguments):
    """Settings of :class:`~flexdpo.training.trainer.DPOTrainer`; a field that TRL has means what it means there.

    All fields of ``transformers.TrainingArguments`` are taken too. ``per_device_train_batch_size`` counts pairs.
    Different from ``TrainingArguments``: ``learning_rate`` is 1e-6, ``logging_steps`` 10, ``bf16`` is on by default
    where the GPU has it, and ``torch_compile`` compiles decoder layers one by one, never the whole model.

    Attributes:
        compile_layers: Whether ``torch_compile``, ``torch_compile_backend`` or ``torch_compile_mode`` was given. These
            are emptied then, since transformers would compile the whole model for any of them.
        layer_compile_options: The backend and mode that were given.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "attn_kernel_options",
    ]

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

    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Run layers again in the backward pass.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of torch.utils.checkpoint.checkpoint."}
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

    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": f"What holds the policy near its reference: {', '.join(F_DIVERGENCES)}."},
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Alpha of the alpha_divergence."})
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "LD-DPO: weight of a pair's tokens beyond the length of its shorter response, 0 to 1."},
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: weight pairs by how likely the policy is to produce them."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the discopop loss."})
    rpo_alpha: float | None = field(
        default=None, metadata={"help": "RPO: weight of the chosen response's mean negative log-likelihood."}
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "Margin of the simpo loss."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the likelihood term of the cpo loss."})
    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of desirable responses in the kto loss."})
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of undesirable responses in the kto loss."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture of experts; by default the model config's own, 0 "
            "leaves it out."
        },
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "TR-DPO: let the reference model follow the policy every few steps."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "TR-DPO: share of the policy in the new reference, 0 to 1; 1 copies it."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "TR-DPO: optimizer steps between two updates."})

    regroup_prompts: bool = field(
        default=False,
        metadata={
            "help": "Merge rows with the same prompt into one group with all their preferences; a batch then counts "
            "groups."
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt plus response in tokens; what is longer is cut on the right."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "How to cut: keep_start keeps the beginning, so that prompts stay equal."},
    )
    stream_shuffle_buffer: int = field(
        default=0,
        metadata={
            "help": "Shuffle a streamed dataset through a buffer of this many rows; 0 takes it in its own order."
        },
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
        metadata={
            "help": "Set every rate of dropout and noise to 0 in the policy and the reference model. With false, a "
            "model that has one is refused: shared tokens cannot be dropped differently for each response."
        },
    )
    prove: bool = field(
        default=True,
        metadata={
            "help": "Before the first step, compare the run's first examples packed against one by one through the "
            "stock attention, and stop where they differ by more than rounding explains."
        },
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference model's log-probabilities once before training and drop the model."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs per forward pass while precomputing; by default the training batch size."},
    )

    precompute_ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where precomputed log-probabilities are kept for interrupted and later runs; by default "
            "FLEXDPO_CACHE or a folder beside the hub's cache."
        },
    )

    max_tokens_per_row: int | str | None = field(
        default=None,
        metadata={
            "help": "Longest packed row in tokens, or 'auto' for the longest that fits into the free memory. The pairs "
            "of a batch are split into as many rows as this needs; what is learned stays the same. By default a batch "
            "is one row."
        },
    )
    sharing: str = field(
        default="group",
        metadata={
            "help": "What shares tokens: the responses of a 'group', or also groups of the same 'step' whose prompts "
            "begin with the same 128 tokens or more (a long system prompt, few-shot examples)."
        },
    )
    balance_processes: bool = field(
        default=True,
        metadata={
            "help": "With several processes, deal the pairs of each step out so that all take about equally long. The "
            "step keeps its pairs; losses that are no mean over pairs are left as they are."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Pad rows to a multiple of this many tokens; by default 128 on a GPU and none on a CPU."},
    )
    attn_impl: str = field(
        default="auto",
        metadata={
            "help": "Attention kernel: auto, flex (compiled FlexAttention), varlen (FlashAttention along root paths, "
            "in half precision on a GPU, for models without softcap, sinks and chunks) or sdpa (chunks of queries)."
        },
    )
    attn_kernel_lengths: str = field(
        default="auto",
        metadata={
            "help": "FlexAttention kernels: 'bucket' pads rows to a few lengths and compiles a kernel for each, "
            "'dynamic' compiles one for all lengths, 'auto' takes buckets on a GPU where up to 4 waste under 3 percent."
        },
    )
    attn_kernel_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'kernel_options of flex_attention as JSON, such as {"BLOCK_M": 64, "BLOCK_N": 64}; '
            '{"BACKEND": "FLASH"} is FlashAttention-4, used only after its gradients passed a test.'
        },
    )
    attn_self_test: bool = field(
        default=True,
        metadata={"help": "On a GPU, compare each kernel's gradients with dense attention at its first row."},
    )

    torch_compile: bool | None = field(
        default=None,
        metadata={
            "help": "Compile decoder layers one by one. By default on a GPU, without DeepSpeed, where the model's "
            "layers are found; never on a CPU unless asked."
        },
    )

    compile_layers: bool = field(init=False, default=False)
    compiles_unasked: bool = field(init=False, default=False)
    layer_compile_options: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        loss_type: list[str] | str = self.loss_type
        self.loss_type = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        self._check_reference(self.objective())
        self._check_effects()
        resolve_impl(self.attn_impl, torch.device("cpu"))
        if self.truncation_mode not in TRUNCATION_MODES:
            raise FlexdpoError(
                f"truncation_mode={self.truncation_mode!r} is not supported: cutting on the left cuts every response's "
                "copy of the prompt at another place, so nothing would be shared; use 'keep_start'"
            )
        self._check_rows()
        if self.neftune_noise_alpha is not None:
            raise FlexdpoError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} adds noise to every embedding, and a token that "
                "several responses share cannot have different noise for each; leave it out"
            )
        # as a YAML file or the command line gives it
        self.fsdp: Any = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.fp16
        asked = {name: getattr(self, name) for name in _COMPILE_SETTINGS}
        copies_unsaid = self.accelerator_config is None
        for name, nothing in _COMPILE_SETTINGS.items():
            setattr(self, name, nothing)
        # transformers before 5.23 knows the older names only
        known = checkpointing_name(TrainingArguments)
        for suffix in ("", "_kwargs"):
            if getattr(self, f"activation_checkpointing{suffix}") is not None:
                setattr(self, known + suffix, getattr(self, f"activation_checkpointing{suffix}"))
        super().__post_init__()
        for suffix in ("", "_kwargs"):
            setattr(self, f"activation_checkpointing{suffix}", getattr(self, known + suffix))
        wanted = asked.pop("torch_compile")
        given = any(value is not None for value in asked.values())
        if wanted is False and given:
            raise FlexdpoError("torch_compile=False leaves torch_compile_backend and torch_compile_mode without effect")
        self.compiles_unasked = wanted is None and not given and self.device.type == "cuda" and not self.deepspeed
        self.compile_layers = bool(wanted) or given or self.compiles_unasked
        options = {name.removeprefix("torch_compile_"): value for name, value in asked.items()}
        self.layer_compile_options = {name: value for name, value in options.items() if value is not None}
        if copies_unsaid:
            # a row is a dozen small tensors, each of which would otherwise wait for the step before it
            self.accelerator_config.non_blocking = self.dataloader_pin_memory

    def to_dict(self) -> dict[str, Any]:
        """As ``TrainingArguments.to_dict``, with the compile settings as they were given, so that they can be read."""
        found: dict[str, Any] = super().to_dict()
        options = {f"torch_compile_{name}": value for name, value in self.layer_compile_options.items()}
        return found | {"torch_compile": self.compile_layers, **options}

    def objective(self) -> Objective:
        """The losses these settings ask for."""
        settings = {name: getattr(self, name) for name in _OBJECTIVE_SETTINGS}
        weights = None if self.loss_weights is None else tuple(self.loss_weights)
        return Objective(tuple(self.loss_type), weights, **settings)

    def _check_effects(self) -> None:
        """Refuse what transformers' own step would act on and this trainer's does not."""
        asked = {
            "label_smoothing_factor": (
                bool(self.label_smoothing_factor),
                "it is for a language model's own loss; set label_smoothing, the probability of a wrong preference",
            ),
            "include_num_input_tokens_seen": (
                str(self.include_num_input_tokens_seen).lower() not in ("no", "false"),
                "it counts padded batches, which do not exist; the log has tokens/run and tokens/unshared",
            ),
            "include_for_metrics": (
                bool(self.include_for_metrics),
                "it feeds compute_metrics, which gets no logits here",
            ),
            "batch_eval_metrics": (self.batch_eval_metrics, "it feeds compute_metrics, which gets no logits here"),
            "average_tokens_across_devices": (
                not self.average_tokens_across_devices,
                "a mean over tokens is always one over those of all processes; leave it at True",
            ),
            "optim": (
                "lomo" in str(self.optim),
                "it takes its step inside the backward pass, of which a step of several rows has several",
            ),
        }
        for name, (given, reason) in asked.items():
            if given:
                raise FlexdpoError(f"{name}={getattr(self, name)!r} would have no effect: {reason}")

    def _check_rows(self) -> None:
        budget = self.max_tokens_per_row
        if isinstance(budget, str) and budget != "auto":
            if not budget.isdecimal():
                raise FlexdpoError(f"max_tokens_per_row must be a number of tokens or 'auto', got {budget!r}")
            self.max_tokens_per_row = int(budget)
        for name in ("max_length", "max_tokens_per_row", "pad_to_multiple_of", "precompute_ref_batch_size"):
            value = getattr(self, name)
            if value is not None and value != "auto" and value < 1:
                raise FlexdpoError(f"{name} must be at least 1, got {value}; leave it out for no limit")
        if self.sharing not in SHARING:
            hint = nearest(self.sharing, SHARING)
            raise FlexdpoError(f"sharing must be one of {SHARING}, got {self.sharing!r}{hint}")
        if isinstance(self.attn_kernel_options, str):
            try:
                self.attn_kernel_options = json.loads(self.attn_kernel_options)
            except json.JSONDecodeError as error:
                raise FlexdpoError(
                    f"attn_kernel_options must be JSON, got {self.attn_kernel_options!r} ({error.msg})"
                ) from error
        # what is unknown is refused here and not after the model was loaded
        self.kernel_settings()

    @property
    def compile_options(self) -> dict[str, Any]:
        """Arguments for :func:`~flexdpo.hf.compilation.compile_decoder_layers`."""
        return {"dynamic": self.kernel_settings().dynamic(self.device.type), **self.layer_compile_options}

    def kernel_settings(self) -> KernelSettings:
        """How these settings compile FlexAttention."""
        options: Any = self.attn_kernel_options or {}
        if not isinstance(options, dict):
            raise FlexdpoError(f"attn_kernel_options must be a JSON object, got {options!r}")
        if options and self.attn_impl not in ("auto", "flex"):
            raise FlexdpoError(
                f"attn_kernel_options are FlexAttention's and have no effect with attn_impl={self.attn_impl!r}; "
                "leave one of them out"
            )
        # rows are padded to a few lengths for the kernels that are compiled for each
        compiles = self.attn_impl in ("auto", "flex") or self.attn_kernel_lengths != "auto"
        return KernelSettings(
            lengths=self.attn_kernel_lengths if compiles else "dynamic",  # type: ignore[arg-type]
            kernel_options=options,
            self_test=self.attn_self_test,
        )

    def _check_reference(self, objective: Objective) -> None:
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise FlexdpoError("sync_ref_model moves the reference, which precompute_ref_log_probs fixes; choose one")
        if self.precompute_ref_log_probs and objective.needs_unrelated_responses:
            raise FlexdpoError(
                "the kto loss compares prompts with other rows' responses, drawn anew for every batch, so its "
                "reference cannot be precomputed; leave precompute_ref_log_probs out"
            )
        if self.sync_ref_model and not objective.needs_reference:
            raise FlexdpoError(f"loss_type {', '.join(self.loss_type)} uses no reference; leave sync_ref_model out")
        if self.sync_ref_model and self.ref_model_sync_steps < 1:
            raise FlexdpoError(f"ref_model_sync_steps must be at least 1, got {self.ref_model_sync_steps}")

    @property
    def room_multiple(self) -> int:
        """Of how many tokens the room in a row is a multiple: rows padded to bucket lengths come in whole tiles."""
        by_length = not self.kernel_settings().dynamic(self.device.type)
        return math.lcm(TILE, self.row_multiple) if by_length else self.row_multiple

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this many tokens."""
        if self.pad_to_multiple_of is not None:
            return self.pad_to_multiple_of
        return tile_multiple(self.device)
