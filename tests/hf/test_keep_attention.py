"""Checkpoints that keep what attention came to: same gradients, no attention computed again, memory in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

import flexdpo
from flexdpo import FlexdpoError, Group, Row, pack, prepare_model, response_logps
from flexdpo.attention import blockwise, remembered
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.training.memory import TrainingSetup, predict_memory
from tests.conftest import build_model
from tests.hf.architectures import build_model as build_zoo_model
from tests.objective.test_piecewise import given_groups
from tests.test_equivalence import gradients_of

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


def test_where_attention_cannot_be_kept() -> None:
    row = pack(given_groups())[0]
    model = checkpointed(build_model("llama").float(), "attention")
    prepare_model(model, impl="flex")
    with pytest.raises(FlexdpoError, match=r"context_fn=keep_attention keeps .* this is 'flex'; leave context_fn out"):
        response_logps(model, row)
