"""Padded batches with images, shared, against the same model without sharing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import flexdpo
from flexdpo.dropin.hooks import SharingStats
from flexdpo.hf.checkpointing import enable_checkpointing
from tests.hf.equivalence import Float64, gradient_error, logit_error
from tests.images.models import IMAGE, KINDS, make_model, words
from tests.images.runs import batch_run, example_groups, group_of, padded_batch

ALL: dict[str, Any] = {"min_gain": 1, "min_prefix": 1}


def with_lora(model: Any) -> Any:
    import peft

    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    # in the tower too
    targets = [name for name in names if "head" not in name and name.rsplit(".", 1)[-1] in NAMES_OF_LINEAR]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


NAMES_OF_LINEAR = {"q_proj", "v_proj", "o_proj", "gate_proj", "qkv", "proj", "fc1", "fc2", "linear_1", "out_proj"}


def with_checkpoints(model: Any) -> Any:
    enable_checkpointing(model)
    return model


def with_reentrant_checkpoints(model: Any) -> Any:
    enable_checkpointing(model, use_reentrant=True)
    model.enable_input_require_grads()
    return model


def with_frozen_tower(model: Any) -> Any:
    part = model.base_model
    tower = next(
        t for name in ("vision_tower", "visual", "vision_model") if (t := getattr(part, name, None)) is not None
    )
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
    return model


MODES: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "checkpointing": with_checkpoints,
    "reentrant": with_reentrant_checkpoints,
    "lora": with_lora,
    "frozen tower": with_frozen_tower,
}


def require_the_ordinary_result(name: str, side: str, mode: str) -> None:
    kind, groups = KINDS[name], example_groups(KINDS[name])
    # what a checkpoint runs again, it runs in the backward pass, where norms are in float32
    checkpoints = mode in ("checkpointing", "reentrant")
    with contextlib.nullcontext() if checkpoints else Float64():
        model = MODES[mode](make_model(name))
        batch = padded_batch(model, kind, groups, side)
        want = batch_run(model, batch)
        with flexdpo.share_prefixes(model, **ALL) as sharing:
            got = batch_run(model, batch)
            stats = sharing.stats
        again = batch_run(model, batch)
    assert stats.batches_shared == 1, stats
    images = [image.digest for group in groups for image in group.images for _ in group.response_ids]
    # tiles are images of their own where a processor cuts one into several
    tiles = 1 if name in ("idefics3", "smolvlm", "internvl") else 0
    assert (stats.images_in, stats.images_encoded) == (len(images) + 3 * tiles, len(set(images)) + tiles)
    assert stats.tokens_run == distinct_tokens(groups)
    tolerance = 1e-6 if checkpoints else 1e-11
    assert logit_error(got, want) < tolerance
    assert gradient_error(got, want) < tolerance
    assert logit_error(again, want) == gradient_error(again, want) == 0


def distinct_tokens(groups: list[flexdpo.Group]) -> int:
    """Beginnings that differ, where an image token is its image and its place."""
    beginnings = set()
    for group in groups:
        tokens: list[Any] = group.prompt_ids.tolist()
        for image in group.images:
            for place in range(image.tokens):
                tokens[tokens.index(IMAGE)] = (image.digest, place)
        for response in group.response_ids:
            whole = (*tokens, *response.tolist())
            beginnings |= {whole[: end + 1] for end in range(len(whole))}
    return len(beginnings)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch(side: str) -> None:
    require_the_ordinary_result("llava", side, "plain")


def run_shared(name: str, batch: dict[str, Any], **kwargs: Any) -> tuple[float, float, SharingStats]:
    """Errors of a shared batch, and what was counted."""
    with Float64():
        model = make_model(name)
        want = batch_run(model, batch)
        with flexdpo.share_prefixes(model, **{**ALL, **kwargs}) as sharing:
            got = batch_run(model, batch)
            stats = sharing.stats
    return logit_error(got, want), gradient_error(got, want), stats


def test_images_without_a_token_between_them() -> None:
    """Gemma 3 takes a run of image tokens for one block, so the first image of it is not the same before others."""
    kind = KINDS["gemma3"]
    a, b, c = (kind.picture(seed)[0] for seed in (1, 2, 3))
    prompt = [*words(1, 6), *[IMAGE] * 8, *words(2, 5)]
    groups = [group_of(prompt, pair, seed) for seed, pair in enumerate(([a, b], [a, c], [a, b]))]
    *errors, stats = run_shared("gemma3", padded_batch(make_model("gemma3"), kind, groups))
    assert max(errors) < 1e-11
    assert (stats.images_in, stats.images_encoded, stats.batches_shared) == (18, 3, 1)


def test_an_image_in_a_response() -> None:
    kind = KINDS["qwen2_5_vl"]
    (a, in_a), (b, in_b) = kind.picture(1), kind.picture(2, 1)
    sequences = [words(1, 5) + in_a + words(2, 4) + end + words(3, 3) for end in (in_b, in_b + in_a, [])]
    groups = [
        group_of(sequence, images, 1) for sequence, images in zip(sequences, ([a, b], [a, b, a], [a]), strict=True)
    ]
    batch = padded_batch(make_model("qwen2_5_vl"), kind, groups)
    *errors, stats = run_shared("qwen2_5_vl", batch)
    assert max(errors) < 1e-11
    assert (stats.images_in, stats.images_encoded, stats.batches_shared) == (18, 2, 1)


def cut(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut to where only a part of the last image is left in some rows; its pixels stay."""
    last = int((batch["input_ids"] == IMAGE).nonzero()[:, 1].max())
    return {n: v[:, :last] if v.shape[:2] == batch["attention_mask"].shape else v for n, v in batch.items()}


def swapped(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "mm_token_type_ids": 1 - batch["mm_token_type_ids"]}


PASSING: dict[str, tuple[str, str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "video": ("llava_onevision", "other_media", lambda batch: {**batch, "pixel_values_videos": torch.zeros(1)}),
    "an input that nobody knows": ("qwen2_vl", "other_inputs", lambda batch: {**batch, "masks": torch.zeros(1)}),
    "several images in a row": (
        "llava_onevision", "image_inputs", lambda batch: {**batch, "batch_num_images": torch.tensor([2])}),
    "patches without a grid": ("qwen2_vl", "image_inputs", lambda batch: {**batch, "image_grid_thw": torch.ones(2, 3)}),
    "other tokens named images": ("qwen2_vl", "token_types", swapped),
    "no tokens named images": ("qwen3_vl", "token_types", lambda batch: {**batch, "mm_token_type_ids": None}),
    "an image too many": (
        "llava", "image_tokens", lambda batch: {**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)}),
    "an image that was cut": ("llava", "image_tokens", cut),
}  # fmt: skip


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_through_and_why(case: str) -> None:
    name, reason, change = PASSING[case]
    model = make_model(name)
    batch = change(padded_batch(model, KINDS[name], example_groups(KINDS[name])))
    sharing = flexdpo.share_prefixes(model, **ALL)
    # the model itself refuses most of these
    with contextlib.suppress(Exception):
        model(**batch, use_cache=False)
    assert sharing.stats.passed_through == {reason: 1}


def test_a_tower_that_draws_random_numbers() -> None:
    model = make_model("llava")
    batch = padded_batch(model, KINDS["llava"], example_groups(KINDS["llava"]))
    sharing = flexdpo.share_prefixes(model, **ALL)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    model(**batch, use_cache=False)
    assert sharing.stats.passed_through == {"random": 1}
    model.eval()
    model(**batch, use_cache=False)
    assert sharing.stats.batches_shared == 1


def test_features_of_images_come_back_for_every_image() -> None:
    model = make_model("llava")
    batch = padded_batch(model, KINDS["llava"], example_groups(KINDS["llava"]))
    want = model(**batch, use_cache=False).image_hidden_states
    if want is None:
        pytest.skip(f"transformers {transformers.__version__} returns none")
    with flexdpo.share_prefixes(model, **ALL):
        got = model(**batch, use_cache=False).image_hidden_states
    assert len(got) == len(want) == 18
    torch.testing.assert_close(list(got), list(want))


def test_batches_without_images_in_between() -> None:
    kind, groups = KINDS["qwen3_vl"], example_groups(KINDS["qwen3_vl"])
    model = make_model("qwen3_vl")
    with_images = padded_batch(model, kind, groups)
    text = padded_batch(model, KINDS["llava"], [group_of(words(1, 20), [], 1)])
    text = {**text, "mm_token_type_ids": torch.zeros_like(text["input_ids"])}
    with Float64():
        wants = [batch_run(model, batch) for batch in (with_images, text)]
        sharing = flexdpo.share_prefixes(model, **ALL)
        gots = [batch_run(copy.deepcopy(model), batch) for batch in (with_images, text)]
    assert sharing.stats.batches_shared == 0  # the copies count for themselves
    for got, want in zip(gots, wants, strict=True):
        assert max(logit_error(got, want), gradient_error(got, want)) < 1e-11


def generated(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    made = model.generate(
        **batch, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    return (made.sequences, *made.logits)


@pytest.mark.parametrize("name", [n if n == "llava" else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_generation_from_images(name: str) -> None:
    """Shared, a copy of it, and prepared: bit for bit what it was."""
    model = make_model(name).eval()
    batch = padded_batch(model, KINDS[name], example_groups(KINDS[name]), "left")
    want = generated(model, batch)
    with flexdpo.share_prefixes(model, **ALL) as sharing:
        gots = [generated(each, batch) for each in (model, copy.deepcopy(model))]
        assert sharing.stats.passed_through == {"generation": 3}
    flexdpo.prepare_model(model)
    for got in (*gots, generated(model, batch)):
        assert all(map(torch.equal, got, want))


SWEEP = [
    pytest.param(name, side, mode, id=f"{name}-{side}-{mode}")
    for name in KINDS
    for side in ("right", "left")
    for mode in MODES
    if not (side == "left" and mode != "plain")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "mode"), SWEEP)
def test_every_kind_of_model(name: str, side: str, mode: str) -> None:
    require_the_ordinary_result(name, side, mode)
