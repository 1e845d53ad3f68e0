"""A training run up to its first step: everything is read, tokenised, packed and predicted, and no weight is loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from flexdpo.config import DPOConfig
from flexdpo.data.images import tokenizer_of
from flexdpo.data.pictures import holds_images
from flexdpo.data.regroup import regroup_by_prompt
from flexdpo.data.tokenize import TokenizedPreferences, tokenize_preferences
from flexdpo.errors import FlexdpoError, first_line
from flexdpo.estimate.estimate import estimate_tokenised
from flexdpo.estimate.report import Estimate
from flexdpo.estimate.settings import EstimateSettings
from flexdpo.hf.auto import auto_class, sees
from flexdpo.hf.names import adapter_base
from flexdpo.hf.prepare import prepare_model
from flexdpo.runs.ready import require_ready, require_room_on_disk
from flexdpo.runs.settings import Job
from flexdpo.training import model_loading
from flexdpo.training.adapters import add_adapter, is_peft_model
from flexdpo.training.distribution import shards_of
from flexdpo.training.memory import TrainingSetup, gigabytes, predict_memory
from flexdpo.training.run_data import RowPlan, require_fit


class DryRun(NamedTuple):
    """What a run would do: tokens, gain and advice with the run's own settings; and these, and a step, in words."""

    estimate: Estimate
    table: str


def dry_run(job: Job, config: DPOConfig) -> DryRun:
    """Do all of a run that needs no weights: read, tokenise, check, pack and predict.

    The model is made without memory. ``FlexdpoError`` for whatever would stop the run before its first step.
    """
    if job.dataset_streaming:
        raise FlexdpoError(
            "a dry run looks at the whole dataset, and a stream is read once; leave --dataset_streaming out of it"
        )
    require_ready(job, config)
    data = job.train_data()
    revision = {key: value for key, value in job.load_kwargs(config).items() if key == "revision"}
    name, trusted = str(job.model_name_or_path), {"trust_remote_code": config.trust_remote_code, **revision}
    images = holds_images(data) and sees(model_loading.load_config(name, **trusted))
    tokenizer = (model_loading.load_processor if images else model_loading.load_tokenizer)(name, **trusted)
    model = _without_weights(job, config, trusted, images=images)
    model_loading.require_vocabulary(model, tokenizer_of(tokenizer))
    how = {name: getattr(config, name) for name in ("max_length", "truncation_mode", "max_prompt_length")}
    tokenised = tokenize_preferences(data, tokenizer, num_proc=config.dataset_num_proc, **how)
    model_loading.require_positions(model_loading.position_limit(model), tokenised.report.longest)
    if config.regroup_prompts:
        tokenised = TokenizedPreferences(regroup_by_prompt(tokenised.dataset), tokenised.report)
    require_fit(config.objective(), tokenised.dataset[0], "train")
    if job.evaluates:
        kept = tokenize_preferences(job.eval_data(), tokenizer, name="eval", **how)
        require_fit(config.objective(), kept.dataset[0], "eval")
    require_room_on_disk(model, config, adapter=is_peft_model(model))
    return _predict(tokenised, model, job, config)


def _without_weights(job: Job, config: DPOConfig, trusted: dict[str, Any], *, images: bool) -> nn.Module:
    kwargs, given = job.load_kwargs(config), str(job.model_name_or_path)
    name = adapter_base(given) or given
    read = model_loading.load_config(given, **trusted)
    dtype = wanted = getattr(read, "dtype", None) if kwargs.get("dtype") == "auto" else kwargs.get("dtype")
    if not isinstance(wanted, torch.dtype):
        dtype = getattr(torch, str(wanted or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise FlexdpoError(f"--dtype {wanted!r} is no dtype; use float32, bfloat16 or float16")
    try:
        with torch.device("meta"):
            model: nn.Module = auto_class(read, images=images).from_config(
                read, trust_remote_code=config.trust_remote_code, dtype=dtype
            )
    except (ValueError, TypeError, KeyError) as error:
        raise FlexdpoError(f"cannot make a causal LM of {name!r}: {first_line(error)}") from error
    if name != given:
        from peft import PeftConfig

        model = add_adapter(model, PeftConfig.from_pretrained(given))
    if job.use_peft:
        model = add_adapter(model, job.peft_config())
    prepare_model(model, impl=config.attn_impl)  # type: ignore[arg-type]
    return model


def _predict(tokenised: TokenizedPreferences, model: nn.Module, job: Job, config: DPOConfig) -> DryRun:
    runs_reference = config.objective().needs_reference and not config.precompute_ref_log_probs
    setup = TrainingSetup.from_arguments(
        config, model, reference=runs_reference and not job.use_peft, **shards_of(config)
    )
    budget = RowPlan.of(config, model, reference=setup.reference, longest=0).max_tokens_per_row
    same = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "sharing", "seed")
    settings = EstimateSettings(
        **{name: getattr(config, name) for name in same},
        device="cuda" if config.device.type == "cuda" else "cpu",
        dtype="float32" if setup.compute_bytes == 4 else "bfloat16",
        max_tokens_per_row=budget,
        gradient_checkpointing=setup.gradient_checkpointing,
        keep_attention=setup.keeps_attention,
        reference=runs_reference,
        setup=setup,
    )
    estimate = estimate_tokenised(tokenised, settings, model=model)
    accumulated = config.gradient_accumulation_steps
    steps = -(-len(tokenised.dataset) // (config.per_device_train_batch_size * accumulated * config.world_size))
    rows = "one row for a batch" if budget is None else f"rows of {budget} tokens"
    memory = predict_memory(model, estimate.memory["shared"].tokens, setup).total
    return DryRun(
        estimate,
        f"{estimate.table()}\n\n"
        f"dry run: {steps:,} optimizer steps an epoch, {estimate.rows_per_batch * accumulated:.1f} rows a step "
        f"({rows}), about {gigabytes(memory)} of memory; nothing was trained",
    )
