"""Checkpoints that keep what attention came to: same gradients, no attention computed again, memory in between."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

import flexdpo
from flexdpo import (
    DPOConfig,
    DPOTrainer,
    FlexdpoError,
    Group,
    Row,
    make_train_step,
    pack,
    prepare_model,
    response_logps,
)
from flexdpo.attention import blockwise, remembered
from flexdpo.hf.checkpointing import checkpoint_arguments, checkpointing_name, enable_checkpointing
from flexdpo.training import memory
from flexdpo.training.memory import TrainingSetup, predict_memory
from tests.conftest import build_model
from tests.hf.architectures import build_model as build_zoo_model
from tests.objective.test_piecewise import given_groups
from tests.test_equivalence import gradients_of

CONFIGS_OF_WIDTH = [
    LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    ),
    GPT2Config(
        n_embd=256, n_layer=3, n_head=4, vocab_size=512, n_positions=512, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
    ),
]  # fmt: skip
WAYS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "attention": {"context_fn": flexdpo.keep_attention},
    "full": {},
}


def checkpointed(model: Any, way: str) -> Any:
    prepare_model(model).train()
    flexdpo.disable_dropout(model)
    if (settings := WAYS[way]) is not None:
        enable_checkpointing(model, **settings)
    return model


@pytest.mark.parametrize(
    ("name", "budget"),
    [("gpt2", None), ("mistral", None), ("gemma2", None), ("gpt_oss", None), ("gpt2", 41), ("mistral", 41)],
)
def test_gradients_are_the_same_and_attention_runs_once(name: str, budget: int | None, monkeypatch) -> None:
    calls = {"blocks": 0}
    flash, plain = blockwise._flash, blockwise._plain_block

    def counted(run: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            # what a block's own gradient runs again is no attention of a checkpoint
            calls["blocks"] += not torch.is_grad_enabled()
            return run(*args, **kwargs)

        return counting

    monkeypatch.setattr(blockwise, "_flash", counted(flash))
    monkeypatch.setattr(blockwise, "_plain_block", counted(plain))
    rows = pack(given_groups(), budget)
    found, counts = {}, {}
    for way in WAYS:
        model = checkpointed(build_model(name) if name in ("gpt2", "mistral") else build_zoo_model(name), way)
        calls["blocks"] = 0
        for row in rows:
            sums = response_logps(model, row).sums
            (sums * torch.linspace(-1, 1, len(sums)).double()).sum().backward()
        counts[way] = calls["blocks"]
        found[way] = gradients_of(model)
    for gradients in (found["attention"], found["full"]):
        for weight, want in found["none"].items():
            torch.testing.assert_close(gradients[weight], want, rtol=1e-6, atol=1e-9)
    assert counts["none"] == counts["attention"] < counts["full"]


def test_a_graph_runs_backwards_twice() -> None:
    model = checkpointed(build_model("llama"), "attention")
    score = response_logps(model, pack(given_groups())[0]).sums.sum()
    score.backward(retain_graph=True)
    once = gradients_of(model)
    score.backward()
    for name, want in gradients_of(model).items():
        assert torch.equal(once[name], want)


def test_another_layers_attention_would_be_seen() -> None:
    model = checkpointed(build_model("llama"), "attention")
    row = pack(given_groups())[0]
    response_logps(model, row).sums.sum().backward()
    want, outputs = gradients_of(model), []

    def one_list_for_all_layers() -> Any:
        first, again = remembered.remembering, remembered.remembered_as
        return remembered._Checkpointed(outputs, first), remembered._Checkpointed(outputs, again)

    enable_checkpointing(model, context_fn=one_list_for_all_layers)
    response_logps(model, row).sums.sum().backward()
    assert any(not torch.allclose(gradient, want[name]) for name, gradient in gradients_of(model).items())


def kept(model: Any, row: Row) -> int:
    """Bytes that stay alive between the passes, weights and what a row's masks take not counted."""
    alive: Any = WeakTensorKeyDictionary()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, torch.Tensor):
                    alive[each] = each.untyped_storage().nbytes()
            return result

    response_logps(model, row).sums.sum().backward()  # masks are made once
    model.zero_grad()
    with Watch():
        score = response_logps(model, row).sums.sum()
        found = {tensor.untyped_storage().data_ptr(): size for tensor, size in alive.items()}
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    del score
    return sum(size for address, size in found.items() if address not in weights)


def test_memory_is_in_between_and_predicted() -> None:
    rows = [Row.from_groups([Group.from_lists([5] * n, [[7] * n, [8] * n])]) for n in (20, 80)]
    tokens = rows[1].num_tokens - rows[0].num_tokens
    per_token = {}
    for way in WAYS:
        model = checkpointed(build_model("llama").float(), way)
        per_token[way] = (kept(model, rows[1]) - kept(model, rows[0])) / tokens
    assert per_token["full"] < per_token["attention"] < per_token["none"]
    setups = {
        "full": TrainingSetup(gradient_checkpointing=True),
        "attention": TrainingSetup(gradient_checkpointing=True, keeps_attention=True),
    }
    predicted = {
        way: [predict_memory(model, row.num_tokens, setup, targets=len(row.labels)).activations for row in rows]
        for way, setup in setups.items()
    }
    slopes = {way: (long - short) / tokens for way, (short, long) in predicted.items()}
    added = per_token["attention"] - per_token["full"]
    assert slopes["attention"] - slopes["full"] == pytest.approx(added, rel=0.15)
    assert slopes["attention"] == pytest.approx(per_token["attention"], rel=0.5)


SETUPS = {
    "none": TrainingSetup(),
    "attention": TrainingSetup(gradient_checkpointing=True, keeps_attention=True),
    "full": TrainingSetup(gradient_checkpointing=True),
}


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at a time, those that were there before left out."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {each.untyped_storage()._cdata: (StorageWeakRef(each.untyped_storage()), 0) for each in before}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.known = {key: known for key, known in self.known.items() if not known[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return result


@pytest.mark.parametrize("config", CONFIGS_OF_WIDTH, ids=lambda config: config.model_type)
def test_the_peak_of_a_step_is_in_between_and_predicted(config: Any, monkeypatch) -> None:
    # what an allocator holds between blocks in use is not counted here
    monkeypatch.setattr(memory, "_CPU_FRAGMENTS", 0)
    row = Row.from_groups([Group.from_lists([5] * 120, [[7] * 120, [8] * 120])])
    peaks = {}
    for way, setup in SETUPS.items():
        model = checkpointed(AutoModelForCausalLM.from_config(config, attn_implementation="flexdpo"), way)
        # of a step's second row, whose gradients are there
        response_logps(model, row).sums.sum().backward()
        row = row._map(lambda part: part.without_masks() if hasattr(part, "without_masks") else part)
        with Live([*model.parameters(), *(weight.grad for weight in model.parameters())]) as live:
            response_logps(model, row).sums.sum().backward()
        predicted = predict_memory(model, row.num_tokens, setup, targets=len(row.labels))
        assert predicted.activations + predicted.working == pytest.approx(live.peak, rel=0.15), way
        peaks[way] = live.peak
    assert peaks["full"] < peaks["attention"] < peaks["none"]


# --- where users ask for it ------------------------------------------------------------------------------------------


def attention_passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows with every block of queries that a forward pass computes."""
    passes, flash = [], blockwise._flash

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes.append(True)
        return flash(*args, **kwargs)

    monkeypatch.setattr(blockwise, "_flash", counting)
    return passes


def test_the_trainer_keeps_it(tmp_path, tokenizer, preferences, small_model, monkeypatch) -> None:
    passes, found = attention_passes(monkeypatch), {}
    asked: dict[str, dict[str, Any]] = {
        "none": {"activation_checkpointing": False},
        "option": {"keep_attention": True},
        "function": {"activation_checkpointing_kwargs": {"context_fn": flexdpo.keep_attention}},
        "full": {},
    }
    for way, settings in asked.items():
        args = DPOConfig(
            str(tmp_path / way), use_cpu=True, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, prove=False,
            **{"activation_checkpointing": True, **settings},
        )  # fmt: skip
        again = json.loads(args.to_json_string())
        assert again["keep_attention"] is args.keep_attention is (way in ("option", "function"))
        assert DPOConfig(**again).activation_checkpointing_kwargs == args.activation_checkpointing_kwargs
        assert TrainingSetup.from_arguments(args).keeps_attention is args.keep_attention
        trainer = DPOTrainer(small_model("llama"), None, args, train_dataset=preferences, processing_class=tokenizer)
        passes.clear()
        trainer.train()
        lines = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
        found[way] = torch.tensor(lines), len(passes)
    for way in ("option", "function", "full"):
        torch.testing.assert_close(found[way][0], found["none"][0], rtol=1e-5, atol=1e-6)
    counts = {way: count for way, (_, count) in found.items()}
    # with checkpoints the policy's passes run twice, the reference's once
    assert counts["option"] == counts["function"] == counts["none"] > 0
    assert counts["full"] == pytest.approx(1.5 * counts["none"])


def test_a_step_of_ones_own_keeps_it(monkeypatch) -> None:
    passes, found = attention_passes(monkeypatch), {}
    for way in WAYS:
        model = checkpointed(build_model("gpt2"), way)
        step = make_train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), beta=0.3, max_tokens_per_row=41)
        passes.clear()
        results = [step(given_groups()) for _ in range(2)]
        found[way] = torch.stack([each for result in results for each in (result.loss, result.grad_norm)]), len(passes)
    for way in ("attention", "full"):
        torch.testing.assert_close(found[way][0], found["none"][0], rtol=1e-9, atol=1e-12)
    assert found["attention"][1] == found["none"][1] < found["full"][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_checkpointing": False}, "keep_attention=True has no effect without activation_checkpointing"),
        ({"attn_impl": "flex"}, r"this run has attn_impl='flex'; leave one of them out"),
        ({"torch_compile": True}, r"this run has torch_compile; leave one of them out"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, r"not reentrant.*use_reentrant=True"),
        (
            {"keep_attention": False, "activation_checkpointing_kwargs": {"offload": True}},
            r"has offload=True, which moves activations from a GPU .* this run is on a CPU; leave it out",
        ),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str, tmp_path) -> None:
    with pytest.raises(FlexdpoError, match=message):
        DPOConfig(str(tmp_path), use_cpu=True, **{"activation_checkpointing": True, "keep_attention": True, **settings})


def test_a_transformers_that_cannot_offload_says_so(monkeypatch) -> None:
    def enable(self: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(PreTrainedModel, checkpointing_name(PreTrainedModel, "_enable"), enable)
    for name in ("offload", "every_n_layers"):
        with pytest.raises(FlexdpoError, match=rf"{name}=2, which transformers \S+ does not know yet"):
            checkpoint_arguments({name: 2}, attention=False, impl="flex", compiled=False, device="cuda")


def test_layers_between_checkpoints_and_what_lies_on_the_host_are_counted() -> None:
    model = build_model("llama")
    every = predict_memory(model, 100, SETUPS["full"]).activations
    half = predict_memory(model, 100, replace(SETUPS["full"], every_n_layers=2)).activations
    none = predict_memory(model, 100, SETUPS["none"]).activations
    # of two layers the second one is kept as a whole
    assert half - every == none - half
    assert predict_memory(model, 100, replace(SETUPS["full"], offload=True)).activations == every - 2 * 100 * 64 * 4


def test_where_attention_cannot_be_kept() -> None:
    row = pack(given_groups())[0]
    model = checkpointed(build_model("llama").float(), "attention")
    prepare_model(model, impl="flex")
    with pytest.raises(FlexdpoError, match=r"context_fn=keep_attention keeps .* this is 'flex'; leave context_fn out"):
        response_logps(model, row)
