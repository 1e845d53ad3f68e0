"""Decoder layers compiled one by one: the same result, and nothing compiled again while data changes."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from flexdpo import FlexdpoError, Group, pack, prepare_model, response_logps
from flexdpo.hf.compilation import compile_decoder_layers

STEPS = 50


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=61,
    )
    return LlamaForCausalLM(config)


def rows(multiple: int) -> list:
    rng = np.random.default_rng(0)

    def ids(most: int) -> list[int]:
        return rng.integers(0, 61, rng.integers(2, most)).tolist()

    batches = [[Group.from_lists(ids(60), [ids(30), ids(30)]) for _ in range(3)] for _ in range(STEPS)]
    return [pack(groups, pad_to_multiple_of=multiple)[0] for groups in batches]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_training_compiles_nothing_after_warming_up_and_changes_no_gradient() -> None:
    eager = model()
    compiled = copy.deepcopy(eager)
    prepare_model(eager)
    prepare_model(compiled)
    # what is traced and when is the same with every backend
    assert compile_decoder_layers(compiled, backend="aot_eager") == 3
    data = rows(1)
    assert len({row.layout.length for row in data}) > STEPS // 2
    for step, row in enumerate(data):
        for either in (eager, compiled):
            with torch.no_grad():
                response_logps(either, row)
            response_logps(either, row).sums.sum().backward()
        if step == 0:
            before = graphs()
            assert before > 0
    assert graphs() == before
    for want, got in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-3)


def test_flex_attention_inside_a_compiled_layer_compiles_once_per_length() -> None:
    plain = model().eval()
    compiled = copy.deepcopy(plain)
    prepare_model(plain)
    prepare_model(compiled, impl="flex")
    compile_decoder_layers(compiled, dynamic=False)
    data = [row for row in rows(256) if row.layout.length == 256]
    assert len(data) > STEPS // 2
    for step, row in enumerate(data):
        with torch.no_grad():
            got, want = response_logps(compiled, row).sums, response_logps(plain, row).sums
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        if step == 0:
            before = graphs()
            assert before > 0
    assert graphs() == before


def test_layers_under_an_unknown_name_are_refused() -> None:
    other = model()
    prepare_model(other)
    layers = other.model.layers
    del other.model.layers
    other.model.stages = layers
    with pytest.raises(FlexdpoError, match="LlamaModel keeps its decoder layers under another name than layers, h or"):
        compile_decoder_layers(other)


def test_no_length_is_left_uncompiled_where_each_is_compiled_by_itself() -> None:
    policy = model()
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    for part in (policy, reference):
        prepare_model(part)
        compile_decoder_layers(part, dynamic=False, backend="eager")
    data = [pack([Group.from_lists([5] * 20, [[6], [7]])], pad_to_multiple_of=32 * n)[0] for n in range(1, 7)]
    found = []
    for row in [*data, *data]:
        with torch.no_grad():
            response_logps(reference, row)
        response_logps(policy, row).sums.sum().backward()
        found.append(graphs())
    # past torch's limit a length compiles nothing and runs as it is
    assert all(found[k] < found[k + 1] for k in range(len(data) - 1))
    assert found[len(data) - 1] == found[-1]
