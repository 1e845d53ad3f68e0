"""Decoder layers compiled one by one: the same result, and nothing compiled again while data changes."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from flexdpo import FlexdpoError, Group, pack, prepare_model, response_logps
from flexdpo.attention import kernels, selftest
from flexdpo.attention.blockwise import blockwise_attention
from flexdpo.attention.inputs import AttentionCall, Shape
from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.hf.compilation import compile_decoder_layers
from flexdpo.objective.lm_head import head_plan

STEPS = 50


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def model(layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
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
    eager = model(layers=2)
    compiled = copy.deepcopy(eager)
    prepare_model(eager)
    prepare_model(compiled)
    # what is traced and when is the same with every backend
    assert compile_decoder_layers(compiled, backend="aot_eager") == 2
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


@torch._dynamo.config.patch(recompile_limit=4)
def test_no_length_is_left_uncompiled_where_each_is_compiled_by_itself() -> None:
    policy = model()
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    for part in (policy, reference):
        # traced as one graph, where query blocks would make ten
        prepare_model(part, impl="flex")
        compile_decoder_layers(part, dynamic=False, backend="eager")
    data = [pack([Group.from_lists([5] * 20, [[6], [7]])], pad_to_multiple_of=32 * n)[0] for n in range(1, 4)]
    found = []
    for row in [*data, *data]:
        with torch.no_grad():
            response_logps(reference, row)
            response_logps(policy, row)
        found.append(graphs())
    # past torch's limit a length compiles nothing and runs as it is
    assert all(found[k] < found[k + 1] for k in range(len(data) - 1))
    assert found[len(data) - 1] == found[-1]


def test_one_dynamic_layer_serves_lengths_whose_tiles_once_equalled_the_heads() -> None:
    compiled = model().eval()
    prepare_model(compiled, impl="flex")
    compile_decoder_layers(compiled, backend="eager")
    # 4 tiles at first, as many as there are query heads, then 2, as many as key heads, 8 as the size of a head
    for tiles in (4, 2, 8, 3, 5):
        row = pack([Group.from_lists([5] * 20, [[6], [7]])], pad_to_multiple_of=128 * tiles)[0]
        with torch.no_grad():
            response_logps(compiled, row)
        if tiles == 4:
            before = graphs()
            assert before > 0
    assert graphs() == before


# --- the self-test of what is compiled into a layer -------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch) -> list:
    """What is compared before compiled layers run, on a CPU as on CUDA, with a kernel that trains there."""
    calls: list = []

    def right(inputs, row_mask):
        calls.append((AttentionCall.of(inputs), row_mask))
        return blockwise_attention(inputs, row_mask)

    monkeypatch.setattr(selftest, "_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(selftest, "_passed", set())
    monkeypatch.setattr(selftest, "run_flex", right)
    monkeypatch.setattr(kernels, "run_flex", kernels._whole)
    return calls


def losing_a_tile_of_values(inputs, row_mask):
    lost = torch.arange(inputs.value.shape[2])[:, None] < 16
    value = torch.where(lost, inputs.value.detach(), inputs.value)
    return blockwise_attention(inputs._replace(value=value), row_mask)


def some_row():
    return rows(16)[0]


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_compiled_layers_are_compared_once_before_they_first_run(compared, checkpointing: bool | None) -> None:
    eager = model()
    compiled = copy.deepcopy(eager)
    prepare_model(eager, impl="sdpa")
    prepare_model(compiled, impl="flex")
    compile_decoder_layers(compiled, backend="eager")
    if checkpointing is not None:
        compiled.train()
        enable_checkpointing(compiled, use_reentrant=checkpointing)
        compiled.enable_input_require_grads()
    row = some_row()
    for part in (eager, compiled):
        response_logps(part, row).sums.sum().backward()
    for want, got in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)
    # a reentrant checkpoint runs its layers without gradients first
    times = 2 if checkpointing else 1
    assert [call for call, _ in compared] == [
        AttentionCall(Shape(4, 2, 8, 8, torch.float32), 8**-0.5, None, False)
    ] * times
    found = list(selftest._passed)
    assert sorted(key.grad for _, key, _ in found) == ([False, True] if checkpointing else [True])
    # the compiled layer serves all lengths, and so must what is compared
    assert {key.length for _, key, _ in found} == {0}
    if checkpointing is not False:
        with torch.no_grad():
            response_logps(compiled, some_row())
        assert len(compared) == 2


def test_each_mask_and_score_of_a_model_is_compared(compared) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        **shape, num_key_value_heads=2, head_dim=8, vocab_size=61, sliding_window=9, query_pre_attn_scalar=16
    )
    compiled = Gemma2ForCausalLM(config)
    prepare_model(compiled, impl="flex")
    compile_decoder_layers(compiled, dynamic=False, backend="eager")
    row = some_row()
    response_logps(compiled, row).sums.sum().backward()
    assert [call for call, _ in compared] == [AttentionCall(Shape(4, 2, 8, 8, torch.float32), 0.25, 50.0, False)] * 2
    assert {row_mask.kind.name for _, row_mask in compared} == {"causal", "sliding"}
    assert {key.length for _, key, _ in selftest._passed} == {row.layout.length}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        response_logps(compiled, row).sums.sum().backward()
    assert [call.shape.dtype for call, _ in compared[2:]] == [torch.bfloat16] * 2


def test_a_wrong_kernel_stops_compiled_layers_before_they_run(compared, monkeypatch) -> None:
    monkeypatch.setattr(selftest, "run_flex", losing_a_tile_of_values)
    compiled = model()
    prepare_model(compiled, impl="flex")
    compile_decoder_layers(compiled, backend="eager")
    # measuring the head runs the layers without a row
    head_plan(compiled)
    before = graphs()
    with pytest.raises(FlexdpoError, match=r"disagree under the mask 'causal' of this row: dV by"):
        response_logps(compiled, some_row())
    assert graphs() == before
    with kernel_settings_as(KernelSettings(self_test=False)):
        response_logps(compiled, some_row())
    assert graphs() > before


def test_no_graph_of_ones_own_holds_a_kernel_that_nothing_compared(compared) -> None:
    whole = model()
    prepare_model(whole, impl="flex")
    with pytest.raises(Exception, match=r"run a packed row through it once before torch\.compile"):
        torch.compile(whole, backend="eager", fullgraph=True)(**some_row().inputs())
    assert compared == []
