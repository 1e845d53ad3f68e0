"""Every causal-LM architecture of transformers: packed rows give the ordinary result, or the model is refused.

A spread of twelve runs by default; ``pytest -m zoo`` runs them all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexdpo import Row, UnsupportedModelError, parity_probe, prepare_model
from flexdpo.hf import prepare
from flexdpo.hf.mixer_kernels import mixers_of
from flexdpo.hf.rules import refusal_reason
from tests.hf.architectures import (
    BECAME_EXACT,
    NOT_IN_THE_ZOO,
    build_model,
    build_or_skip,
    newer_than_recorded,
    older_than_recorded,
    recorded,
    skipped_before_its_time,
    zoo,
)
from tests.hf.equivalence import (
    Float64,
    Run,
    example_row,
    gradient_error,
    leaking_layout,
    logit_error,
    packed_run,
    unpacked_run,
)

# a learned position table, ALiBi-free multi-query attention, softcap, sinks, chunks, MLA, mixtures of experts, parallel
# blocks, several mask kinds, encoders' decoders and multimodal wrappers
SPREAD = {
    "bert-generation",
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma4_unified",
    "got_ocr2",
    "gpt2",
    "gpt_oss",
    "llama4",
    "mixtral",
    "modernbert-decoder",
    "phi3",
}
# its attention adds a dense mask of its own
NOT_UNDER_A_BLOCK_MASK = {"doge"}
# accepted by the static rule, stopped at the first packed forward
STOPPED_AT_RUN_TIME = {"blt", "git", "doge"}
TOLERANCE = 1e-9


def _marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in SPREAD else pytest.mark.zoo) for name in names]


EXACT = sorted(n for n, a in zoo().items() if a.exact and n not in NOT_UNDER_A_BLOCK_MASK)
# their tiny configurations are incomplete, or need a package for images
UNBUILDABLE = {"gemma3n", "gemma4_unified_assistant", "reformer", "zamba"}
OTHERS = sorted(set(zoo()) - set(EXACT) - UNBUILDABLE)
BUILDABLE = sorted([*EXACT, *OTHERS])
# nor do the two that want four audio codes per token get as far as their mask
NEVER_READ_THEIR_MASK = {"cpmant", "rwkv", "xlstm", "musicgen", "musicgen_melody"}


def test_the_spread_is_in_the_zoo() -> None:
    assert set(EXACT) >= SPREAD
    assert len(EXACT) > 100


def test_the_zoo_is_complete(record_property: Any) -> None:
    missing = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - recorded())
    if newer_than_recorded():
        for name in missing:
            record_property(NOT_IN_THE_ZOO, name)
    elif not older_than_recorded():  # what an older one had, and none has now, needs no record
        assert missing == []


def assert_exact(model: Any, row: Row) -> None:
    with Float64():
        want = unpacked_run(model, row)
        prepare_model(model)
        got = packed_run(model, row)
        leaking = packed_run(model, row, attention_mask=leaking_layout(row))
    assert logit_error(got, want) < TOLERANCE
    assert gradient_error(got, want) < TOLERANCE
    assert logit_error(leaking, want) > 1e-3
    assert gradient_error(leaking, want) > 1e-3


@pytest.mark.parametrize("name", _marked(EXACT))
def test_packed_equals_unpacked(name: str) -> None:
    """Logits and all gradients against one sequence at a time with the stock attention; a wrong mask must show."""
    with skipped_before_its_time():
        assert_exact(build_or_skip(name), example_row())


@pytest.mark.parametrize("name", _marked(EXACT))
def test_loading_by_name(name: str) -> None:
    """A model loaded with the name alone is the stock model and says so to a row; prepared, it runs the row."""
    stock, row = build_or_skip(name), example_row()
    loaded = type(stock)._from_config(stock.config, attn_implementation="flexdpo", dtype=torch.float64)
    # before the weights, which would be rounded where the model keeps a router or sinks in float32
    loaded.to(torch.float64).load_state_dict(stock.state_dict())
    if type(stock)._can_set_experts_implementation():
        loaded.set_experts_implementation("eager")
    loaded.eval()
    with Float64(), torch.no_grad(), skipped_before_its_time():
        want = [stock(input_ids=torch.from_numpy(s)[None], use_cache=False).logits for s in row.groups[0].sequences]
        got = [loaded(input_ids=torch.from_numpy(s)[None], use_cache=False).logits for s in row.groups[0].sequences]
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=TOLERANCE * float(w.abs().max()))
        with pytest.raises((ValueError, AttributeError), match=r"flexdpo\.prepare_model"):
            loaded(**row.inputs())
        packed = prepare_model(loaded)(**row.inputs()).logits[0, : len(row.groups[0].prompt_ids)]
    # the row begins with the first prompt
    wanted = want[0][0, : len(row.groups[0].prompt_ids)]
    torch.testing.assert_close(packed, wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))


def became_exact(name: str, record_property: Any) -> bool:
    """Whether a transformers newer than the records made a model exact, which is reported; wrong results fail."""
    if not newer_than_recorded():
        return False
    row = example_row()
    try:
        prepare_model(build_or_skip(name))(**row.inputs())
    except UnsupportedModelError:
        return False
    assert_exact(build_or_skip(name), row)
    record_property(BECAME_EXACT, name)
    return True


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.zoo) for n in OTHERS])
def test_what_is_not_exact_is_refused(name: str, record_property: Any) -> None:
    """Prepared or only loaded by name: a model that would be wrong never returns from a packed forward."""
    if became_exact(name, record_property):
        return
    stock, row = build_or_skip(name), example_row()
    if name in STOPPED_AT_RUN_TIME:
        prepare_model(stock)
        with pytest.raises(UnsupportedModelError, match=r"train (it|this model) without flexdpo"):
            stock(**row.inputs())
    else:
        with pytest.raises(UnsupportedModelError, match=r"cannot be exact .*: (its|it) .* Train it without flexdpo"):
            prepare_model(stock)
    # KeyError: some keep a table of attention classes, where our name is not
    with pytest.raises((UnsupportedModelError, KeyError), match="flexdpo"):
        prepare_model(type(stock)._from_config(stock.config, attn_implementation="flexdpo"))(**row.inputs())


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(set(BUILDABLE) - NEVER_READ_THEIR_MASK))
def test_the_stock_model_never_runs_a_row(name: str) -> None:
    """A row that reaches a stock model that nobody prepared stops where the model first reads its mask."""
    model, row = build_or_skip(name), example_row()
    with pytest.raises((ValueError, AttributeError), match=r"flexdpo\.prepare_model"):
        model(**row.inputs())


@pytest.mark.parametrize("name", ["git", "blt", "doge"])
def test_the_run_time_checks_close_what_the_rule_accepts(name: str) -> None:
    model = build_or_skip(name)
    assert refusal_reason(prepare.backbone_of(model)) is None
    with pytest.raises(UnsupportedModelError, match="mask"):
        prepare_model(model)(**example_row().inputs())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SPREAD else pytest.mark.zoo) for n in BUILDABLE])
def test_the_probe_makes_no_mistake(name: str, record_property: Any) -> None:
    model = build_or_skip(name, dtype=torch.float32)
    report = parity_probe(model)
    if report.verdict == "refused" and older_than_recorded() and "newer transformers" in report.reason:
        pytest.skip(report.reason)
    # the probe runs in train mode, where one router draws however it is set
    exact = name != "phimoe" and (name in EXACT or became_exact(name, record_property))
    assert report.verdict == ("exact" if exact else "refused"), report
    if report.exact:
        # the stock scans compute in float32 and hand their roundings on
        noise = (report.value_noise, report.gradient_noise) if mixers_of(model) else (0.0, 0.0)
        assert report.value_error < max(1e-4 * report.wrong_value_error, 2 * noise[0])
        assert report.gradient_error < max(1e-4 * report.wrong_gradient_error, 2 * noise[1])
        assert max(noise) < 0.02


@pytest.mark.zoo
@pytest.mark.parametrize("name", OTHERS)
def test_the_probe_needs_no_rule(name: str, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """With the static rule switched off, the probe still calls no wrong model exact."""
    monkeypatch.setattr(prepare, "require_exact", lambda model: None)
    monkeypatch.setattr("flexdpo.proof.probe.refusal_reason", lambda backbone: None)
    try:
        report = parity_probe(build_or_skip(name, dtype=torch.float32))
    except (TypeError, RuntimeError, ValueError, KeyError, AttributeError, IndexError):
        return  # it cannot even be run with position_ids
    assert not report.exact or became_exact(name, record_property), report


def test_a_wrong_gradient_shows() -> None:
    """The comparison itself: one entry of one gradient that is off fails it."""
    model, row = build_model("llama"), example_row()
    want = unpacked_run(model, row)
    name = "model.layers.0.self_attn.k_proj.weight"
    off = want.gradients[name].clone()
    off[0, 0] += 1e-3 * float(off.abs().max())
    got = Run(want.logits, {**want.gradients, name: off})
    assert gradient_error(got, want) == pytest.approx(1e-3, rel=1e-6)
