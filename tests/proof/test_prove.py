"""The proof at the start of a run: it lets exact models pass in every dtype, and stops each kind of wrong result."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from flexdpo import (
    DPOConfig,
    DPOTrainer,
    FlexdpoError,
    Group,
    Row,
    RowLayout,
    UnsupportedModelError,
    parity_probe,
    prepare_model,
    prove,
)
from flexdpo.attention import row_mask
from flexdpo.hf.randomness import disable_dropout
from flexdpo.hf.row_dependence import LengthLimits
from flexdpo.proof.proof_runs import Runs
from flexdpo.proof.prove import measure
from flexdpo.proof.rounding import token_error
from flexdpo.training import start_proof
from flexdpo.training.batch import REFERENCE_COLUMN
from tests.conftest import odd_groups, preference_rows, random_ids
from tests.hf.architectures import build_or_skip
from tests.hf.equivalence import example_groups
from tests.hf.test_architectures import EXACT, SPREAD
from tests.hf.test_row_dependence import LIMIT, build


def settings(folder: Path, **changes: Any) -> DPOConfig:
    plain = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    batch = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3}
    return DPOConfig(str(folder), **{**plain, **batch, **changes})


@pytest.fixture
def train(tmp_path: Path, tokenizer: Any) -> Any:
    """Makes a trainer; ``train()`` on it proves first."""

    def make(model: Any, **changes: Any) -> DPOTrainer:
        peft_config = changes.pop("peft_config", None)
        data = Dataset.from_list(preference_rows(16))
        args = settings(tmp_path / "run", **changes)
        return DPOTrainer(model, None, args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SPREAD else pytest.mark.zoo) for n in EXACT])
def test_exact_models_pass(name: str, dtype: torch.dtype) -> None:
    """In train mode, as it is trained."""
    model = build_or_skip(name, dtype=dtype).train()
    if name == "phimoe":
        with pytest.raises(UnsupportedModelError, match=r"draws? random numbers in training"):
            disable_dropout(prepare_model(model))
        return
    disable_dropout(prepare_model(model))
    proof = prove(model, example_groups(), pad_to_multiple_of=16)
    assert proof.examples == 2
    assert proof.sequences == 5
    # not above 0 always: one sequence may round alike in both batches
    assert proof.value_noise < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_row": 48}, {"sharing": "step"}], ids=str)
def test_float64_is_proved_to_its_own_rounding(changes: dict[str, Any], small_model: Any) -> None:
    model = small_model("gpt2", dtype=torch.float64)
    proof = prove(model, odd_groups(np.random.default_rng(0)), **changes)
    assert proof.value_error < 1e-14
    assert proof.gradient_error < 1e-13
    assert proof.line().startswith("proved on 4 examples: log-probabilities within ")


def test_gradients_are_compared_where_none_are_wanted(small_model: Any) -> None:
    model = small_model()
    with torch.inference_mode():
        assert prove(model, odd_groups(np.random.default_rng(0))).examples == 4
        assert parity_probe(model).exact


def test_nothing_is_left_behind(small_model: Any) -> None:
    model = prepare_model(small_model())
    kept = torch.ones_like(model.model.embed_tokens.weight)
    model.model.embed_tokens.weight.grad = kept
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state()
    prove(model.train(), odd_groups(np.random.default_rng(0)))
    assert torch.equal(states, torch.get_rng_state())
    assert model.training
    assert model.config._attn_implementation == "flexdpo"
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.grad is kept
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.embed_tokens.weight"]
    assert not model.model.embed_tokens._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
        {"precompute_ref_log_probs": True},
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "precompute_ref_log_probs": True},
        {"max_tokens_per_row": 56, "gradient_accumulation_steps": 2},
        {"loss_type": ["kto"], "per_device_train_batch_size": 2},
        {"loss_type": ["simpo"]},
    ],
    ids=str,
)
def test_a_run_with_its_proof_is_the_run_without_it(changes: dict[str, Any], train: Any, small_model: Any) -> None:
    weights = []
    for proves in (True, False):
        trainer = train(small_model(), prove=proves, **changes)
        trainer.train()
        assert (trainer.proof is not None) == proves
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        if trainer.proof is not None:
            compares = changes.get("loss_type") != ["simpo"]
            assert (trainer.proof.reference_error == trainer.proof.reference_error) == compares
    assert torch.equal(*weights)


def test_an_adapter_is_compared_weight_by_weight(train: Any, small_model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(small_model(), config)
    trainer = train(model)
    trainer.train()
    assert 0 < trainer.proof.adapter_error < 1e-5
    assert trainer.proof.reference_error < 1e-6
    assert "the adapter's within" in trainer.proof.line()


def test_the_proof_is_logged_and_kept_with_every_checkpoint(train: Any, small_model: Any, caplog: Any) -> None:
    from transformers.utils import logging

    logging.enable_propagation()
    trainer = train(small_model(), save_strategy="steps", save_steps=1)
    trainer.train()
    logging.disable_propagation()
    assert "proved on 4 examples: log-probabilities within" in caplog.text
    record = json.loads((Path(trainer.args.output_dir) / "checkpoint-1" / "flexdpo_run.json").read_text())
    assert record["proof"]["examples"] == 4
    assert record["proof"]["value_error"] == trainer.proof.value_error
    # and it is no setting that a resumed run would have to repeat
    train(small_model(), save_strategy="steps", save_steps=1, prove=False).train(resume_from_checkpoint=True)


# --- what it stops ---------------------------------------------------------------------------------------------------


def _leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings see each other; prompts and documents stay right."""
    build = row_mask.build_block_mask

    def leaking(layout: Any, kind: Any, **kwargs: Any) -> Any:
        ends = layout.subtree_end.clone()
        ends[0, : layout.num_tokens[0]] = torch.cummax(ends[0, : layout.num_tokens[0]], 0).values
        return build(RowLayout(layout.position_ids, ends, layout.num_tokens), kind, **kwargs)

    monkeypatch.setattr(row_mask, "build_block_mask", leaking)


def _documents_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that comes later in the row sees the first token of the first document."""
    build = row_mask.build_block_mask

    def mixing(layout: Any, kind: Any, **kwargs: Any) -> Any:
        ends = layout.subtree_end.clone()
        ends[0, 0] = layout.num_tokens[0]
        return build(RowLayout(layout.position_ids, ends, layout.num_tokens), kind, **kwargs)

    monkeypatch.setattr(row_mask, "build_block_mask", mixing)


def _off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every response but a prompt's first begins one position too late."""
    inputs = Row.inputs

    def moved(row: Row) -> dict[str, Any]:
        positions = row.position_ids.clone()
        for path in row.response_paths[1:]:
            positions[0, path] += 1
        return {**inputs(row), "position_ids": positions}

    monkeypatch.setattr(Row, "inputs", moved)


def _values_right_gradients_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexdpo.hf import interface

    attend = interface.packed_attention
    monkeypatch.setattr(
        interface, "packed_attention", lambda q, k, v, mask, **kwargs: attend(q, k.detach(), v, mask, **kwargs)
    )


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("pairs", [1, 2, 8])
def test_a_wrong_packed_run_is_stopped(
    pairs: int, dtype: torch.dtype, train: Any, small_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = train(small_model(dtype=dtype), per_device_train_batch_size=pairs)
    before = copy.deepcopy(trainer.model.state_dict())
    message = r"packed .* are off by .* where rounding explains .* Nothing was trained"
    for fault in (_leaking, _off_by_one, _values_right_gradients_wrong):
        with monkeypatch.context() as patch:
            fault(patch)
            with pytest.raises(FlexdpoError, match=message):
                trainer.train()
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, before[name]), fault.__name__
    trainer.train()
    assert trainer.proof is not None


@DTYPES
@pytest.mark.parametrize("known", [True, False])
def test_a_row_that_mixes_the_rotations_of_short_and_long_sequences_is_stopped(
    known: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the limit is not known either, and a padded batch would mix them alike."""
    model = build("longrope").to(dtype)
    rng = np.random.default_rng(0)
    groups = [
        Group.from_lists(random_ids(rng, length), [random_ids(rng, 5), random_ids(rng, 6)])
        for length in (LIMIT // 2, 2 * LIMIT)
    ]
    assert prove(model, groups).value_error < (1e-6 if dtype == torch.float32 else 0.05)
    # as transformers rotates: the longest position of the row decides for all
    monkeypatch.setattr("flexdpo.hf.limits.evaluated_by_side", lambda module, limits, longest, args, kwargs: None)
    message = "packed log-probabilities are off by"
    if not known:
        monkeypatch.setattr("flexdpo.proof.prove.limits_of", lambda model: LengthLimits())
        message = "unpacked log-probabilities depend on the batch: they move by"
    with pytest.raises(FlexdpoError, match=message):
        prove(model, groups)


@DTYPES
@pytest.mark.parametrize("how", ["mean over the batch", "mean over the sequence"])
def test_what_depends_on_its_batch_is_no_noise(how: str, dtype: torch.dtype, small_model: Any) -> None:
    """However far it moves, nothing packed may be as far off."""
    model = small_model(dtype=dtype, layers=2)
    dim = 0 if how == "mean over the batch" else 1

    def mix(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 3 * output.mean(dim=dim, keepdim=True)

    model.model.layers[0].mlp.register_forward_hook(mix)
    message = "unpacked log-probabilities depend on the batch" if dim == 0 else "packed log-probabilities are off by"
    with pytest.raises(FlexdpoError, match=message):
        prove(model, odd_groups(np.random.default_rng(0)))


@DTYPES
@pytest.mark.parametrize("per_device_train_batch_size", [2, 3])
def test_documents_that_mix_are_stopped_in_small_batches_too(
    per_device_train_batch_size: int,
    dtype: torch.dtype,
    train: Any,
    small_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = train(small_model(dtype=dtype), per_device_train_batch_size=per_device_train_batch_size)
    _documents_mixed(monkeypatch)
    with pytest.raises(FlexdpoError, match="packed log-probabilities are off by"):
        trainer.train()


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "documents"),
    [(1, 1, [1]), (1, 8, [1, 1, 1, 1]), (2, 1, [2]), (2, 3, [2]), (3, 3, [3]), (2, 8, [2, 2]), (8, 1, [4])],
)
def test_rows_hold_as_many_documents_as_in_training(
    micro_batch: int, accumulation: int, documents: list[int], train: Any, small_model: Any, monkeypatch: Any
) -> None:
    """Never more, which memory might not hold, and two at least where documents share rows."""
    settings = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    trainer, found = train(small_model(), **settings), []

    def note(model: Any, rows: list[Row], **kwargs: Any) -> Any:
        found.extend(len(row.groups) for row in rows)
        return measure(model, rows, **kwargs)

    monkeypatch.setattr(start_proof, "measure", note)
    start_proof.ProofAtStart(trainer, reference_is_policy=True).on_train_begin(trainer.args, trainer.state, None)
    assert found == documents


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "responses", "checkpointing"),
    [(1, 1, 1, False), (1, 1, 60, True), (2, 1, 1, False), (1, 4, 1, True), (8, 1, 60, False)],
)
def test_it_costs_two_steps_at_most(
    micro_batch: int,
    accumulation: int,
    responses: int,
    loss_type: str,
    adapter: bool,
    checkpointing: bool,
    tmp_path: Path,
    tokenizer: Any,
    small_model: Any,
) -> None:
    """Counted in tokens of forward passes, as many of backward passes, and a share of them for trained weights."""
    peft = pytest.importorskip("peft")
    texts = {"prompt": "w5 " * (60 - responses // 2), "chosen": "w8 " * responses, "rejected": "w9 " * responses}
    data = Dataset.from_list([texts] * 16)
    batch = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    args = settings(tmp_path, loss_type=[loss_type], activation_checkpointing=checkpointing, **batch)
    config = peft.LoraConfig(target_modules="all-linear") if adapter else None
    trainer = DPOTrainer(small_model(), None, args, train_dataset=data, processing_class=tokenizer, peft_config=config)
    weights = [*trainer.model.parameters()]
    share = sum(w.numel() for w in weights if w.requires_grad) / sum(w.numel() for w in weights)
    passes = {"proof": 0.0, "step": 0.0}
    at = "proof"

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        tokens = output.shape[0] * output.shape[1]
        backward = 1 + checkpointing + (share if at == "step" else 0)
        passes[at] += tokens * (1 + (backward if torch.is_grad_enabled() else 0))

    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    for model in models:
        model.get_input_embeddings().register_forward_hook(count)
    start_proof.ProofAtStart(trainer, reference_is_policy=loss_type == "sigmoid").on_train_begin(
        args, trainer.state, trainer.control
    )
    at = "step"
    trainer.remove_callback(start_proof.ProofAtStart)
    trainer.train()
    assert passes["proof"] <= 2 * passes["step"], passes
    assert trainer.proof.sequences >= 1
    # no gradients only where one example without a reference takes a step of its own
    least = (micro_batch * accumulation, loss_type, adapter) == (1, "simpo", True)
    assert np.isnan(trainer.proof.gradient_error) <= least


@DTYPES
def test_dropout_that_was_left_on_is_stopped(dtype: torch.dtype, train: Any, small_model: Any) -> None:
    trainer = train(small_model("gpt2", dtype=dtype))
    trainer.model.transformer.drop.p = 0.1
    with pytest.raises(FlexdpoError, match=r"Dropout \(drop\) draws random numbers while a packed row runs"):
        trainer.train()


@DTYPES
@pytest.mark.parametrize("pairs", [1, 8])
@pytest.mark.parametrize("weights", ["random", "of a few steps"])
def test_a_reference_of_another_adapter_scale_is_stopped(
    weights: str, pairs: int, dtype: torch.dtype, train: Any, small_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision too, where it differs by less than another batch does."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small_model(dtype=dtype), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name and weights == "of a few steps":
            weight.data *= 0.05
    trainer = train(model, per_device_train_batch_size=pairs)
    layers = [module for module in trainer.model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]

    def scale(by: float) -> None:
        for layer in layers:
            layer.scaling["default"] *= by

    # a change of the policy's own scale is named for what it is
    scale(1.5)
    with pytest.raises(FlexdpoError, match="no longer runs the adapters that it began with"):
        trainer.train()
    scale(1 / 1.5)
    monkeypatch.setattr("flexdpo.training.adapters._adapters", lambda model: trainer._at_start.adapters)
    run = trainer.reference_logps

    def scaled(row: Row) -> Any:
        scale(1.5)
        try:
            return run(row)
        finally:
            scale(1 / 1.5)

    monkeypatch.setattr(trainer, "reference_logps", scaled)
    with pytest.raises(FlexdpoError, match="the reference's log-probabilities, which are the policy's"):
        trainer.train()


@DTYPES
def test_a_reference_copy_of_other_weights_is_stopped(dtype: torch.dtype, train: Any, small_model: Any) -> None:
    trainer = train(small_model(dtype=dtype))
    trainer.ref_model = small_model(seed=1, dtype=dtype)
    prepare_model(trainer.ref_model)
    with pytest.raises(FlexdpoError, match="the reference's log-probabilities"):
        trainer.train()


@DTYPES
def test_a_stale_cache_is_stopped(dtype: torch.dtype, train: Any, small_model: Any) -> None:
    """By what its numbers are off where the dtype tells them, and else by those of other weights."""
    trainer = train(small_model(dtype=dtype), precompute_ref_log_probs=True)
    column = REFERENCE_COLUMN
    stale = [[value + 0.01 for value in row] for row in trainer.train_dataset[column]]
    if dtype == torch.bfloat16:
        stale = train(small_model(seed=1, dtype=dtype), precompute_ref_log_probs=True).train_dataset[column]
    trainer.train_dataset = trainer.train_dataset.remove_columns(column).add_column(column, stale)
    with pytest.raises(FlexdpoError, match="the reference's log-probabilities"):
        trainer.train()


def test_a_reference_of_ones_own_may_be_another_model(tmp_path: Path, tokenizer: Any, small_model: Any) -> None:
    data = Dataset.from_list(preference_rows(16))
    trainer = DPOTrainer(
        small_model(),
        small_model(seed=1),
        settings(tmp_path),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    assert np.isnan(trainer.proof.reference_error)


def test_a_damaged_model_is_named_with_its_example(train: Any, small_model: Any) -> None:
    trainer = train(small_model())
    trainer.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FlexdpoError, match=r"before the first step, .* log-probability of response 0 .* is nan"):
        trainer.train()


def test_an_error_that_is_not_finite_is_an_error(small_model: Any) -> None:
    proof = prove(small_model(), odd_groups(np.random.default_rng(0)))
    broken = token_error([(torch.tensor([float("nan")]), torch.ones(1))])
    assert broken == float("inf")
    assert dataclasses.replace(proof, gradient_error=broken).failures
    assert not dataclasses.replace(proof, gradient_error=float("nan")).failures


def test_all_sequences_tell_the_noise_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest one has little of it, and errors that it does not explain may be rounding all the same."""
    model, again, runs = build_or_skip("llama", dtype=torch.float32), Runs.again, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = again(self, *args, **kwargs)
        runs.append(len(found))
        return found

    monkeypatch.setattr(Runs, "again", counted)
    prove(model, example_groups())
    assert runs == [1]
    for name in ("NOISE_FACTOR", "ROUNDINGS"):
        monkeypatch.setattr(f"flexdpo.proof.prove.{name}", 0)
    with pytest.raises(FlexdpoError, match="packed gradients at the embeddings are off by"):
        prove(model, example_groups())
    # in each of several ways before it is stopped
    assert runs[1:] == [1, *6 * [5]]
