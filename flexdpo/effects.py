"""Settings of transformers that would be accepted and change nothing, and which others they need to take effect."""

import copy
from dataclasses import fields
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler

from flexdpo.errors import FlexdpoError, first_line

_NO_PREDICTIONS = "a packed batch has no predictions, only a loss and metrics"
_CASTS = "it would cast the policy's weights for good and leave the reference; bf16=True evaluates in bf16, too"
# what transformers would act on and this trainer does not, and why
WITHOUT_EFFECT = {
    "label_smoothing_factor": "it is for a language model's own loss; label_smoothing is that of preferences",
    "include_num_input_tokens_seen": "it counts padded batches; the log has tokens/run and tokens/unshared",
    "average_tokens_across_devices": "a mean over tokens is always one over those of all processes",
    "label_names": "a packed batch has no labels beside its responses",
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "do_predict": _NO_PREDICTIONS,
    "use_liger_kernel": "its loss never runs, since the full logits never exist, and its layers would be put in after "
    "the reference was made; apply them to the model before it comes here",
    "liger_kernel_config": "use_liger_kernel is not supported",
    "fp16_full_eval": _CASTS,
    "bf16_full_eval": _CASTS,
}
# settings that are read only where another one is on, or has one of some values
BELONGS_TO = {
    # a token is a placeholder in settings that are read back
    **{
        each.name: "push_to_hub"
        for each in fields(TrainingArguments)
        if each.name.startswith("hub_") and not each.name.endswith("_token")
    },
    **{each.name: "report_to=trackio" for each in fields(TrainingArguments) if each.name.startswith("trackio_")},
    "eval_steps": "eval_strategy=steps",
    "eval_delay": "eval_strategy=steps|epoch",
    "save_steps": "save_strategy=steps",
    "save_total_limit": "save_strategy=steps|epoch|best",
    "save_only_model": "save_strategy=steps|epoch|best",
    "logging_steps": "logging_strategy=steps",
    "greater_is_better": "metric_for_best_model",
    "length_column_name": "train_sampling_strategy=group_by_length|batch_rebalance",
    "dataloader_persistent_workers": "dataloader_num_workers",
    "dataloader_multiprocessing_context": "dataloader_num_workers",
    "ref_model_mixup_alpha": "sync_ref_model",
    "ref_model_sync_steps": "sync_ref_model",
    "precompute_ref_batch_size": "precompute_ref_log_probs",
    "precompute_ref_cache_dir": "precompute_ref_log_probs",
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "keep_attention": "activation_checkpointing",
}
# of which 0 would be none, and less than 0 means nothing anywhere
AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "dataset_num_proc",
    "dataloader_prefetch_factor", "save_steps", "eval_accumulation_steps", "save_total_limit",
)  # fmt: skip
# each process collates and packs its own pairs, and the gradients of a step's rows are summed up once
LOADING = {"split_batches": False, "dispatch_batches": None, "even_batches": True}


def learning_rates(
    name: SchedulerType | str, warmup_steps: int, kwargs: dict[str, Any] | None, *, total: int = 10, steps: int = 10
) -> list[float]:
    """Those of some of the first steps, relative to the highest; one where they follow the results.

    None for settings that the schedule cannot take.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        schedule = get_scheduler(name, optimizer, warmup_steps, total, kwargs or None)
    except (TypeError, ValueError):
        return []
    factor = getattr(schedule, "lr_lambdas", None)
    return [1.0] if factor is None else [factor[0](step) for step in range(0, steps, max(1, steps // 256))]


def require_schedule(args: TrainingArguments) -> None:
    """Refuse settings of the schedule that it cannot take or does not read."""
    name, kwargs = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs
    try:
        get_scheduler(name, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 0, 10, kwargs or None)
    except (TypeError, ValueError, AttributeError) as error:
        raise FlexdpoError(
            f"lr_scheduler_kwargs={kwargs!r} does not suit lr_scheduler_type={name.value!r} ({first_line(error)}); "
            "give what it takes, or choose another schedule"
        ) from error
    # a schedule that takes an argument of any name reads none
    unread = ["lr_scheduler_kwargs"] if kwargs and learning_rates(name, 0, {"nothing": 0}) else []
    rates = learning_rates(name, 0, kwargs) if args.warmup_steps else []
    if rates and learning_rates(name, 5, kwargs) == rates:
        unread.append("warmup_steps")
    if args.max_steps > 0:
        warmup = args.get_warmup_steps(args.max_steps)
        rates = learning_rates(name, warmup, kwargs, total=args.max_steps, steps=args.max_steps)
        if rates and not any(rates):
            raise FlexdpoError(
                f"warmup_steps={args.warmup_steps} keeps the learning rate of all max_steps={args.max_steps} steps at "
                "0, so nothing would be learned; lower it, or raise max_steps"
            )
    for each in unread:
        raise FlexdpoError(
            f"{each}={getattr(args, each)!r} has no effect with lr_scheduler_type={name.value!r}; leave it out, "
            "or choose a schedule that reads it, such as 'cosine'"
        )


def require_optimizer(args: TrainingArguments, defaults: dict[str, Any]) -> None:
    """Refuse optimizers that do not wait for a whole step, and settings that the chosen one does not read."""
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        raise FlexdpoError(
            f"optim={optim!r} takes its step inside the backward pass, of which a step of several rows has several, "
            "before its gradient could be looked at; choose another one"
        )
    read = _optimizer_of(args)
    for name in ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"):
        if read is not None and getattr(args, name) != defaults[name]:
            without = copy.copy(args)
            setattr(without, name, defaults[name])
            if _optimizer_of(without) == read:
                raise FlexdpoError(f"{name}={getattr(args, name)!r} has no effect with optim={optim!r}; leave it out")


def _optimizer_of(args: TrainingArguments) -> Any:
    """The optimizer that transformers makes of settings, and its arguments; ``None`` where it needs more for it."""
    try:
        from transformers import Trainer

        return Trainer.get_optimizer_cls_and_kwargs(args)
    except Exception:  # a package that is not installed, a model that is needed: said when the run begins
        return None
