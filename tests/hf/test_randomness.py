"""Random numbers in a model: found by asking it, set to zero where a setting allows, refused by name otherwise."""

from __future__ import annotations

import copy
import random
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from flexdpo import (
    FlexdpoError,
    Group,
    Row,
    UnsupportedModelError,
    disable_dropout,
    make_train_step,
    prepare_model,
    response_logps,
    share_prefixes,
    sharing_stats,
)
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.hf.draws import RandomState, draws_by_module
from tests.conftest import build_model as tiny_model
from tests.hf.architectures import available_or_skip, build_model, build_or_skip, skipped_before_its_time
from tests.hf.equivalence import example_groups, example_row
from tests.hf.test_architectures import EXACT

if TYPE_CHECKING:
    from collections.abc import Callable

_RATES = ("drop", "jitter", "noise")


def rates_of(name: str, rate: float = 0.1) -> dict[str, Any]:
    """Every setting of a config that looks like a rate, switched on; those of nested configs too."""
    architecture = available_or_skip(name)
    config = getattr(transformers, architecture.config_class)(**architecture.config)

    def switched(settings: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in settings.items():
            if isinstance(value, dict) and (inside := switched(value)):
                found[key] = {**value, **inside}
            elif type(value) in (int, float) and any(part in str(key) for part in _RATES):
                found[key] = rate
        return found

    return switched(config.to_dict())


def build_random(name: str, **kwargs: Any) -> Any:
    try:
        return build_or_skip(name, dtype=torch.float32, **{**rates_of(name), **kwargs}).train()
    except ValueError as error:
        pytest.skip(f"{name} takes no such rate: {error!r:.120}")


# --- the first loss --------------------------------------------------------------------------------------------------

# rates in plain attributes, in dropout modules, in the config, layers that are skipped, routers with jitter
SPREAD = {"opt", "starcoder2", "gpt_bigcode", "mixtral", "biogpt"}
# it draws experts at random in training, whatever its noises are set to
REFUSED = {"phimoe": "PhimoeTopKRouter .*draw random numbers in training.* no setting stops it"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SPREAD else pytest.mark.zoo) for n in EXACT])
def test_the_first_loss_is_log_two(name: str) -> None:
    """In train mode, with every rate of the config at 0.1, one and three rows per step; or a refusal."""
    model = build_random(name)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
            disable_dropout(model)
        return
    groups = [*example_groups(), *example_groups(seed=1)[:1]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    longest = max(step_tokens(group) for group in groups)
    for budget in (None, longest):
        with skipped_before_its_time():
            step = make_train_step(model, optimizer, max_tokens_per_row=budget)
            assert step(groups).loss.item() == pytest.approx(np.log(2), abs=1e-6)


def step_tokens(group: Any) -> int:
    return group.prompt_ids.size + sum(response.size for response in group.response_ids)


# --- asking ----------------------------------------------------------------------------------------------------------


class Noise(nn.Module):
    """Adds noise from a source of its own after a linear layer, in training."""

    def __init__(self, inner: nn.Module, source: Callable[[], float], *, at_least: int = 0) -> None:
        super().__init__()
        self.inner, self.source, self.at_least, self.level = inner, source, at_least, 0.5
        self.register_buffer("calls", torch.zeros(()))
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.training and self.level > 0 and x.shape[1] >= self.at_least:
            x = x + self.level * self.source(self)
        return self.inner(x)


SOURCES = {
    "torch": lambda _: torch.randn(()),
    "numpy": lambda _: float(np.random.rand()),  # noqa: NPY002
    "python": lambda _: random.random(),
    "its own generator": lambda noise: torch.randn((), generator=noise.generator),
    "none that can be looked at": lambda _: 10 * float(np.random.default_rng().random()),
}


def noisy(source: str, **kwargs: Any) -> Any:
    model = build_model("llama", dtype=torch.float32)
    layer = model.model.layers[1]
    layer.mlp = Noise(layer.mlp, SOURCES[source], **kwargs)
    return model.train()


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_any_source_is_found_and_set_to_zero(source: str) -> None:
    model = noisy(source)
    found = draws_by_module(model)
    assert set(found) == ({""} if source.startswith("none") else {"model.layers.1.mlp"})
    if source.startswith("none"):
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
            disable_dropout(model)
        return
    disable_dropout(model)
    assert model.model.layers[1].mlp.level == 0
    assert not draws_by_module(model)


def test_asking_leaves_everything_as_it_was() -> None:
    model = noisy("torch")
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tensors = copy.deepcopy(model.state_dict())
    before = RandomState.now()
    draws_by_module(model)
    assert not RandomState.now().differs(before)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_rates_are_changed() -> None:
    """Settings that matter in evaluation, and those that stop nothing, keep their values."""
    model = build_random("opt")
    model.model.decoder.layers[0].scaling = 0.25
    config = copy.deepcopy(model.config)
    disable_dropout(model)
    assert model.model.decoder.layers[0].scaling == 0.25
    assert model.config.init_std == config.init_std
    attention = model.model.decoder.layers[0].self_attn
    assert attention.scaling != 0
    assert (attention.dropout, model.model.decoder.layerdrop) == (0, 0)


def test_a_model_without_weights_is_taken_by_its_names() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(build_model("opt", **rates_of("opt")).config)
    assert draws_by_module(model) is None
    disable_dropout(model)
    assert model.model.decoder.layers[0].dropout == 0


def test_half_precision_and_checkpointing() -> None:
    model = build_random("mixtral").to(torch.bfloat16)
    enable_checkpointing(model)
    disable_dropout(model)
    assert not draws_by_module(model)
    prepare_model(model)(**example_row().inputs())


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "lora": lambda: peft.LoraConfig(lora_dropout=0.1, task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(module_dropout=0.3, rank_dropout=0.3, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(module_dropout=0.3, rank_dropout=0.3, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(vera_dropout=0.1, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", ["lora", "loha", pytest.param("lokr", marks=pytest.mark.zoo), "vera"])
def test_rates_of_adapters(kind: str) -> None:
    """Fresh adapters add nothing, so what they draw does not show in the result; it is found all the same."""
    model = prepare_model(peft.get_peft_model(build_model("llama", dtype=torch.float32), ADAPTERS[kind]())).train()
    row = example_row()
    with pytest.raises(UnsupportedModelError, match=r"draw random numbers .*flexdpo\.disable_dropout\(model\)"):
        response_logps(model, row)
    disable_dropout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    torch.testing.assert_close(response_logps(model, row).sums, response_logps(model, row).sums, rtol=0, atol=0)


# --- where rows are run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "starcoder2", "gpt_bigcode"])
def test_a_loop_of_ones_own(name: str) -> None:
    model = prepare_model(build_random(name))
    with pytest.raises(UnsupportedModelError, match=r"call flexdpo\.disable_dropout\(model\)"):
        response_logps(model, example_row())
    response_logps(model.eval(), example_row())
    disable_dropout(model)
    response_logps(model.train(), example_row())


def test_what_is_random_on_long_rows_only() -> None:
    model = prepare_model(noisy("torch", at_least=20))
    disable_dropout(model)
    with pytest.raises(UnsupportedModelError, match=r"Noise \(layers\.1\.mlp\) draws random numbers while a packed"):
        model(**example_row().inputs())


def test_a_row_longer_than_the_table_of_positions() -> None:
    """A draw that comes to nothing is looked into at the row's own positions, not at its 300 row indices."""
    model = prepare_model(tiny_model("gpt2"))
    model.transformer.h[0].register_forward_hook(lambda *_: torch.rand(()) < 0 or None)
    row = Row.from_groups([Group.from_lists([5] * 100, [[7] * 100, [8] * 100])])
    assert row.num_tokens > model.config.n_positions
    response_logps(model.train(), row)


def test_the_drop_in_asks_again_when_something_changes() -> None:
    batch = {"input_ids": torch.arange(20, 60).repeat(4, 1), "use_cache": False}
    batch["input_ids"][1:, -4:] += torch.arange(1, 4)[:, None]
    model = build_model("starcoder2", dtype=torch.float32, residual_dropout=0.1).train()
    share_prefixes(model)
    with warnings.catch_warnings(record=True):
        model(**batch)
    model.eval()(**batch)
    model.train()
    for module in model.modules():
        if hasattr(module, "residual_dropout"):
            module.residual_dropout = 0.0
    model(**batch)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    model(**batch)
    stats = sharing_stats(model)
    assert stats.batches_shared == 2
    assert stats.passed_through == {"random": 2}


def test_noise_in_the_arguments() -> None:
    from flexdpo import DPOConfig

    with pytest.raises(FlexdpoError, match=r"neftune_noise_alpha=5.* leave it out"):
        DPOConfig("unused", neftune_noise_alpha=5)
