"""A prepared or shared model without a row is the model as transformers made it, however it is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import flexdpo
from flexdpo import FlexdpoError
from flexdpo.hf.draws import being_asked
from tests.hf.architectures import build_model, build_or_skip
from tests.hf.equivalence import example_row
from tests.hf.test_architectures import EXACT

# optional parts of configurations that the zoo leaves off
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4, shared keys": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "per_layer_config": {"1": {"head_dim": 512}, "3": {"head_dim": 512}},
            "num_kv_shared_layers": 2,
        },
    ),
}
SPREAD = {"gpt2", "gemma2", "gpt_oss", "llama4", "phi3", *VARIANTS}
NAMES = [pytest.param(name, marks=() if name in SPREAD else pytest.mark.zoo) for name in [*EXACT, *VARIANTS]]


def build(name: str) -> Any:
    if name in VARIANTS:
        base, changes = VARIANTS[name]
        return build_or_skip(base, dtype=torch.float32, **changes)
    return build_or_skip(name, dtype=torch.float32)


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 120, (3, 18), generator=draw)
    ids[:, :10] = ids[0, :10]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(side: str) -> dict[str, torch.Tensor]:
    found = batch()
    for number, missing in enumerate((0, 4, 2)):
        places = slice(0, missing) if side == "left" else slice(18 - missing, 18)
        found["attention_mask"][number, places] = 0
    return found


def filled(model: Any, step: int, cache: Any) -> torch.Tensor:
    """Logits of the last ``step`` tokens behind a cache of the others."""
    ids = batch()["input_ids"]
    name = "cache" if _takes(model, "cache") else "past_key_values"
    model(input_ids=ids[:, :-step], use_cache=True, **{name: cache})
    return model(input_ids=ids[:, -step:], use_cache=True, **{name: cache}).logits


def empty_cache(model: Any) -> torch.Tensor:
    name, cache = ("cache" if _takes(model, "cache") else "past_key_values"), DynamicCache(config=model.config)
    model(**batch(), use_cache=False, **{name: cache})
    return torch.tensor([cache.get_seq_length(), *(layer.keys.shape[0] for layer in cache.layers)])


def _takes(model: Any, name: str) -> bool:
    return name in type(model).forward.__code__.co_varnames


def four_dimensional(model: Any, dtype: torch.dtype) -> torch.Tensor:
    seen = torch.ones(18, 18, dtype=torch.bool).tril()[None, None].expand(3, 1, 18, 18)
    if dtype != torch.bool:
        seen = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return model(input_ids=batch()["input_ids"], attention_mask=seen, use_cache=False).logits


FORMS: dict[str, Any] = {
    "no mask": lambda m: m(input_ids=batch()["input_ids"], use_cache=False).logits,
    "padded on the right": lambda m: _real(m, "right"),
    "padded on the left": lambda m: _real(m, "left"),
    "a boolean mask of four dimensions": lambda m: four_dimensional(m, torch.bool),
    "an additive mask of four dimensions": lambda m: four_dimensional(m, torch.float32),
    "the last logits": lambda m: m(**batch(), use_cache=False, logits_to_keep=5).logits,
    "the last logit": lambda m: m(**batch(), use_cache=False, logits_to_keep=1).logits,
    # Whisper's decoder keeps all of them
    "the last logits, padded": lambda m: m(**padded("left"), use_cache=False, logits_to_keep=5).logits[:, -5:],
    "some logits": lambda m: m(**batch(), use_cache=False, logits_to_keep=torch.tensor([3, 7])).logits,
    "embeddings": lambda m: (
        m(inputs_embeds=m.get_input_embeddings()(batch()["input_ids"]).detach(), use_cache=False).logits
    ),
    "a cache of its own": lambda m: m(**batch(), use_cache=True).logits,
    "behind a cache": lambda m: filled(m, 1, DynamicCache(config=m.config)),
    "several tokens behind a cache": lambda m: filled(m, 3, DynamicCache(config=m.config)),
    "behind a static cache": lambda m: filled(m, 1, StaticCache(config=m.config, max_cache_len=24)),
    "an empty cache": empty_cache,
    "hidden states": lambda m: torch.stack(m(**batch(), use_cache=False, output_hidden_states=True).hidden_states),
    "generated": lambda m: m.generate(**padded("left"), max_new_tokens=3, do_sample=False, pad_token_id=0),
}


def _real(model: Any, side: str) -> torch.Tensor:
    inputs = padded(side)
    return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]


def outcome(form: Any, model: Any) -> torch.Tensor | str:
    with torch.no_grad():
        try:
            return form(model)
        except Exception as error:
            # what the stock model cannot do, a prepared one need not do either
            return f"{type(error).__name__}: {error}"


def differences(stock: Any, ours: Any) -> list[str]:
    wrong = []
    for name, form in FORMS.items():
        want, got = outcome(form, stock), outcome(form, ours)
        # eager attention adds a boolean mask to its scores, as 0 and 1
        odd = "boolean" in name and stock.config._attn_implementation == "eager"
        # Gemma 3n's hidden states come four to a layer
        refused = isinstance(got, str) and "flexdpo cannot tell what it would be for the padded batch" in got
        if isinstance(want, str) or odd or (refused and name == "hidden states"):
            continue
        if isinstance(got, str) or got.shape != want.shape:
            wrong.append(f"{name}: {got if isinstance(got, str) else tuple(got.shape)}")
        elif not torch.allclose(got.double(), want.double(), rtol=1e-4, atol=1e-5 * float(want.double().abs().max())):
            wrong.append(f"{name}: off by {float((got.double() - want.double()).abs().max()):.1e}")
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_call_it(name: str) -> None:
    stock = build(name)
    prepared, shared = copy.deepcopy(stock), copy.deepcopy(stock)
    flexdpo.prepare_model(prepared)
    assert differences(stock, prepared) == []
    flexdpo.share_prefixes(shared, min_prefix=1)
    assert differences(stock, shared) == []


def test_keys_that_layers_share() -> None:
    """Gemma 4 drops positions before it comes to such layers, unless it is told that all are wanted."""
    model, row = build("gemma4, shared keys"), example_row()
    with torch.no_grad():
        want = [model(input_ids=torch.from_numpy(s)[None], use_cache=False).logits for s in row.groups[0].sequences]
        flexdpo.prepare_model(model)
        got = model(**row.inputs()).logits
        last = model(**row.inputs(), logits_to_keep=5).logits
    torch.testing.assert_close(got[:, -5:], last)
    prompt = len(row.groups[0].prompt_ids)
    torch.testing.assert_close(got[0, :prompt], want[0][0, :prompt], rtol=1e-4, atol=1e-4)


UNKNOWN = [{}, {"a": torch.zeros(1)}, [], [1], (), object(), DynamicCache()]


@pytest.mark.parametrize("value", UNKNOWN, ids=lambda value: type(value).__name__)
def test_what_is_not_known_passes_through(value: Any) -> None:
    """By its type, whatever it is called: neither nothing nor a plain number, text or flag."""
    model = build_model("llama", dtype=torch.float32)
    flexdpo.share_prefixes(model, min_prefix=1)
    seen: list[int] = []
    # a model that is asked whether it draws random numbers runs two tokens
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args: None if being_asked() else seen.append(args[0].shape[0])
    )
    for changes in ({"something_new": value}, {"something_new": 3}, {"something_new": "text"}, {"something_new": None}):
        with torch.no_grad():
            model(**batch(), use_cache=False, **changes)
    assert seen == [3, 3, 3, 1]
    stats = flexdpo.sharing_stats(model)
    assert stats.passed_through["generation" if isinstance(value, DynamicCache) else "other_inputs"] >= 1
    assert sum(stats.passed_through.values()) == 3
    prepared = build_model("llama", dtype=torch.float32)
    flexdpo.prepare_model(prepared)
    with pytest.raises(FlexdpoError, match=r"a packed row came with something_new=, (which|but it cannot)"):
        prepared(**example_row().inputs(), something_new=value)
