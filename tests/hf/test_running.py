"""The ways a model is run: each gives on packed rows what the same model gives one sequence at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flexdpo
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.layout.row import Row, stack_inputs
from tests.hf.architectures import build_model
from tests.hf.equivalence import (
    Float64,
    Run,
    example_groups,
    example_row,
    gradient_error,
    logit_error,
    packed_run,
    sequence_paths,
    unpacked_run,
)

# learned positions in float64 throughout; a window; softcaps; sinks and experts; chunks
MODELS = ["gpt2", "mistral", "gemma2", "gpt_oss", "llama4"]
TOLERANCE = 1e-9


def assert_same(got: Run, want: Run, tolerance: float = TOLERANCE) -> None:
    assert logit_error(got, want) < tolerance
    assert gradient_error(got, want) < tolerance


class Calling(torch.nn.Module):
    """A model behind a function of its inputs, so that the same measurement fits every way of calling it."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, **inputs: Any) -> Any:
        return self.call(**inputs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.named_parameters(*args, **kwargs)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_of_the_layers(name: str, use_reentrant: bool) -> None:
    model, row = build_model(name), example_row()
    # without Float64, which does not reach what the backward computes again
    want = unpacked_run(model, row)
    without = packed_run(flexdpo.prepare_model(model), row)
    model.train()
    enable_checkpointing(model, use_reentrant=use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    got = packed_run(model, row)
    assert_same(got, without)
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_around_the_whole_model(name: str, use_reentrant: bool) -> None:
    """The backward runs the whole model again, by then with another row's forward in between."""
    model, row, other = build_model(name), example_row(), example_row(prompt=19, seed=3)
    start = torch.zeros((), dtype=torch.float64, requires_grad=True)  # what reentrant checkpoints hang on

    def forward(_: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return model(**inputs).logits[0]

    def call(**inputs: Any) -> Any:
        logits = checkpoint(forward, start, inputs, use_reentrant=use_reentrant)
        with torch.no_grad():
            model(**other.inputs())
        return type("Output", (), {"logits": logits[None]})

    want = unpacked_run(model, row)
    without = packed_run(flexdpo.prepare_model(model), row)
    model.train()
    got = packed_run(Calling(model, call), row)
    assert_same(got, without)
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize("prepare_first", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_lora(name: str, prepare_first: bool) -> None:
    peft = pytest.importorskip("peft")
    model, row = build_model(name), example_row()
    if prepare_first:
        flexdpo.prepare_model(model)
    # adapters that start at zero would hide what they do
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, config)
    with Float64():
        want = unpacked_run(wrapped, row)
        assert want.gradients
        assert all("lora_" in key for key in want.gradients)
        flexdpo.prepare_model(wrapped)
        assert_same(packed_run(wrapped, row), want)
        with wrapped.disable_adapter():
            without = packed_run_values(wrapped, row)
            base = [model(input_ids=torch.from_numpy(s)[None]).logits[0] for g in row.groups for s in g.sequences]
    for got, wanted in zip(without, base, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))


def packed_run_values(model: Any, row: Row) -> list[torch.Tensor]:
    with torch.no_grad():
        logits = model(**row.inputs()).logits[0]
    return [logits[path] for path in sequence_paths(row)]


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "gpt_oss"])
def test_autocast_bfloat16(name: str) -> None:
    """No further from float64 than the unpacked run under the same autocast, with a band for other sums."""
    row = example_row()
    truth_model = build_model(name)
    with Float64():
        truth = unpacked_run(truth_model, row)
    model = build_model(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = unpacked_run(model, row)
        flexdpo.prepare_model(model)
        packed = packed_run(model, row)
    assert logit_error(packed, truth) < 1.25 * logit_error(plain, truth) + 1e-3
    assert rms_error(packed, truth) < 1.25 * rms_error(plain, truth) + 1e-3


def rms_error(got: Run, want: Run) -> float:
    """Root mean square of the error of all gradients, relative to that of the gradients."""
    errors = sum(float((got.gradients[n].double() - w).square().sum()) for n, w in want.gradients.items())
    return (errors / sum(float(w.square().sum()) for w in want.gradients.values())) ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_several_rows_in_one_batch(name: str) -> None:
    """Rows of different lengths side by side give what each gives alone."""
    model = flexdpo.prepare_model(build_model(name))
    rows = [example_row(seed=1), Row.from_groups(example_groups(seed=2)[:1]), example_row(seed=3, prompt=21)]
    want = [packed_run(model, row) for row in rows]
    inputs = stack_inputs(rows)
    assert inputs["input_ids"].shape == (3, max(row.layout.length for row in rows))

    def call(number: int) -> Callable[..., Any]:
        def run(**_: Any) -> Any:
            logits = model(**stack_inputs(rows)).logits
            return type("Output", (), {"logits": logits[number : number + 1]})

        return run

    for number, row in enumerate(rows):
        with Float64():
            assert_same(packed_run(Calling(model, call(number)), row), want[number], 2e-6)


def test_two_prepared_models_take_turns() -> None:
    """Policy and reference run the same row in one process, one inside the other's step, and share its masks."""
    policy, reference, row = build_model("mistral"), build_model("mistral", seed=5), example_row()
    with Float64():
        want, want_reference = unpacked_run(policy, row), unpacked_run(reference, row)
        flexdpo.prepare_model(policy)
        flexdpo.prepare_model(reference)
        logits = policy(**row.inputs()).logits[0]
        got_reference = packed_run(reference, row)
        score_inputs = [logits[path] for path in sequence_paths(row)]
        for got, wanted in zip(score_inputs, want.logits, strict=True):
            torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
        assert_same(packed_run(policy, row), want)
    assert_same(got_reference, want_reference)


def test_a_copy_of_a_prepared_model_is_prepared() -> None:
    model, row = flexdpo.prepare_model(build_model("mistral")), example_row()
    want = packed_run(model, row)
    assert_same(packed_run(copy.deepcopy(model), row), want)


def test_a_saved_model_is_the_stock_model(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = build_model("mistral", dtype=torch.float32)
    ids = torch.from_numpy(example_groups()[0].sequences[0])[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
    flexdpo.prepare_model(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, want)


# --- torch.compile ---------------------------------------------------------------------------------------------------


# as many layers as have a mask of their own: each is traced
SHALLOW: dict[str, dict[str, Any]] = {"gpt2": {"n_layer": 1}, "mistral": {"num_hidden_layers": 1}}
COMPILED = ["gpt2", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "llama4"))]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_model_has_no_graph_breaks(name: str) -> None:
    """``fullgraph=True`` raises at any break; further rows of the same length compile nothing."""
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model, row = build_model(name, **SHALLOW.get(name, {})), example_row()
    # as many tokens with the padding, but not without it
    other = Row.from_groups(example_groups(prompt=15, seed=7), pad_to_multiple_of=16)
    assert other.layout.length == row.layout.length
    assert other.num_tokens != row.num_tokens
    with Float64():
        wants = [unpacked_run(model, each) for each in (row, other)]
    flexdpo.prepare_model(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = packed_run(Calling(model, compiled), row)
    assert_same(got, wants[0], 1e-6)
    first = graphs
    assert_same(packed_run(Calling(model, compiled), other), wants[1], 1e-6)
    assert graphs == first


@pytest.mark.slow
def test_compiled_flex_attention_without_gradients() -> None:
    """The kernel that trains on a GPU, as far as a CPU has it: the forward, by itself and in a compiled model.

    The BlockMask of a window and its mask_mod take part, on a row longer than one block.
    """
    torch._dynamo.reset()
    model = build_model("mistral", dtype=torch.float32)
    row = Row.from_groups([*example_groups(prompt=60), *example_groups(prompt=70, seed=1)], pad_to_multiple_of=128)
    assert row.layout.length > 128
    want = packed_run_values(flexdpo.prepare_model(model, impl="sdpa"), row)
    flexdpo.prepare_model(model, impl="flex")
    for call in (model, torch.compile(model, fullgraph=True)):
        row = Row.from_groups(row.groups, pad_to_multiple_of=128)  # without the masks of the run before
        for got, wanted in zip(packed_run_values(call, row), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_generation_before_between_and_after_packed_forwards(name: str) -> None:
    """Left-padded prompts give the stock model's tokens and scores, and packed rows stay exact in between."""
    model, row = build_model(name), example_row()
    prompts = [torch.from_numpy(group.prompt_ids) for group in row.groups]
    length = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (length - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (length - len(p), 0)) for p in prompts])

    def generate() -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )

    with Float64():
        wanted = generate()
        want = unpacked_run(model, row)
        flexdpo.prepare_model(model)
        before = generate()
        first = packed_run(model, row)
        between = generate()
        second = packed_run(model, row)
        after = generate()
    assert_same(first, want)
    assert_same(second, want)
    for got in (before, between, after):
        assert torch.equal(got.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(got.scores), torch.stack(wanted.scores), rtol=0, atol=1e-8)


def test_a_padded_batch_runs_as_in_the_stock_model() -> None:
    """Evaluation of ordinary right-padded batches, with labels, on a prepared model."""
    model, row = build_model("gemma2"), example_row()
    sequences = [torch.from_numpy(s) for s in row.groups[0].sequences]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    with Float64(), torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        flexdpo.prepare_model(model)
        got = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
