"""The settings of a preference-training run, under TRL's and transformers' names."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, field, fields
from inspect import Parameter, signature
from typing import Any, get_type_hints

import torch
from transformers import TrainingArguments

from flexdpo.attention.remembered import keep_attention
from flexdpo.attention.row_mask import resolve_impl
from flexdpo.attention.settings import KernelSettings
from flexdpo.effects import AT_LEAST_ONE, BELONGS_TO, LOADING, WITHOUT_EFFECT, require_optimizer, require_schedule
from flexdpo.errors import FlexdpoError, nearest
from flexdpo.hf.checkpointing import checkpoint_arguments, checkpointing_name
from flexdpo.layout.packing import MAX_WASTE, SHARING
from flexdpo.layout.row import TILE, tile_multiple
from flexdpo.objective.loss_types import LOSS_TYPES, LossSettings, setting
from flexdpo.objective.objective import Objective
from flexdpo.objective.setting_types import is_number, require_types

_COMPILE_SETTINGS = {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}


@dataclass
class DPOConfig(LossSettings, TrainingArguments):
    """Settings of :class:`~flexdpo.training.trainer.DPOTrainer`; a field that TRL has means what it means there.

    All fields of ``transformers.TrainingArguments`` are taken too. ``per_device_train_batch_size`` counts pairs.
    Different from ``TrainingArguments``: ``learning_rate`` is 1e-6, ``logging_steps`` 10, ``bf16`` is on by default
    where the GPU has it, and ``torch_compile`` compiles decoder layers one by one, never the whole model.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "attn_kernel_options"]  # noqa: RUF012

    learning_rate: float = setting(1e-6, "Initial learning rate of the optimizer.")
    logging_steps: float = setting(10, "Log every this many optimizer steps; below 1, a share of all steps.")
    logging_nan_inf_filter: bool = setting(
        False, "Leave NaN losses out of the log; training stops at the first one anyway."
    )
    bf16: bool | None = setting(None, "bfloat16 mixed precision; by default on where the GPU has it and fp16 is off.")
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Run layers again in the backward pass.", "nargs": "?", "const": True}
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = setting(
        None, "Keyword arguments of torch.utils.checkpoint.checkpoint."
    )

    keep_attention: bool = setting(
        False,
        "With activation_checkpointing, keep what attention came to, so that layers run again without it. For "
        "attn_impl sdpa (on a CPU the default) in layers that are not compiled.",
    )

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": f"Losses to add up: {', '.join(LOSS_TYPES)}."}
    )
    loss_weights: list[float] | None = setting(None, "One weight per loss; 1 for each by default.")
    router_aux_loss_coef: float | None = setting(
        None,
        "Weight of the load-balancing loss of a mixture of experts; by default its config's own, 0 leaves it out.",
    )
    sync_ref_model: bool = setting(False, "TR-DPO: let the reference model follow the policy every few steps.")
    ref_model_mixup_alpha: float = setting(
        0.6, "TR-DPO: share of the policy in the new reference, 0 to 1; 1 copies it."
    )
    ref_model_sync_steps: int = setting(512, "TR-DPO: optimizer steps between two updates.")

    regroup_prompts: bool = setting(
        False, "Merge rows with the same prompt into one group with all their preferences; a batch then counts groups."
    )
    max_length: int | None = setting(
        1024, "Longest prompt plus response in tokens; what is longer is cut on the right."
    )
    max_prompt_length: int | None = setting(
        None, "Longest prompt in tokens; what is longer loses its beginning, once for all responses."
    )
    truncation_mode: str = setting(
        "keep_start", "How to cut: keep_start keeps the beginning, so that prompts stay equal."
    )
    stream_shuffle_buffer: int = setting(
        0, "Shuffle a streamed dataset through a buffer of this many rows; 0 takes it in its own order."
    )
    dataset_num_proc: int | None = setting(None, "Processes that tokenise the dataset.")

    model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "Arguments for AutoModelForCausalLM.from_pretrained, as JSON, when the model is a name."
    )
    trust_remote_code: bool = setting(False, "Let models and tokenizers from the hub run their own code.")
    disable_dropout: bool = setting(
        True,
        "Set every rate of dropout and noise to 0 in the policy and the reference model. With false, a model that has "
        "one is refused: shared tokens cannot be dropped differently for each response.",
    )
    prove: bool = setting(
        True,
        "Before the first step, compare the run's first examples packed against one by one through the stock "
        "attention, and stop where they differ by more than rounding explains.",
    )
    precompute_ref_log_probs: bool = setting(
        False, "Compute the reference model's log-probabilities once before training and drop the model."
    )
    precompute_ref_batch_size: int | None = setting(
        None, "Pairs per forward pass while precomputing; by default the training batch size."
    )
    precompute_ref_cache_dir: str | None = setting(
        None,
        "Where precomputed log-probabilities are kept for interrupted and later runs; by default FLEXDPO_CACHE or a "
        "folder beside the hub's cache. Or a .parquet file of flexdpo score, which is read.",
    )

    max_tokens_per_row: int | str | None = setting(
        None,
        "Longest packed row in tokens, or 'auto' for the longest that fits into the free memory. The pairs of a batch "
        "are split into as many rows as this needs, and a longer example into pieces; what is learned stays the same. "
        "By default a batch is one row.",
    )
    sharing: str = setting(
        "group",
        "What shares tokens: the responses of a 'group', or also groups of the same 'step' whose prompts begin with "
        "the same 128 tokens or more (a long system prompt, few-shot examples).",
    )
    balance_processes: bool = setting(
        True,
        "With several processes, assign the pairs of each step so that all take about equally long. The step keeps "
        "its pairs; losses that are no mean over pairs are left as they are.",
    )
    pad_to_multiple_of: int | str | None = setting(
        None, "Pad rows to a multiple of this many tokens; by default or with 'auto' 128 on a GPU and none on a CPU."
    )
    attn_impl: str = setting(
        "auto",
        "Attention kernel: auto, flex (compiled FlexAttention), varlen (FlashAttention along root paths, in half "
        "precision on a GPU, for models without softcap, sinks and chunks) or sdpa (chunks of queries).",
    )
    attn_kernel_lengths: str = setting(
        "auto",
        "FlexAttention kernels: 'bucket' pads rows to a few lengths and compiles a kernel for each, 'dynamic' compiles "
        f"one for all lengths, 'auto' takes buckets on a GPU where up to 4 waste under {100 * MAX_WASTE:g} percent.",
    )
    attn_kernel_options: dict[str, Any] | str | None = setting(
        None,
        'kernel_options of flex_attention as JSON, such as {"BLOCK_M": 64, "BLOCK_N": 64}; {"BACKEND": "FLASH"} is '
        "FlashAttention-4, used only after its gradients passed a test.",
    )
    attn_self_test: bool = setting(
        True, "On a GPU, compare each kernel's gradients with dense attention at its first row."
    )
    torch_compile: bool | None = setting(
        None,
        "Compile decoder layers one by one. By default on a GPU, without DeepSpeed, where the model's layers are "
        "found; never on a CPU unless asked.",
    )

    # what torch_compile and its backend and mode said; they are emptied, since transformers would compile the model
    compile_layers: bool = field(init=False, default=False)
    compiles_unasked: bool = field(init=False, default=False)
    layer_compile_options: dict[str, Any] = field(init=False, default_factory=dict)

    def __new__(cls, *_: Any, **given: Any) -> DPOConfig:
        """Refuse what is no setting, but where a class of somebody's own takes whatever it likes."""
        known = signature(cls.__init__).parameters
        is_open = any(each.kind is Parameter.VAR_KEYWORD for each in known.values())
        for name in () if is_open else given.keys() - known.keys():
            way_out = nearest(name, [*known]) or "; leave it out. README's section From TRL may say why it is not here"
            raise FlexdpoError(f"DPOConfig has no setting {name!r}{way_out}")
        made: DPOConfig = super().__new__(cls)
        return made

    def __post_init__(self) -> None:
        self._check_given()
        # what transformers would act on otherwise is taken from it, and given back as it is meant here
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
        # transformers has read what was text
        kwargs: Any = self.activation_checkpointing_kwargs
        # as users of torch say it
        self.keep_attention = self.keep_attention or (kwargs or {}).get("context_fn") is keep_attention
        self._check_effects()
        self._decide_on_compilation(**asked)
        self.activation_checkpointing_kwargs = checkpoint_arguments(
            kwargs,
            attention=self.keep_attention,
            impl=resolve_impl(self.attn_impl, self.device),
            compiled=self.compile_layers,
            device=self.device.type,
        )
        setattr(self, f"{known}_kwargs", self.activation_checkpointing_kwargs)
        if copies_unsaid:
            # a row is a dozen small tensors, each of which would otherwise wait for the step before it
            self.accelerator_config.non_blocking = self.dataloader_pin_memory

    def _check_given(self) -> None:
        """Bring what was given into one form, and refuse what no run can have."""
        loss_type: Any = self.loss_type
        self.loss_type = [loss_type] if isinstance(loss_type, str) else loss_type
        self._check_types()
        self.loss_type = list(self.loss_type)
        self._check_reference(self.objective())
        resolve_impl(self.attn_impl, torch.device("cpu"))
        if self.truncation_mode != "keep_start":
            raise FlexdpoError(
                f"truncation_mode={self.truncation_mode!r} is not supported: cutting on the left cuts every response's "
                "copy of the prompt at another place, so nothing would be shared; use 'keep_start'"
            )
        self._check_rows()
        self._check_numbers()
        if self.neftune_noise_alpha is not None:
            raise FlexdpoError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} adds noise to every embedding, and a token that "
                "several responses share cannot have different noise for each; leave it out"
            )
        # as a YAML file or the command line gives it
        self.fsdp: Any = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)
        # transformers reads it where FSDP is on, and empties or fills it elsewhere
        if self.fsdp_config and not self.fsdp:
            raise FlexdpoError(
                f"fsdp_config={self.fsdp_config!r} has no effect without fsdp; leave it out, or set both"
            )
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.fp16

    def _decide_on_compilation(self, torch_compile: bool | None, **options: str | None) -> None:
        """Whether layers are compiled, and how: where it was asked for, or unasked on a GPU."""
        given = {name.removeprefix("torch_compile_"): value for name, value in options.items() if value is not None}
        if torch_compile is False and given:
            raise FlexdpoError("torch_compile=False leaves torch_compile_backend and torch_compile_mode without effect")
        unasked = torch_compile is None and not given
        self.compiles_unasked = unasked and self.device.type == "cuda" and not self.deepspeed
        self.compile_layers = bool(torch_compile or given or self.compiles_unasked)
        self.layer_compile_options = given

    def to_dict(self) -> dict[str, Any]:
        """As ``TrainingArguments.to_dict``, with the compile settings as they were given, so that they can be read.

        Without ``keep_attention``'s function, which is none of JSON's values.
        """
        found: dict[str, Any] = super().to_dict()
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if self.keep_attention and found.get(name):
                found[name] = {key: value for key, value in found[name].items() if key != "context_fn"}
        options = {f"torch_compile_{name}": value for name, value in self.layer_compile_options.items()}
        return found | {"torch_compile": self.compile_layers, **options}

    def objective(self) -> Objective:
        """The losses these settings ask for."""
        settings = {each.name: getattr(self, each.name) for each in fields(LossSettings)}
        weights = None if self.loss_weights is None else tuple(self.loss_weights)
        return Objective(tuple(self.loss_type), weights, **settings)

    def _check_effects(self) -> None:
        """Refuse what would be accepted and change nothing; values are as transformers has read them."""
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        for name, reason in WITHOUT_EFFECT.items():
            if name in defaults and getattr(self, name) != defaults[name]:
                raise FlexdpoError(f"{name}={getattr(self, name)!r} is not supported: {reason}. Leave it out")
        for name, switch in BELONGS_TO.items():
            if name in defaults and getattr(self, name) != defaults[name] and not self._is_on(switch):
                raise FlexdpoError(
                    f"{name}={getattr(self, name)!r} has no effect without {switch.replace('|', ' or ')}; leave it "
                    "out, or set both"
                )
        for name, needed in LOADING.items():
            if getattr(self.accelerator_config, name) != needed:
                raise FlexdpoError(
                    f"accelerator_config sets {name}={getattr(self.accelerator_config, name)}, but each process takes "
                    "and packs its own pairs, and all take equally many; leave it out"
                )
        if (self.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch"):
            raise FlexdpoError(
                "accelerator_config sets sync_each_batch, but the rows of a step differ in number from process to "
                "process, so their gradients are synchronised once; leave it out"
            )
        if self.fp16 and self.device.type == "cpu":
            raise FlexdpoError("fp16=True has no effect on a CPU, which would run float32; give bf16, or leave it out")
        require_optimizer(self, defaults)
        require_schedule(self)

    def _check_types(self) -> None:
        theirs, hints = {each.name for each in fields(TrainingArguments)}, get_type_hints(DPOConfig)
        own = {each.name for each in fields(DPOConfig) if each.init} - theirs
        # of transformers' settings the numbers, any of which may be None there
        numbers = {name for name in theirs if is_number(hints[name]) and getattr(self, name) is not None}
        require_types(self, DPOConfig, sorted(own | numbers))

    def _check_numbers(self) -> None:
        """Refuse numbers that no run can mean, of whatever setting."""
        for each in fields(self):
            value = getattr(self, each.name, None)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 1 if each.name in AT_LEAST_ONE else 0
            # a default below 0 stands for none, or for the launcher's
            share = each.name == "save_steps" and 0 < value < 1  # of the run
            allowed = value == each.default or share or (math.isfinite(value) and value >= least)
            if each.name == "num_train_epochs":
                allowed = math.isfinite(value) and (value > 0 or self.max_steps > 0)
            if not allowed or (each.name == "max_steps" and value == 0):
                raise FlexdpoError(f"{each.name}={value} is no number that a run can have; give one, or leave it out")
        for name in (
            "model_init_kwargs",
            "lr_scheduler_kwargs",
            "activation_checkpointing_kwargs",
            "gradient_checkpointing_kwargs",
        ):
            value = getattr(self, name)
            if isinstance(value, str) and not value.startswith("{"):
                raise FlexdpoError(
                    f'{name} must be a JSON object such as {{"name": 1}}, got {value!r}; mend it, or leave it out'
                )

    def _is_on(self, switch: str) -> bool:
        name, _, values = switch.partition("=")
        value = getattr(self, name)
        if not values:
            return bool(value)
        return bool(
            {getattr(each, "value", each) for each in (value if isinstance(value, list) else [value])}
            & {*values.split("|")}
        )

    def _check_rows(self) -> None:
        if self.pad_to_multiple_of == "auto":
            # TRL's default
            self.pad_to_multiple_of = None
        lengths = ("max_length", "max_prompt_length", "max_tokens_per_row", "pad_to_multiple_of")
        for name in (*lengths, "precompute_ref_batch_size"):
            value = getattr(self, name)
            if isinstance(value, str) and (name, value) != ("max_tokens_per_row", "auto"):
                raise FlexdpoError(f"{name} must be a number of tokens or 'auto', got {value!r}")
            if isinstance(value, int) and value < 1:
                raise FlexdpoError(f"{name} must be at least 1, got {value}; leave it out for no limit")
        if self.sharing not in SHARING:
            hint = nearest(self.sharing, SHARING)
            raise FlexdpoError(f"sharing must be one of {SHARING}, got {self.sharing!r}{hint}")
        if isinstance(self.attn_kernel_options, str):
            try:
                self.attn_kernel_options = json.loads(self.attn_kernel_options)
            except json.JSONDecodeError as error:
                got = f"{self.attn_kernel_options!r} ({error.msg})"
                raise FlexdpoError(f"attn_kernel_options must be JSON, got {got}") from error
        # what is unknown is refused here and not after the model was loaded
        self.kernel_settings()

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
        lengths: Any = self.attn_kernel_lengths if compiles else "dynamic"
        return KernelSettings(lengths=lengths, kernel_options=options, self_test=self.attn_self_test)

    def _check_reference(self, objective: Objective) -> None:
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise FlexdpoError("sync_ref_model moves the reference, which precompute_ref_log_probs fixes; choose one")
        if self.precompute_ref_log_probs and objective.needs_unrelated_responses:
            raise FlexdpoError(
                "the kto loss compares prompts with other rows' responses, drawn anew for every batch, so its "
                "reference cannot be precomputed; leave precompute_ref_log_probs out"
            )
        for name in ("sync_ref_model", "precompute_ref_log_probs"):
            if getattr(self, name) and not objective.needs_reference:
                raise FlexdpoError(f"loss_type {', '.join(self.loss_type)} uses no reference; leave {name} out")
        if self.sync_ref_model and self.ref_model_sync_steps < 1:
            raise FlexdpoError(f"ref_model_sync_steps must be at least 1, got {self.ref_model_sync_steps}; raise it")
        if self.sync_ref_model and not 0 < self.ref_model_mixup_alpha <= 1:
            raise FlexdpoError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}; 1 copies")

    @property
    def room_multiple(self) -> int:
        """Of how many tokens the room in a row is a multiple: rows padded to bucket lengths come in whole tiles."""
        by_length = not self.kernel_settings().dynamic(self.device.type)
        return math.lcm(TILE, self.row_multiple) if by_length else self.row_multiple

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this many tokens."""
        given = self.pad_to_multiple_of
        return given if isinstance(given, int) else tile_multiple(self.device)
