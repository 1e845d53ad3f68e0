"""Log-probabilities in chunks against full logits: values, gradients, dtypes, heads of every kind and their models."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from flexdpo import FlexdpoError, Group, Row, prepare_model, response_logps
from flexdpo.objective import linear_logps as linear
from flexdpo.objective import lm_head as heads
from flexdpo.objective.linear_logps import (
    LogitTransform,
    linear_logps,
    logits_logps,
    module_logps,
    targets_per_chunk,
)
from flexdpo.objective.logps import pair_sums, response_weights, sum_targets
from tests.conftest import VOCABULARY, build_model, odd_groups, strengthen

TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(0.25),
    "softcap": LogitTransform(softcap=2.0),
    "both": LogitTransform(3.0, 1.5),
}


def made_up(dtype: torch.dtype = torch.float64, targets: int = 13, bias: bool = True) -> Any:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, 29, (targets,), generator=generator)
    return noise(targets, 6), noise(29, 6), noise(29) if bias else None, labels, noise(targets).to(torch.float64)


def by_full_logits(hidden, weight, bias, labels, transform) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_are_the_full_logits(kind: str, chunk: int, with_bias: bool) -> None:
    hidden, weight, bias, labels, gradient = made_up(bias=with_bias)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    want = by_full_logits(hidden, weight, bias, labels, TRANSFORMS[kind])
    wanted = torch.autograd.grad(want, inputs, gradient)
    got = linear_logps(hidden, weight, bias, labels, transform=TRANSFORMS[kind], chunk_size=chunk).logps
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(got, inputs, gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if not with_bias:
        head = nn.Linear(6, 29, bias=False)
        head.weight = nn.Parameter(weight.detach())
        generic = module_logps(head, hidden, labels, vocabulary=29, transform=TRANSFORMS[kind], chunk_size=chunk).logps
        torch.testing.assert_close(generic, want, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(generic, [hidden, head.weight], gradient)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_frozen_head_gives_the_same_gradient(kind: str) -> None:
    hidden, weight, bias, labels, gradient = made_up()
    hidden.requires_grad_()
    (want,) = torch.autograd.grad(by_full_logits(hidden, weight, bias, labels, TRANSFORMS[kind]), hidden, gradient)
    got = linear_logps(hidden, weight, bias, labels, transform=TRANSFORMS[kind], chunk_size=4).logps
    torch.testing.assert_close(torch.autograd.grad(got, hidden, gradient)[0], want, rtol=1e-12, atol=1e-12)


def test_only_the_weight_may_ask_for_a_gradient() -> None:
    hidden, weight, bias, labels, gradient = made_up()
    weight.requires_grad_()
    (want,) = torch.autograd.grad(by_full_logits(hidden, weight, bias, labels, LogitTransform()), weight, gradient)
    got = linear_logps(hidden, weight, bias, labels, chunk_size=4).logps
    torch.testing.assert_close(torch.autograd.grad(got, weight, gradient)[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_inputs_accumulate_in_float32(half: torch.dtype) -> None:
    """At most the error of rounding the gradients once, where bf16 logits are off in the third digit."""
    hidden, weight, bias, labels, gradient = made_up(half, targets=64)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = by_full_logits(*exact, labels, LogitTransform())
    got = linear_logps(*inputs, labels, chunk_size=5).logps
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-6)
    rough = by_full_logits(hidden, weight, bias, labels, LogitTransform())
    assert (rough.double() - want).abs().max() > 100 * (got.double() - want).abs().max()
    for x, y in zip(
        torch.autograd.grad(got, inputs, gradient.float()), torch.autograd.grad(want, exact, gradient), strict=True
    ):
        assert x.dtype == half
        assert (x.double() - y).abs().max() <= 1.01 * torch.finfo(half).eps * y.abs().max()


@pytest.mark.parametrize("kind", ["linear", "module"])
def test_autocast_reaches_the_projection_and_nothing_else(kind: str) -> None:
    hidden, weight, _, labels, _ = made_up(torch.float32)
    head = nn.Linear(6, 29, bias=False)
    head.weight = nn.Parameter(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if kind == "linear":
            got = linear_logps(hidden, head.weight, None, labels).logps
        else:
            got = module_logps(head, hidden, labels, vocabulary=29).logps
    assert got.dtype == torch.float32
    want = by_full_logits(hidden.double(), weight.double(), None, labels, LogitTransform())
    # the matrix is multiplied in float32 on a CPU, where halves would not be faster; a module does what autocast says
    assert (got.double() - want).abs().max() < (1e-5 if kind == "linear" else 0.05)
    got.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


@given(st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_sum_of_squares(targets: int, chunk: int) -> None:
    hidden, weight, bias, labels, _ = made_up(targets=targets)
    p = F.linear(hidden, weight, bias).softmax(-1)
    want = p.square().sum(-1).log()
    for values in (
        linear_logps(hidden, weight, bias, labels, chunk_size=chunk, with_log_sum_squares=True),
        logits_logps(F.linear(hidden, weight, bias), labels, with_log_sum_squares=True),
        module_logps(
            lambda x: F.linear(x, weight, bias),
            hidden,
            labels,
            vocabulary=29,
            chunk_size=chunk,
            with_log_sum_squares=True,
        ),
    ):
        torch.testing.assert_close(values.log_sum_squares, want, rtol=1e-10, atol=1e-12)
        assert not values.log_sum_squares.requires_grad


def test_a_chunk_holds_a_bounded_number_of_logits() -> None:
    for vocabulary in (1000, 32_000, 128_256, 262_144):
        assert vocabulary * targets_per_chunk(vocabulary, torch.device("cpu")) <= 2**24
    assert targets_per_chunk(2**30, torch.device("cpu")) == 1


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_halves_multiplied_as_on_a_gpu_are_rounded_once(
    kind: str, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of halves with float32 results, written out; the error of a product is that of rounding one factor."""

    def multiply(self, left, right, out, *, add=False, scale=1.0):
        assert left.dtype == right.dtype == half
        assert out.dtype == torch.float32
        return torch.addmm(out, left.float(), right.float(), beta=int(add), alpha=scale, out=out)

    monkeypatch.setattr(linear, "_MULTIPLY_HALVES", ("cpu",))
    monkeypatch.setattr(linear._Products, "multiply", multiply)
    *tensors, labels, gradient = made_up(half, targets=64)
    gradient[3] = 0.0
    for trained in (3, 2, 1):
        inputs = [x.detach().requires_grad_(number < trained) for number, x in enumerate(tensors)]
        exact = [x.detach().double().requires_grad_(number < trained) for number, x in enumerate(tensors)]
        got = linear_logps(*inputs, labels, transform=TRANSFORMS[kind], chunk_size=5).logps
        want = by_full_logits(*exact, labels, TRANSFORMS[kind])
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-6)
        found = torch.autograd.grad(got, inputs[:trained], gradient.float())
        for x, y in zip(found, torch.autograd.grad(want, exact[:trained], gradient), strict=True):
            assert (x.double() - y).abs().max() <= 2 * torch.finfo(half).eps * y.abs().max()


def test_no_tensor_grows_with_targets_times_words() -> None:
    """At sizes of a GPU, on meta tensors: weight, hidden states and a bounded number of logits, nothing larger."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.untyped_storage().nbytes() // output.element_size())
            return output

    with torch.device("meta"):
        hidden = torch.empty(20_000, 512, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(128_256, 512, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(20_000, dtype=torch.int64)
        with Watch():
            linear_logps(hidden, weight, None, labels).logps.sum().backward()
    # logits and their logarithms lie side by side
    assert largest <= 2 * 2**26


def test_tiles_are_near_squares_of_at_most_so_many_logits() -> None:
    assert linear.tile_shape(8192, 128_256, 2**26) == (8192, 8192)
    assert linear.tile_shape(300, 128_256, 2**26) == (300, 128_256)
    assert linear.tile_shape(100_000, 2048, 2**24) == (8334, 1920)
    for targets in (0, 1, 7, 129, 5000, 200_000):
        for vocabulary in (1, 29, 2048, 262_144):
            for elements in (vocabulary, 100 * vocabulary, 2**24):
                rows, words = linear.tile_shape(targets, vocabulary, elements)
                assert 1 <= words <= vocabulary
                assert 1 <= rows <= max(targets, 1)
                assert rows * words <= elements


def test_no_targets() -> None:
    hidden, weight, bias, labels, _ = made_up()
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    got = linear_logps(hidden[:0], weight, bias, labels[:0]).logps
    assert got.shape == (0,)
    for gradient in torch.autograd.grad(got.sum(), inputs):
        assert not gradient.any()


def test_shapes_that_do_not_fit() -> None:
    hidden, weight, bias, labels, _ = made_up()
    with pytest.raises(FlexdpoError, match=r"hidden \[T, H\] and weight \[V, H\] do not fit: \[13, 6\], \[29, 5\]"):
        linear_logps(hidden, weight[:, :5], bias, labels)
    with pytest.raises(FlexdpoError, match="got 13 hidden states for 12 targets"):
        linear_logps(hidden, weight, bias, labels[:12])
    with pytest.raises(FlexdpoError, match="got 13 rows of logits for 12 targets"):
        logits_logps(F.linear(hidden, weight), labels[:12])


# --- models ----------------------------------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[Any, LogitTransform]] = {
    "tied": (lambda: LlamaConfig(**_SMALL, tie_word_embeddings=True), LogitTransform()),
    "untied": (lambda: LlamaConfig(**_SMALL, tie_word_embeddings=False), LogitTransform()),
    "gemma2": (lambda: Gemma2Config(**_SMALL, final_logit_softcapping=3.0), LogitTransform(1.0, 3.0)),
    "cohere": (lambda: CohereConfig(**_SMALL, logit_scale=0.3), LogitTransform(0.3)),
    "granite": (lambda: GraniteConfig(**_SMALL, logits_scaling=7.0), LogitTransform(1 / 7.0)),
}


def small(name: str) -> Any:
    torch.manual_seed(0)
    config = MODELS[name][0]()
    config.head_dim = 16
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexdpo")
    return prepare_model(strengthen(model.double(), 0).eval())


def a_row() -> Row:
    return Row.from_groups(odd_groups(np.random.default_rng(5)))


def by_the_models_own_logits(model: Any, row: Row) -> torch.Tensor:
    return sum_targets(logits_logps(model(**row.inputs()).logits[0, row.predictors], row.labels).logps, row).sums


def gradients(model: Any) -> list[torch.Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def assert_as_by_logits(model: Any, row: Row, rtol: float = 1e-9) -> None:
    weights = torch.linspace(-1, 1, row.num_responses, dtype=torch.float64)
    want = by_the_models_own_logits(model, row)
    (want * weights).sum().backward()
    wanted = gradients(model)
    got = response_logps(model, row).sums
    (got * weights).sum().backward()
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    scale = max(float(g.abs().max()) for g in wanted if g is not None)
    for found, gradient in zip(gradients(model), wanted, strict=True):
        assert (found is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(found, gradient, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("name", MODELS)
def test_what_follows_the_head_is_measured(name: str) -> None:
    model = small(name)
    plan = heads.head_plan(model)
    assert plan.obstacle is None
    assert plan.transform == MODELS[name][1]
    assert plan.vocabulary == VOCABULARY
    assert_as_by_logits(model, a_row())


def test_a_head_with_a_bias() -> None:
    model = small("untied")
    model.lm_head = nn.Linear(32, VOCABULARY, bias=True, dtype=torch.float64)
    assert_as_by_logits(model, a_row())
    assert model.lm_head.bias.requires_grad


def test_the_head_is_called_once_and_full_logits_never_exist() -> None:
    model, row = small("gemma2"), a_row()
    heads.head_plan(model)
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    response_logps(model, row)
    assert shapes == [torch.Size([1, len(row.labels), 1])]
    assert "forward" not in vars(model.lm_head)


def test_the_head_is_given_back_after_an_error() -> None:
    model, row = small("tied"), a_row()
    row.labels[0] = VOCABULARY + 5
    with pytest.raises((RuntimeError, IndexError)):
        response_logps(model, row)
    assert "forward" not in vars(model.lm_head)


def test_another_head_falls_back_visibly(caplog: pytest.LogCaptureFixture) -> None:
    model, row = small("tied"), a_row()
    inner = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
            output = inner(self, *args, logits_to_keep=logits_to_keep, **kwargs)
            output.logits = output.logits + torch.linspace(0, 1, VOCABULARY, dtype=torch.float64)
            return output

    model.__class__ = Shifted
    with caplog.at_level(logging.WARNING), captured_by(caplog):
        got = response_logps(model, row)
    assert "neither a scale nor a softcap" in heads.head_plan(model).obstacle
    assert "the logits of all targets are held at once, since it changes its logits in a way" in caplog.text
    torch.testing.assert_close(got.sums, by_the_models_own_logits(model, row))


class captured_by:  # noqa: N801
    """transformers' loggers do not propagate to the root logger that caplog listens on."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.handler = caplog.handler
        self.logger = logging.getLogger("flexdpo.objective.logps")

    def __enter__(self) -> None:
        self.logger.addHandler(self.handler)

    def __exit__(self, *_: Any) -> None:
        self.logger.removeHandler(self.handler)


def test_without_output_embeddings_and_logits_to_keep_nothing_but_memory_is_lost() -> None:
    model, row = small("tied"), a_row()
    want = by_the_models_own_logits(model, row)
    plain = type(model).forward

    class Bare(type(model)):  # type: ignore[misc]
        def forward(
            self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kw: Any
        ) -> Any:
            return plain(self, input_ids, attention_mask, position_ids, **kw)

        def get_output_embeddings(self) -> None:
            return None

    model.__class__ = Bare
    assert heads.head_plan(model).obstacle == "it names no output embeddings"
    torch.testing.assert_close(response_logps(model, row).sums, want)


@pytest.mark.parametrize("where", [["lm_head"], ["q_proj", "lm_head"], ["q_proj"]])
def test_adapters_on_the_head(where: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small("untied"), peft.LoraConfig(r=3, target_modules=where, init_lora_weights=False))
    model = model.double()
    assert_as_by_logits(model, a_row())
    assert all((p.grad is None) for p in model.parameters())
    response_logps(model, a_row()).sums.sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("lm_head.lora_A" in name for name in moved) == ("lm_head" in where)
    assert not any("base_layer" in name for name in moved)


def test_a_head_that_is_trained_beside_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(small("untied"), config).double()
    assert_as_by_logits(model, a_row())
    response_logps(model, a_row()).sums.sum().backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None and "lm_head" in name]
    assert moved == ["base_model.model.lm_head.modules_to_save.default.weight"]


def test_values_without_gradients_need_none() -> None:
    model, row = small("gemma2"), a_row()
    with torch.no_grad():
        values = response_logps(model, row)
    assert not values.sums.requires_grad
    torch.testing.assert_close(values.sums, response_logps(model, row).sums)


def test_a_whole_model_in_bf16_gives_float32() -> None:
    model, row = small("tied").to(torch.bfloat16), a_row()
    values = response_logps(model, row)
    assert values.targets.dtype == torch.float32
    assert values.sums.dtype == torch.float64
    values.sums.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_transforms_are_recognised_whatever_the_config_calls_them(scale: float, softcap: float | None) -> None:
    ramp = torch.linspace(-40, 40, 64, dtype=torch.float64)
    transform = LogitTransform(scale, softcap)
    config = LlamaConfig(some_logit_cap=softcap)
    got = heads.recognise_transform(ramp, transform(ramp), config)
    assert got is not None
    assert got.softcap == softcap
    assert got.scale == pytest.approx(scale, rel=1e-9)
    # float32 in between hides digits of a scale that the config does not name
    got = heads.recognise_transform(ramp, transform(ramp).float(), LlamaConfig(my_multiplier=scale, some_cap=softcap))
    assert got == transform


def test_other_transforms_are_not_recognised() -> None:
    ramp = torch.linspace(-40, 40, 64, dtype=torch.float64)
    config = LlamaConfig(final_logit_softcapping=30.0)
    for changed in (ramp + 1e-3, ramp.clamp(max=39), ramp.flip(0) ** 2, torch.where(ramp > 38, -1e9, ramp)):
        assert heads.recognise_transform(ramp, changed, config) is None


# --- per response ----------------------------------------------------------------------------------------------------


def test_shared_targets_count_for_every_response_that_contains_them() -> None:
    row = Row.from_groups([Group.from_lists([3], [[4, 5, 6], [4, 5], [7]])])
    assert len(row.labels) == 4
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0]).requires_grad_()
    got = sum_targets(values, row)
    assert got.sums.tolist() == [-7.0, -3.0, -8.0]
    assert got.lengths.tolist() == [3, 2, 1]
    torch.testing.assert_close(got.means, torch.tensor([-7 / 3, -1.5, -8.0], dtype=torch.float64))
    got.sums.sum().backward()
    assert values.grad.tolist() == [2.0, 2.0, 1.0, 1.0]


def test_ld_weighs_what_is_longer_than_the_partner() -> None:
    row = Row.from_groups([Group.from_lists([3], [[4, 5, 6], [4, 7], [8]], [(0, 1), (2, 0), (1, 2)])])
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])  # 4, 5, 6, 7, 8
    logps = sum_targets(values, row)
    assert pair_sums(logps, row).tolist() == [[-7, -9], [-16, -7], [-9, -16]]
    assert pair_sums(logps, row, 1.0).tolist() == [[-7, -9], [-16, -7], [-9, -16]]
    assert pair_sums(logps, row, 0.0).tolist() == [[-3, -9], [-16, -1], [-1, -16]]
    assert pair_sums(logps, row, 0.5).tolist() == [[-5, -9], [-16, -4], [-5, -16]]


def test_wpo_weights_by_hand() -> None:
    """Four equal words: p = 1/4 and sum p^2 = 1/4, so that every response is as likely as the policy's own."""
    row = Row.from_groups([Group.from_lists([3], [[4, 5], [6]])])
    values = sum_targets(torch.full((3,), 0.25).log(), row, torch.full((3,), 0.25).log())
    torch.testing.assert_close(response_weights(values, row), torch.ones(2, dtype=torch.float64))
    values = sum_targets(torch.tensor([0.5, 0.125, 1.0]).log(), row, torch.full((3,), 0.5).log())
    torch.testing.assert_close(response_weights(values, row), torch.tensor([0.5, 2.0], dtype=torch.float64))


def test_the_same_model_gives_the_same_values_alone_and_together() -> None:
    model = prepare_model(build_model("gpt2", "flexdpo"))
    groups = odd_groups(np.random.default_rng(2))
    together = response_logps(model, Row.from_groups(groups)).sums
    alone = torch.cat([response_logps(model, Row.from_groups([group])).sums for group in groups])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
