"""Every setting of transformers and TRL: it takes effect, it changes nothing that could be missed, or it is refused."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from datasets import Dataset
from packaging.version import Version
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from flexdpo import DPOConfig, DPOTrainer, FlexdpoError
from flexdpo.effects import BELONGS_TO, WITHOUT_EFFECT
from flexdpo.objective.loss_types import LossSettings
from flexdpo.training import distribution
from tests.conftest import preference_rows
from tests.hf import architectures
from tests.hf.architectures import NEW_SETTING, newer_than_recorded
from tests.training.test_trainer import settings

# transformers' own loop, optimizer, data loader, checkpoints and logs read these; this trainer runs inside them
TAKEN_BY_TRAINER = """
    output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps
    warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    gradient_accumulation_steps max_grad_norm fp16 tf32 auto_find_batch_size logging_strategy logging_first_step
    log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism
    seed data_seed use_cpu accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics
    eval_accumulation_steps logging_dir
""".split()  # noqa: SIM905
# this package reads them itself
TAKEN_HERE = """
    learning_rate logging_steps logging_nan_inf_filter bf16 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    neftune_noise_alpha torch_empty_cache_steps length_column_name resume_from_checkpoint
""".split()  # noqa: SIM905
# whatever they say, the run is the one that was asked for
NOTHING_TO_MISS = {
    "prediction_loss_only": "there is nothing but a loss",
    "remove_unused_columns": "the tokens are all that is read of a dataset; the report names its other columns",
    "use_cache": "a step keeps no cache; the value goes into the saved config",
    "do_train": "for scripts of one's own",
    "do_eval": "for scripts of one's own, evaluation follows eval_strategy",
    "local_rank": "the launcher's",
}
# TRL's, which DPOConfig does not have
NOT_HERE = {
    "padding_free": "rows are always without padding between sequences",
    "activation_offloading": "activation_checkpointing and max_tokens_per_row save that memory",
    "pad_token": "rows are never padded with tokens",
}
ANOTHER_VALUE: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "include_num_input_tokens_seen": True,
    "average_tokens_across_devices": False,
    "label_names": ["labels"],
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "do_predict": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": False},
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 4,
    "precompute_ref_batch_size": 4,
    "precompute_ref_cache_dir": "cache",
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "hub_strategy": "end",
    "dataloader_multiprocessing_context": "fork",
}


def test_every_setting_of_transformers_was_looked_at(record_property: Any) -> None:
    looked_at = {*TAKEN_BY_TRAINER, *TAKEN_HERE, *NOTHING_TO_MISS, *WITHOUT_EFFECT}
    new = sorted({field.name for field in dataclasses.fields(TrainingArguments)} - looked_at)
    if newer_than_recorded():
        for name in new:
            record_property(NEW_SETTING, name)
    else:
        assert new == [], "say of each whether it takes effect here, is nothing to miss, or is refused with the reason"
    several = [*TAKEN_BY_TRAINER, *TAKEN_HERE, *NOTHING_TO_MISS, *WITHOUT_EFFECT]
    assert len(several) == len(set(several))


def test_a_setting_that_a_newer_transformers_brings_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = dataclasses.make_dataclass("Newer", [("made_up", int, 0)], bases=(TrainingArguments,))
    monkeypatch.setitem(globals(), "TrainingArguments", made_up)
    reported: list[tuple[str, str]] = []
    monkeypatch.setattr(architectures.transformers, "__version__", "5.17")
    with pytest.raises(AssertionError, match="made_up"):
        test_every_setting_of_transformers_was_looked_at(lambda *change: reported.append(change))
    monkeypatch.setattr(architectures.transformers, "__version__", "999.0")
    test_every_setting_of_transformers_was_looked_at(lambda *change: reported.append(change))
    assert (NEW_SETTING, "made_up") in reported


def test_every_setting_of_trl_is_here_under_its_name() -> None:
    trl = pytest.importorskip("trl")
    ours = {field.name: field for field in dataclasses.fields(DPOConfig)}
    theirs = {field.name: field for field in dataclasses.fields(trl.DPOConfig)}
    new = sorted(theirs.keys() - ours.keys() - NOT_HERE.keys())
    assert new == [] or Version(trl.__version__) >= Version("1.17"), new
    # a default that differs is a loss that differs
    for name in {field.name for field in dataclasses.fields(LossSettings)} & theirs.keys():
        assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize("name", [*WITHOUT_EFFECT, *BELONGS_TO])
def test_a_setting_without_effect_is_refused(tmp_path: Path, name: str) -> None:
    if name not in {field.name for field in dataclasses.fields(DPOConfig)}:
        pytest.skip("this version of transformers does not have it")
    switch, _, needs = BELONGS_TO.get(name, "").partition("=")
    reason = WITHOUT_EFFECT.get(name) or f"without {switch}"
    off = {switch: "no"} if needs.startswith("steps") else {}
    value = ANOTHER_VALUE.get(name, 7 if "steps" in name or "delay" in name or "limit" in name else True)
    with pytest.raises(FlexdpoError, match=rf"{name}=.*{reason[:30]}"):
        settings(tmp_path, **{name: value, **off})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim_args": "momentum=0.9"}, "optim_args='momentum=0.9' has no effect with optim='adamw_torch"),
        ({"optim": "adafactor", "adam_beta1": 0.8}, "adam_beta1=0.8 has no effect with optim='adafactor'"),
        ({"optim": "sgd", "adam_epsilon": 1e-4}, "adam_epsilon=0.0001 has no effect with optim='sgd'"),
        ({"warmup_steps": 3}, "warmup_steps=3 has no effect with lr_scheduler_type='constant'"),
        ({"warmup_steps": 0.1}, "warmup_steps=0.1 has no effect with lr_scheduler_type='constant'"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "warmup_steps": 3},
            "warmup_steps=3 has no effect with lr_scheduler_type='reduce_lr_on_plateau'",
        ),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs={'num_cycles': 2} has no effect with"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"min_lr": 0.1}},
            "lr_scheduler_kwargs={'min_lr': 0.1} has no effect with lr_scheduler_type='constant_with_warmup'",
        ),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules='all-linear' has no effect with optim="),
        ({"accelerator_config": {"split_batches": True}}, "sets split_batches=True, but each process takes and packs"),
        ({"accelerator_config": {"dispatch_batches": True}}, "sets dispatch_batches=True"),
        ({"accelerator_config": {"even_batches": False}}, "sets even_batches=False"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}, "sets sync_each_batch"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of must be a number of tokens or 'auto', got 'many'"),
        ({"max_tokens_per_row": "many"}, "max_tokens_per_row must be a number of tokens or 'auto', got 'many'"),
        ({"pad_to_multiple_of": "0"}, "pad_to_multiple_of must be at least 1, got 0"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "uses no reference; leave precompute_ref_log_probs"),
    ],
)
def test_what_would_change_nothing_or_too_much(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"beta": "0.1"}, r"a number, got str \('0.1'\)"),
        ({"loss_weights": "1"}, "a list of numbers or None, got str"),
        ({"loss_type": None}, "a list of texts, got NoneType"),
        ({"loss_type": ["sigmoid", 1]}, "a list of texts, got list"),
        ({"sharing": None}, "a text, got NoneType"),
        ({"max_length": 60.5}, r"a whole number or None, got float \(60.5\)"),
        ({"max_tokens_per_row": 60.5}, "a whole number or a text or None, got float"),
        ({"dataset_num_proc": 2.5}, "a whole number or None, got float"),
        ({"ref_model_sync_steps": 2.5, "sync_ref_model": True}, "a whole number, got float"),
        ({"disable_dropout": "no"}, "True or False, got str"),
        ({"attn_kernel_options": 3}, "a dict or a text or None, got int"),
        # of transformers' settings the numbers
        ({"per_device_train_batch_size": 2.5}, "a whole number, got float"),
        ({"gradient_accumulation_steps": 1.5}, "a whole number, got float"),
        ({"learning_rate": "1e-5"}, "a number, got str"),
    ],
)
def test_a_value_of_another_type(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    with pytest.raises(FlexdpoError, match=f"{next(iter(changes))} must be {kind}.*; give one, or leave it out"):
        settings(tmp_path, **changes)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_a_reference_that_would_never_move_or_beyond_the_policy(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(FlexdpoError, match=rf"ref_model_mixup_alpha must be in \(0, 1\], got {alpha}"):
        settings(tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=alpha)
    with pytest.raises(FlexdpoError, match="ref_model_sync_steps must be at least 1, got 0; raise it"):
        settings(tmp_path, sync_ref_model=True, ref_model_sync_steps=0)


def test_values_in_the_forms_of_others(tmp_path: Path) -> None:
    args = settings(tmp_path, max_length="60", max_steps=1e3, loss_weights=(1,), max_grad_norm=None, learning_rate=1)
    assert (args.max_length, args.max_steps, args.loss_weights, args.max_grad_norm) == (60, 1000, (1,), None)
    with pytest.raises(FlexdpoError, match=r"loss_weights=\[0.0, 0\] leaves no loss \(sigmoid, sft\), so nothing"):
        settings(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[0.0, 0])
    # the term that comes with the pairs is left
    assert settings(tmp_path, loss_weights=[0.0], rpo_alpha=1.0).rpo_alpha == 1.0


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames if "lomo" in name or "layerwise" in name])
def test_optimizers_that_step_in_the_backward_pass(tmp_path: Path, optim: str) -> None:
    with pytest.raises(FlexdpoError, match=rf"optim='{optim}' takes its step inside the backward pass"):
        settings(tmp_path, optim=optim)


def test_settings_that_take_effect_are_accepted(tmp_path: Path) -> None:
    assert settings(tmp_path, pad_to_multiple_of="auto").row_multiple == settings(tmp_path).row_multiple
    assert settings(tmp_path, pad_to_multiple_of="16").row_multiple == 16
    assert settings(tmp_path, optim="sgd", optim_args="momentum=0.9").optim_args == "momentum=0.9"
    assert settings(tmp_path, adam_beta1=0.8).adam_beta1 == 0.8
    for name in {each.value for each in SchedulerType} - {"constant", "reduce_lr_on_plateau", "greedy"}:
        known = {"num_decay_steps": 2} if name == "warmup_stable_decay" else {}
        known = {"min_lr": 0.0} if "min_lr" in name else known
        changes = {"lr_scheduler_type": name, "warmup_steps": 3, "lr_scheduler_kwargs": known}
        assert settings(tmp_path, **changes).warmup_steps == 3
    checkpointed = settings(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"debug": True})
    assert checkpointed.activation_checkpointing_kwargs["debug"]


@pytest.fixture(scope="module")
def curve_of(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, small_model: Any) -> Any:
    """What a short run logs with the given settings; each is run once."""
    data = Dataset.from_list(preference_rows(24)).add_column("topic", ["weather"] * 24)

    @cache
    def run(**changes: Any) -> list[dict[str, float]]:
        folder = tmp_path_factory.mktemp("run")
        args = settings(folder, max_steps=2, eval_strategy="steps", eval_steps=1, **changes)
        trainer = DPOTrainer(
            small_model(),
            None,
            args,
            train_dataset=data,
            eval_dataset=data.select(range(6)),
            processing_class=tokenizer,
        )
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]
        return [{k: v for k, v in line.items() if "_runtime" not in k and "second" not in k} for line in lines]

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"remove_unused_columns": False},
        {"use_cache": True},
        {"prediction_loss_only": True},
        {"eval_accumulation_steps": 1},
    ],
    ids=str,
)
def test_what_is_nothing_to_miss(curve_of: Any, changes: dict[str, Any]) -> None:
    assert curve_of(**changes) == curve_of()


def test_trust_is_given_to_the_run_or_to_the_model(tmp_path, preferences, saved_model) -> None:
    for given in ({"trust_remote_code": True}, {"model_init_kwargs": {"trust_remote_code": True}}):
        trainer = DPOTrainer(str(saved_model("llama")), None, settings(tmp_path, **given), train_dataset=preferences)
        assert trainer.model.config.num_hidden_layers == 2


def test_settings_of_what_is_not_used(tmp_path, tokenizer, preferences, small_model) -> None:
    def train(**changes: Any) -> None:
        DPOTrainer(
            small_model(), None, settings(tmp_path, **changes), train_dataset=preferences, processing_class=tokenizer
        )

    with pytest.raises(FlexdpoError, match=r"model_init_kwargs=\{'dtype': 'bfloat16'\} has no effect on a model that"):
        train(model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(FlexdpoError, match="stream_shuffle_buffer=64 has no effect: the training data are no stream"):
        train(stream_shuffle_buffer=64)


@pytest.mark.parametrize("name", ["tp", "cp", "sp"])
def test_parallelism_within_a_row_is_refused(small_model: Any, name: str) -> None:
    parallel = SimpleNamespace(**{f"{name}_enabled": True, f"{name}_size": 2})
    with pytest.raises(FlexdpoError, match=rf"parallelism \({name}_size=2\) is not supported: a row's mask"):
        distribution.require_supported(SimpleNamespace(parallelism_config=parallel), small_model())  # type: ignore[arg-type]


def test_images_are_refused_where_processes_share_weights() -> None:
    processes: Any = SimpleNamespace(
        parallelism_config=None, distributed_type=DistributedType.FSDP, is_fsdp2=True, num_processes=2
    )
    model: Any = SimpleNamespace()
    with pytest.raises(FlexdpoError, match=r"what encodes them out of a step whose last row has none; use DDP"):
        distribution.require_supported(processes, model, images=True)
    distribution.require_supported(processes, model)


def test_a_model_that_was_spread_while_loading_is_refused() -> None:
    model: Any = SimpleNamespace(is_distributed_loading_by_transformers=True)
    with pytest.raises(FlexdpoError, match=r"spread over the processes when it was loaded \(distributed_config\)"):
        distribution.require_supported(SimpleNamespace(), model)  # type: ignore[arg-type]


def test_checkpoints_at_a_share_of_the_run(tmp_path) -> None:
    assert DPOConfig(str(tmp_path), use_cpu=True, save_steps=0.5).save_steps == 0.5
    for nothing in (0, 0.0, -1, float("nan")):
        with pytest.raises(FlexdpoError, match="save_steps="):
            DPOConfig(str(tmp_path), use_cpu=True, save_steps=nothing)


def test_a_config_of_ones_own_takes_what_it_likes(tmp_path: Path) -> None:
    class Own(DPOConfig):
        def __init__(self, *args: Any, note: str = "", **kwargs: Any) -> None:
            self.note = note
            super().__init__(*args, **kwargs)

    assert Own(str(tmp_path), note="kept", beta=0.2, use_cpu=True).note == "kept"
    with pytest.raises(TypeError, match="betta"):
        Own(str(tmp_path), betta=0.2)
