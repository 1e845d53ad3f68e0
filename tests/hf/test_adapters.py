"""Which adapters a packed row can be exact with: the model is asked, with the adapter's weights moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flexdpo import UnsupportedModelError, make_train_step, parity_probe, prepare_model, share_prefixes
from tests.hf.architectures import build_model

peft = pytest.importorskip("peft")
lora = pytest.importorskip("peft.tuners.lora.layer")

MIXES = (
    r"LORA computes something from all tokens of a batch at once: .* move the first one's logits by \d.*such as LoRA"
)


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(build_model(name, dtype=dtype), config)


def _mean_over_batch(delta: torch.Tensor) -> torch.Tensor:
    return delta * delta.mean(dim=0, keepdim=True).sigmoid()


def _mean_over_sequence(delta: torch.Tensor) -> torch.Tensor:
    return delta * delta.mean(dim=1, keepdim=True).sigmoid()


def _next_token(delta: torch.Tensor) -> torch.Tensor:
    return delta + delta.roll(-1, dims=1)


def _flattened_norm(delta: torch.Tensor) -> torch.Tensor:
    return delta / (1 + delta.norm())


def mixing(monkeypatch: pytest.MonkeyPatch, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let LoRA's own part of every layer look at other tokens; a fresh one adds 0 all the same."""
    forward = lora.Linear.forward

    def mixed(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = self.base_layer(x, *args, **kwargs)
        return plain + mix(forward(self, x, *args, **kwargs) - plain)

    monkeypatch.setattr(lora.Linear, "forward", mixed)


@pytest.mark.parametrize("mix", [_mean_over_batch, _mean_over_sequence, _next_token, _flattened_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_mixes_tokens_is_refused_while_it_still_adds_nothing(
    mix: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(dtype=dtype)
    prepare_model(model)
    mixing(monkeypatch, mix)
    for enter in (prepare_model, share_prefixes, lambda m: make_train_step(m, torch.optim.SGD(m.parameters(), lr=0.1))):
        with pytest.raises(UnsupportedModelError, match=MIXES):
            enter(model)
    assert parity_probe(model).verdict == "refused"


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_asking_refuses_no_exact_adapter_and_leaves_it_alone(name: str, dtype: torch.dtype) -> None:
    model = adapted(name, dtype).train()
    before, states = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    prepare_model(model)
    assert model.training
    assert torch.equal(states, torch.get_rng_state())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_whose_result_hangs_on_its_last_bit_is_refused(dtype: torch.dtype) -> None:
    """HRA begins with equal vectors in pairs; orthogonal to each other, of the second only rounding is left."""

    def begun(**changes: Any) -> Any:
        config = peft.HRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
        return peft.get_peft_model(build_model("llama", dtype=dtype), config)

    with pytest.raises(UnsupportedModelError, match="rounding alone decides what the adapter HRA does where it stands"):
        prepare_model(begun(apply_GS=True))
    prepare_model(begun())
    prepare_model(begun(apply_GS=True, init_weights=False))
