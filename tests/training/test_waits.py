"""A step waits for the device once, where it looks at the loss: run on a device that has nothing to give back.

Tensors of the ``meta`` device have no values. Whatever would wait for a GPU cannot be done with them: reading a number,
choosing by a mask, counting, comparing. What can be done but waits all the same, a copy from the host's pageable
memory, is found by a dispatch mode.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flexdpo
from flexdpo import Group
from flexdpo.attention import kernels
from flexdpo.objective.lm_head import head_plan
from flexdpo.objective.unpaired import LabelledGroup
from flexdpo.training.finite import StepGuard
from tests.conftest import CONFIGS

META = torch.device("meta")


class NoCopies(TorchDispatchMode):
    """Stops at copies from the host that wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = func(*args, **kwargs)
        to_device = isinstance(result, torch.Tensor) and result.device == META
        from_host = any(x.device.type == "cpu" and x.ndim > 0 for x in tensors)
        if name in ("_to_copy", "copy_") and to_device and from_host and not (kwargs.get("non_blocking") or args[2:]):
            raise AssertionError(f"{name} from the host waits for the device")
        return result


class NoLiterals(TorchFunctionMode):
    """Stops at tensors that the host makes of numbers for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.Tensor.new_tensor)
        if made and result.device == META and not (isinstance(args[0], torch.Tensor) and func is torch.as_tensor):
            raise AssertionError(f"{func.__name__} of numbers waits for the device")
        return result


def without_values(inputs: Any, row_mask: Any) -> Any:
    """Attention in FlexAttention's place; it looks at all that a kernel is given."""
    mask = row_mask.block_mask
    assert mask.kv_indices.device == mask.full_q_indices.device == META
    query, key, value = inputs[:3]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The waits that are documented, as they come, behind the calls of attention."""
    found: list[str] = []

    def attend(inputs: Any, row_mask: Any) -> Any:
        if found[-1:] != ["attention"]:
            found.append("attention")
        return without_values(inputs, row_mask)

    monkeypatch.setattr(kernels, "run_flex", attend)
    # torch has no autocast on this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(StepGuard, "require_finite", lambda *_, **__: found.append("finite"))
    return found


def on_meta(name: str) -> Any:
    model = flexdpo.prepare_model(flexdpo_model(name), impl="flex")
    # as the step does, since the head is measured once per model and its settings: here, before the first step
    flexdpo.disable_dropout(model)
    # a rate that nothing reads: a model on this device cannot be asked, so the step sets it to 0 as well
    if hasattr(model.config, "summary_first_dropout"):
        model.config.summary_first_dropout = 0.0
    head_plan(model)
    return model.to(META)


def flexdpo_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM, Gemma2Config

    configs = CONFIGS | {
        "gemma2": lambda: Gemma2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=97,
            sliding_window=9,
        )
    }
    return AutoModelForCausalLM.from_config(configs[name]())


PAIRS = [
    Group.from_lists([5] * 9, [[6, 7, 8], [6, 9]]),
    Group.from_lists([4] * 7, [[3], [8, 8], [9]], [(0, 1), (2, 1)]),
]
RANKED = [Group.from_lists([5] * 9, [[6, 7, 8], [6, 9], [7]], [(0, 1), (1, 2)])]
LABELLED = [
    LabelledGroup(np.full(9, 5), (np.array([6, 7, 8]), np.array([6, 9])), (), labels=(True, False)),
    LabelledGroup(np.full(7, 4), (np.array([3]), np.array([8, 8])), (), labels=(False, None)),
]
STEPS = {
    "sigmoid": (PAIRS, {}),
    "ld": (PAIRS, {"ld_alpha": 0.5}),
    "wpo": (PAIRS, {"use_weighting": True, "rpo_alpha": 0.1}),
    "sft": (PAIRS, {"loss_type": ["sigmoid", "sft"], "loss_weights": (1.0, 0.5)}),
    "aot": (PAIRS, {"loss_type": "aot"}),
    "orpo": (PAIRS, {"loss_type": "orpo"}),
    "plackett_luce": (RANKED, {"loss_type": "plackett_luce"}),
    "kto": (LABELLED, {"loss_type": "kto"}),
}


RUNS = [("llama", step) for step in STEPS] + [(model, "sigmoid") for model in ("mistral", "gpt2", "gemma2")]


@pytest.mark.parametrize(("model", "step"), RUNS)
def test_a_step_waits_once(waits: list[str], model: str, step: str) -> None:
    groups, settings = STEPS[step]
    policy, reference = on_meta(model), on_meta(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    needs = settings.get("loss_type") not in ("orpo",)
    run = flexdpo.make_train_step(
        policy, optimizer, ref_model=reference if needs else None, impl="flex", max_tokens_per_row=64, **settings
    )
    with NoCopies(), NoLiterals():
        for _ in range(2):
            run(copy.deepcopy(groups))
    # attention is what the step gives the kernel of a GPU: a stand-in for tensors without values would hide its waits
    assert waits == ["attention", "finite"] * 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.bincount(x.long(), minlength=9),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.tensor(3, device=x.device),
        lambda x: x.new_tensor(3),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        torch.unique,
        lambda x: torch.equal(x, x + 1),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_each_wait_is_found(wait: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoCopies(), NoLiterals():
        wait(torch.zeros(3, device=META))
