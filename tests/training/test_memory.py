"""Predicted memory against what autograd keeps and what a process takes, and the row budget that follows from it."""

import ctypes
import gc
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, TrainingArguments

from flexdpo import Group, Row, disable_dropout, prepare_model, response_logps
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.estimate import model_shapes
from flexdpo.estimate.model_shapes import shape_config
from flexdpo.hf.checkpointing import checkpointing_name, enable_checkpointing
from flexdpo.training import kept_bytes, memory
from flexdpo.training.memory import (
    TrainingSetup,
    auto_row_budget,
    free_memory,
    kept_bytes_per_layer,
    predict_memory,
    predict_padded_memory,
)
from flexdpo.training.meta_mode import autocast_on_meta
from flexdpo.training.model_size import ModelSize
from tests.conftest import CONFIGS, build_model
from tests.hf.architectures import available_or_skip, build_or_skip, needs_states, zoo
from tests.images.models import make_model

GIGABYTE = 10**9


def row_of(third: int) -> Row:
    return Row.from_groups([Group.from_lists([5] * third, [[7] * third, [8] * third])])


def kept_by_autograd(model: torch.nn.Module, row: Row) -> int:
    """Bytes of all distinct storages that autograd saves in a forward pass, weights not counted."""
    kept, sizes = [], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # alive, so that no address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        response_logps(model, row).sums.sum()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for address, size in sizes.items() if address not in weights)


def kept_and_predicted_per_token(model: torch.nn.Module, setup: TrainingSetup) -> tuple[float, float]:
    short, long = row_of(20), row_of(80)
    slope = (kept_by_autograd(model, long) - kept_by_autograd(model, short)) / (long.num_tokens - short.num_tokens)
    predicted = [
        predict_memory(model, row.num_tokens, setup, targets=int(row.labels.numel())).activations
        for row in (short, long)
    ]
    return slope, (predicted[1] - predicted[0]) / (long.num_tokens - short.num_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_activations_per_token_are_what_autograd_keeps(name, checkpointing, dtype) -> None:
    model = build_model(name).to(dtype)
    prepare_model(model)
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    setup = TrainingSetup(dtype.itemsize, dtype.itemsize, gradient_checkpointing=checkpointing)
    slope, per_token = kept_and_predicted_per_token(model, setup)
    # never below what is kept; with checkpoints little is kept, and layout vectors weigh more
    assert slope <= per_token <= slope * (1.1 if not checkpointing else 1.5)


def asked(model: torch.nn.Module, *, autocast: bool = False) -> tuple[ModelSize, float]:
    """A model, asked, and what the prediction per token is of what autograd keeps."""
    disable_dropout(prepare_model(model).train())
    width = model.get_input_embeddings().weight.element_size()
    setup = TrainingSetup(width, 2 if autocast else width, autocast=autocast)
    size = setup.measured(model)
    # whole chunks, since a scan pads its last one
    rows = row_of(64), row_of(192)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = [kept_by_autograd(model, row) for row in rows]
    predicted = [
        predict_memory(size, row.num_tokens, setup, targets=int(row.labels.numel())).activations for row in rows
    ]
    return size, (predicted[1] - predicted[0]) / (kept[1] - kept[0])


# four norms to a layer, experts, latent attention, and heads of several widths
@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "gemma4_text"])
def test_what_uncommon_layers_keep_is_asked_of_the_model(name: str) -> None:
    model = build_or_skip(name, dtype=torch.bfloat16)
    size, ratio = asked(model)
    assert 0.97 <= ratio <= 1.1
    # the formula for common layers knows nothing of what these keep
    half, single = size.kept, TrainingSetup().measured(model).kept
    assert half is not None
    assert single is not None
    assert half.layers > 1.1 * size.layers * kept_bytes_per_layer(size, TrainingSetup(2, 2))
    assert half.layers < single.layers < 2 * half.layers
    assert half.most <= half.layers


def adapted(model: torch.nn.Module, **settings: Any) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(r=8, **settings))


def last_layer_alone(model: Any) -> torch.nn.Module:
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    return model


TRAINED = {
    "all": lambda model: model,
    "the last layer": last_layer_alone,
    "LoRA": partial(adapted, target_modules=["q_proj", "v_proj"]),
    "LoRA on all": partial(adapted, target_modules="all-linear"),
    "DoRA": partial(adapted, target_modules=["q_proj", "down_proj"], use_dora=True),
    "LoRA, words": partial(adapted, target_modules=["q_proj", "embed_tokens"]),
    "LoRA, saved": partial(adapted, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
}


# an adapter is float32 beside weights in halves too
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)], ids=["mixed", "half"])
@pytest.mark.parametrize("trained", list(TRAINED))
def test_what_a_model_keeps_that_is_trained_in_part(trained: str, dtype: torch.dtype, autocast: bool) -> None:
    size, ratio = asked(TRAINED[trained](build_model("llama").to(dtype)), autocast=autocast)
    assert 1 <= ratio <= 1.1
    assert size.kept is not None


@pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "set_experts_implementation"), reason="experts run in one way only"
)
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)], ids=["mixed", "half"])
@pytest.mark.parametrize("trained", ["all", "LoRA on all"])
def test_what_experts_keep_that_are_multiplied_in_one_go(trained: str, dtype: torch.dtype, autocast: bool) -> None:
    model = build_or_skip("qwen3_moe", dtype=dtype)
    model.set_experts_implementation("grouped_mm")
    size, ratio = asked(TRAINED[trained](model), autocast=autocast)
    assert 1 <= ratio <= 1.1
    assert size.kept is not None


class Packed(torch.nn.Linear):
    """A layer whose weights lie in a form of their own, as quantised ones do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.view(torch.float32))


def test_packed_weights_keep_what_plain_ones_keep(tmp_path) -> None:
    plain = adapted(build_model("llama").float(), target_modules=["q_proj"])
    packed = adapted(build_model("llama").float(), target_modules=["q_proj"])
    for module in packed.modules():
        if type(module) is torch.nn.Linear and not module.weight.requires_grad and module.out_features != 97:
            module.__class__ = Packed
            module.weight = torch.nn.Parameter(module.weight.data.view(torch.uint8), requires_grad=False)
    one, other = asked(packed), asked(plain)
    assert one[0].kept == other[0].kept is not None
    assert one[1] == pytest.approx(other[1], rel=0.02)
    args = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True)
    setup = TrainingSetup.from_arguments(args, packed.half())
    assert (setup.weight_bytes, setup.compute_bytes, setup.autocast) == (2, 2, True)


def test_a_model_is_asked_again_when_other_weights_are_trained() -> None:
    model, setup = prepare_model(build_model("llama").float()), TrainingSetup()
    whole = setup.measured(model)
    last_layer_alone(model)
    part = setup.measured(model)
    assert whole.kept is not None
    assert part.kept is not None
    assert part.kept.layers < 0.6 * whole.kept.layers
    assert setup.measured(model).kept is part.kept


def test_a_frozen_head_has_no_gradient() -> None:
    setup, model = TrainingSetup(), build_model("llama").float()
    adapter = adapted(build_model("llama").float(), target_modules=["q_proj"])
    one, other = (predict_memory(each, 1, setup, targets=1).working for each in (model, adapter))
    assert other < one


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(zoo()))
def test_every_kind_of_model_tells_what_it_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available_or_skip(name).exact:
        pytest.skip("is not trained here")
    told: list[str] = []
    monkeypatch.setattr(kept_bytes.logger, "warning", told.append)
    kept_bytes._of_config.cache_clear()  # several kinds have one config
    try:
        size, ratio = asked(build_or_skip(name, dtype=torch.bfloat16))
    except UnsupportedModelError:
        pytest.skip("is not trained in train mode, or on rows as long as these")
    if size.kept:
        assert 0.95 <= ratio <= 1.2
        assert size.kept.layers > size.kept.outside
    else:
        assert "is predicted by a formula for the common layers" in told[0]


def test_a_model_whose_values_decide_is_predicted_by_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deciding(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            if input_ids[0, 0].item() > 3:
                kwargs["use_cache"] = False
            return super().forward(input_ids, **kwargs)

    told: list[str] = []
    monkeypatch.setattr(kept_bytes.logger, "warning", told.append)
    model = Deciding(CONFIGS["llama"]())
    assert TrainingSetup().measured(model).kept is None
    assert re.fullmatch(r"llama: memory is predicted by a formula .*meta device .*item.* max_tokens_per_row .*", *told)


def test_a_model_is_asked_as_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(kept_bytes.logger, "warning", told.append)
    rates, changes = ("attn_pdrop", "resid_pdrop", "embd_pdrop"), {"n_layer": 1, "n_embd": 32, "n_head": 2}
    # dropout is set to 0
    config = GPT2Config(**changes, vocab_size=50, bos_token_id=0, eos_token_id=0)
    without = GPT2Config(**changes, vocab_size=50, bos_token_id=0, eos_token_id=0, **dict.fromkeys(rates, 0.0))
    one, other = (TrainingSetup().measured(each).kept for each in (config, without))
    assert one == other is not None
    # whatever a config holds beside
    config.note = {np.int64(1), print}
    assert TrainingSetup().measured(config).kept == one
    assert not told


def uncopied(model: Any) -> Any:
    """With a hook that the meta device has no values for."""
    model.register_forward_pre_hook(lambda _, args, kwargs: kwargs["input_ids"].sum().item(), with_kwargs=True)
    return model


def test_a_model_that_cannot_be_copied_is_asked_as_its_config_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(kept_bytes.logger, "warning", told.append)
    model = uncopied(last_layer_alone(build_model("llama").float()))
    assert TrainingSetup().measured(model).kept == TrainingSetup().measured(model.config).kept
    assert re.fullmatch(r"llama: memory is predicted as if all weights .*item.* max_tokens_per_row .*", *told)


def test_two_classes_of_one_name_are_two() -> None:
    def kind(activation: nn.Module) -> Any:
        class Own(LlamaForCausalLM):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.model.layers[0].mlp.act_fn = activation

        return Own(CONFIGS["llama"]())

    kinds = (kind(nn.SiLU()), kind(nn.Sequential(nn.SiLU(), nn.GELU())))
    one, other = (TrainingSetup().measured(uncopied(each)).kept for each in kinds)
    assert one is not None
    assert other is not None
    assert one.most < other.most


@pytest.mark.parametrize("make", [lambda config: config, LlamaForCausalLM], ids=["config", "model"])
def test_nothing_is_left_of_a_model_that_was_asked(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, ask = [], kept_bytes._asked

    def watched(model: Any, autocast: bool) -> Any:
        made.extend(map(weakref.ref, model.parameters()))
        return ask(model, autocast)

    monkeypatch.setattr(kept_bytes, "_asked", watched)
    assert TrainingSetup().measured(make(LlamaConfig(num_hidden_layers=1, hidden_size=192, vocab_size=97))).kept
    gc.collect()
    assert made
    assert not any(weight() is not None for weight in made)


@pytest.mark.parametrize("make", [lambda config: config, LlamaForCausalLM], ids=["config", "model"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_is_asked_where_nothing_is_kept(mode: Any, make: Any) -> None:
    config = LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=97)
    want = TrainingSetup().measured(make(config)).kept
    kept_bytes._of_config.cache_clear()
    with mode():
        assert TrainingSetup().measured(make(config)).kept == want is not None
        assert not torch.is_grad_enabled()


def test_models_are_asked_in_several_threads() -> None:
    torch_asks, configs = torch.is_autocast_enabled, [LlamaConfig(num_hidden_layers=layers) for layers in (1, 2, 3, 4)]
    ask = partial(kept_bytes.kept_bytes, weight_bytes=4, autocast=True)
    want = [ask(config) for config in configs]
    kept_bytes._of_config.cache_clear()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, configs)) == want
    with autocast_on_meta(enabled=True):
        assert torch.is_autocast_enabled(device_type="cpu") is torch.is_autocast_enabled("cpu") is True
        assert torch.is_autocast_enabled(device_type="meta") is True
        assert torch.is_autocast_enabled() is False
    # torch is left as it was
    assert torch.is_autocast_enabled is torch_asks


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text"])
def test_numbers_that_differ_from_layer_to_layer(name: str) -> None:
    architecture = available_or_skip(name)
    config = getattr(transformers, architecture.config_class)(**architecture.config)
    model = build_or_skip(name)
    widths = [module.head_dim for module in model.modules() if hasattr(module, "num_key_value_groups")]
    assert min(widths) <= ModelSize.of(config).head_dim <= max(widths)
    assert predict_memory(config, 1000) == predict_memory(model, 1000)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_the_layers_of_a_tower_are_not_taken_for_those_of_the_text(name: str) -> None:
    model = make_model(name, dtype=torch.float32)
    assert any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    prepare_model(model)
    slope, per_token = kept_and_predicted_per_token(model, TrainingSetup())
    assert slope <= per_token <= slope * 1.1


@needs_states
@pytest.mark.parametrize("name", list(model_shapes.HYBRIDS))
def test_what_scans_keep_is_counted(name: str) -> None:
    model = model_shapes.build_model(shape_config(name), torch.device("cpu"), torch.float32)
    prepare_model(model)
    # whole chunks, since a scan pads its last one
    rows = row_of(64), row_of(192)
    kept = [kept_by_autograd(model, row) for row in rows]
    predicted = [
        predict_memory(model, row.num_tokens, TrainingSetup(), targets=int(row.labels.numel())).activations
        for row in rows
    ]
    assert predicted[1] - predicted[0] == pytest.approx(kept[1] - kept[0], rel=0.2)


@needs_states
def test_states_leave_less_room_in_a_row() -> None:
    size = ModelSize.of(shape_config("qwen3-next-tiny"))
    without = replace(size, state=0, state_heads=0, state_layers=0)
    setup = TrainingSetup()
    assert size.scan_products > 0
    with_scan, plain = (auto_row_budget(each, setup, device="cpu", free=GIGABYTE) for each in (size, without))
    assert with_scan < 0.8 * plain


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_real_step_is_predicted() -> None:
    model = model_shapes.build_model(shape_config("tiny"), torch.device("cpu"), torch.float32)
    prepare_model(model)

    def step(third: int) -> None:
        response_logps(model, row_of(third)).sums.sum().backward()
        model.zero_grad(set_to_none=True)

    def peak(third: int) -> int:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step(third)
        return _status("VmHWM") - before

    step(50)
    measured = peak(900)
    predicted = predict_memory(model, 2700, TrainingSetup(reference=False), targets=1800)
    assert predicted.total - predicted.weights - predicted.optimizer == pytest.approx(measured, rel=0.3)


def test_the_sum_by_hand() -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, vocab_size=10, tie_word_embeddings=False,
    )  # fmt: skip
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8
    parameters = 3 * layer + 2 * 10 * 8 + 8
    size = ModelSize.of(config)
    assert size.parameters == parameters
    predicted = predict_memory(size, 128, TrainingSetup(weight_bytes=2, compute_bytes=2))
    assert predicted.weights == predicted.gradients == predicted.reference == 2 * parameters
    assert predicted.optimizer == 2 * 2 * parameters
    assert predicted.fixed == 2 * parameters * 5
    # two norms of 4 + 2 + 2 bytes; queries and the output twice, keys and values; two normalisers; four wide ones
    assert kept_bytes_per_layer(size, TrainingSetup(2, 2)) == 2 * 8 * 8 + 2 * (3 * 8 + 2 * 4) + 4 * 2 + 2 * 4 * 16


def test_what_changes_memory_changes_the_prediction() -> None:
    def total(tokens: int = 8192, **changed: object) -> int:
        settings = {"weight_bytes": 2, "compute_bytes": 2, "device_type": "cuda"} | changed
        return predict_memory(shape_config("llama-8b"), tokens, TrainingSetup(**settings)).total

    whole = total()
    weights = 2 * 8_030_261_248
    assert total(reference=False) == whole - weights
    assert total(optimizer="sgd") == whole - 2 * weights
    assert total(optimizer="paged_adamw_8bit") == whole - weights
    assert total(trainable=10**6) < whole - 2.9 * weights
    assert total(gradient_checkpointing=True) < whole - 20 * GIGABYTE
    assert total(shards=8) < whole - 4 * weights
    assert total(weight_bytes=4) > whole + 5 * weights
    assert total(tokens=16384) > whole + 20 * GIGABYTE


def test_a_padded_step_holds_all_logits() -> None:
    config = shape_config("llama-160m")
    more = predict_padded_memory(config, 4096).total - predict_memory(config, 4096, targets=400).total
    # logits and their gradient, less a chunk of them
    assert more == pytest.approx(2 * 4096 * 32000 * 4, rel=0.3)


def test_a_model_that_is_trained_in_part_says_so(tmp_path) -> None:
    args = TrainingArguments(str(tmp_path), bf16=False, use_cpu=True, **{checkpointing_name(TrainingArguments): True})
    model = build_model("llama").float()
    everything = TrainingSetup.from_arguments(args, model)
    assert everything.trainable == ModelSize.of(model).parameters
    assert everything.gradient_checkpointing
    assert "adamw" in everything.optimizer
    assert (everything.weight_bytes, everything.device_type) == (4, "cpu")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    setup = TrainingSetup.from_arguments(args, adapted, reference=False)
    assert setup.trainable == 2 * (64 * 2 + 2 * 64)
    assert predict_memory(adapted, 100, setup).gradients == 4 * setup.trainable


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_budget_is_the_largest_that_fits(device) -> None:
    size = ModelSize.of(shape_config("llama-1b"))
    setup = TrainingSetup(2, 2, device_type=device)
    unit, usable = 128 if device == "cuda" else 1, 30 * GIGABYTE * (1 - memory.MARGIN)
    budget = auto_row_budget(size, setup, device=device, free=30 * GIGABYTE)
    assert budget % unit == 0
    assert predict_memory(size, budget, setup).total <= usable
    assert predict_memory(size, budget + unit, setup).total > usable


def test_what_is_in_memory_already_is_not_counted_again() -> None:
    size, setup = ModelSize.of(shape_config("llama-1b")), TrainingSetup(2, 2)
    before = auto_row_budget(size, setup, device="cpu", free=30 * GIGABYTE)
    # what is left free is a share of what was free then
    left = 30 * GIGABYTE - round(2 * predict_memory(size, 1, setup).weights / (1 - memory.MARGIN))
    after = auto_row_budget(size, setup, device="cpu", free=left, resident=("weights", "reference"))
    assert after == before


def test_a_budget_has_an_end() -> None:
    model = build_model("llama")
    assert auto_row_budget(model, device="cpu", free=10**15) == memory.LONGEST_ROW


def test_too_little_memory_is_refused_with_ways_out() -> None:
    config = shape_config("llama-8b")
    with pytest.raises(
        FlexdpoError, match=r"no row fits: 1 tokens of llama-8b need about 163.* GB more \(weights 32.12 GB"
    ):
        auto_row_budget(config, device="cpu", free=20 * GIGABYTE)
    with pytest.raises(FlexdpoError, match="set activation_checkpointing=True, or set precompute_ref_log_probs=True"):
        auto_row_budget(config, device="cpu", free=20 * GIGABYTE)
    tiny = shape_config("tiny")
    with pytest.raises(FlexdpoError, match=r"no row fits: 50000 tokens .* lower max_length"):
        auto_row_budget(tiny, device="cpu", free=GIGABYTE, longest=50_000)


def test_free_memory_is_what_the_system_has_left() -> None:
    free = free_memory("cpu")
    assert 0 < free < 1 << 60
    if sys.platform == "linux":
        total = int(re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text()).group(1)) * 1024
        assert free <= total


def test_a_container_has_less(tmp_path) -> None:
    assert memory._left_of_container(tmp_path) == sys.maxsize
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert memory._left_of_container(tmp_path) == sys.maxsize
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._left_of_container(tmp_path) == 995


def test_only_models_and_configs_have_a_size() -> None:
    with pytest.raises(
        FlexdpoError, match=r"expected a model, a transformers config or a ModelSize, got str \('llama'"
    ):
        ModelSize.of("llama")
