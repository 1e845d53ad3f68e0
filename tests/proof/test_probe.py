"""The parity probe: what it reports, what it leaves alone, and that it sees what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexdpo import FlexdpoError, UnsupportedModelError, parity_probe, prepare_model
from flexdpo.attention import row_mask
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.hf import interface
from flexdpo.hf.checkpointing import enable_checkpointing
from tests.hf.architectures import build_model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_in_every_dtype(dtype: torch.dtype) -> None:
    report = parity_probe(build_model("mistral", dtype=dtype))
    assert report.exact
    assert report.verdict == "exact"
    assert report.reason == ""
    assert report.threshold == 8
    assert report.tokens > report.threshold
    assert report.seconds > 0


def test_refused_models_get_a_report() -> None:
    report = parity_probe(build_model("xlstm"))
    assert report.verdict == "refused"
    assert "carries a recurrent state" in report.reason
    stopped = parity_probe(build_model("doge"))
    assert stopped.verdict == "refused"
    assert "DogeAttention received a mask" in stopped.reason


def test_weights_gradients_mode_and_preparation_stay() -> None:
    model = build_model("gemma2", dtype=torch.float32).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert parity_probe(model).exact
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.embed_tokens.weight"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.config._attn_implementation == "flexdpo"


def test_a_model_that_was_prepared_or_wrapped() -> None:
    peft = pytest.importorskip("peft")
    model = prepare_model(build_model("mistral", dtype=torch.float32))
    assert parity_probe(model).exact
    assert model.config._attn_implementation == "flexdpo"  # type: ignore[union-attr]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert parity_probe(wrapped).exact


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_that_is_checkpointed(use_reentrant: bool) -> None:
    model = build_model("llama", dtype=torch.float32)
    enable_checkpointing(model, use_reentrant=use_reentrant)
    assert parity_probe(model).exact
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def _ignores_the_window(function: Any) -> MaskKind:
    return CAUSAL


def _shorter_window(function: Any) -> MaskKind:
    kind = _kind_of(function)
    return MaskKind(kind.name, kind.size - 1) if kind.size else kind


_kind_of = interface.mask_kind_of


@pytest.mark.parametrize("mistake", [_ignores_the_window, _shorter_window])
def test_a_wrong_window_is_seen(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "mask_kind_of", mistake)
    report = parity_probe(build_model("mistral"))
    assert report.verdict == "wrong"
    assert report.value_error > 1e-3
    assert "differs from its unpacked run" in report.reason


def test_a_leak_between_siblings_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the responses of one prompt see each other: prompts and documents stay right."""
    build = row_mask.build_block_mask

    def leaking(layout: Any, kind: Any, **kwargs: Any) -> Any:
        ends = layout.subtree_end.clone()
        ends[0, : layout.num_tokens[0]] = torch.cummax(ends[0, : layout.num_tokens[0]], 0).values
        return build(type(layout)(layout.position_ids, ends, layout.num_tokens), kind, **kwargs)

    monkeypatch.setattr(row_mask, "build_block_mask", leaking)
    assert parity_probe(build_model("llama")).verdict == "wrong"


def test_a_wrong_backward_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values right, gradients wrong: the keys of a packed row are cut off from the graph."""
    attend = interface.packed_attention

    def cut(query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return attend(query, key.detach(), value, mask, **kwargs)

    monkeypatch.setattr(interface, "packed_attention", cut)
    report = parity_probe(build_model("llama"))
    assert report.verdict == "wrong"
    assert report.value_error < 1e-6
    assert report.gradient_error > 1e-2


def test_a_model_whose_attention_does_nothing_proves_nothing() -> None:
    model = build_model("llama", dtype=torch.float32)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    report = parity_probe(model)
    assert report.verdict == "inconclusive"
    assert "not even a wrong mask" in report.reason


def test_a_long_window_is_probed_on_a_tiny_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "mask_kind_of", _shorter_window)
    report = parity_probe(build_model("mistral", sliding_window=4096, dtype=torch.float32), max_tokens=64)
    assert report.verdict == "wrong"
    assert "on a tiny copy whose thresholds are short" in report.reason


@pytest.mark.parametrize("limit", [16, 8192])
def test_rotations_that_change_with_length_are_probed_beyond_their_limit(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the model itself, or on a tiny copy of it."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": limit, **factors}
    model = build_model("llama", rope_parameters=rope, max_position_embeddings=4 * limit, dtype=torch.float32)
    report = parity_probe(model, max_tokens=64)
    assert report.exact, report
    assert report.threshold == limit
    monkeypatch.setattr("flexdpo.hf.limits.evaluated_by_side", lambda *_: None)
    assert parity_probe(model, max_tokens=64).verdict == "wrong"


def test_a_window_that_no_document_exceeds_is_reported() -> None:
    model = build_model("mistral", sliding_window=4096, dtype=torch.float32)
    state = torch.get_rng_state()
    report = parity_probe(model, max_tokens=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.exact
    assert report.tokens <= 64 < report.threshold == 4096


def test_other_modules() -> None:
    with pytest.raises(FlexdpoError, match="expected a transformers PreTrainedModel"):
        parity_probe(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        parity_probe(torch.nn.DataParallel(build_model("llama")))
