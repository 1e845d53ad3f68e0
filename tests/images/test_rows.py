"""Packed rows with images against one sequence at a time: values and gradients, tower and projector included."""

from __future__ import annotations

import pytest
import torch
import transformers

from flexdpo import Group, Row, disable_dropout, pack, prepare_model
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.layout.groups import PromptImage
from flexdpo.layout.row import stack_inputs
from tests.hf.equivalence import Float64, _run, gradient_error, logit_error
from tests.images.models import IMAGE, KINDS, TEXT, make_model, words
from tests.images.runs import call_of, cast, example_groups, group_of, packed_run, stock_run, whole_paths


def errors_of(name: str) -> tuple[float, float]:
    kind = KINDS[name]
    groups = example_groups(kind)
    with Float64():
        model = make_model(name)
        want = stock_run(model, kind, groups)
        prepare_model(model)
        got = packed_run(model, [Row.from_groups(groups, pad_to_multiple_of=16)], len(groups))
    return logit_error(got, want), gradient_error(got, want)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_a_packed_row_is_the_ordinary_run(name: str) -> None:
    assert max(errors_of(name)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model(name: str) -> None:
    assert max(errors_of(name)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_tower_under_the_same_name_attends_as_ever(name: str) -> None:
    kind = KINDS[name]
    groups = example_groups(kind)
    with Float64():
        model = make_model(name)
        want = stock_run(model, kind, groups)
        model.set_attn_implementation("flexdpo")
        prepare_model(model)
        got = packed_run(model, pack(groups, 400), len(groups))
        again = stock_run(model, kind, groups)
    assert max(logit_error(got, want), gradient_error(got, want)) < 1e-11
    assert max(logit_error(again, want), gradient_error(again, want)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "qwen3_vl"])
def test_compiled_flex_attention(name: str) -> None:
    kind = KINDS[name]
    groups = example_groups(kind)
    model = make_model(name, dtype=torch.float32)
    row = Row.from_groups(groups, pad_to_multiple_of=128)
    sequences = [torch.from_numpy(sequence) for group in groups for sequence in group.sequences]
    images = [group.images for group in groups for _ in group.response_ids]
    with torch.no_grad():
        want = [model(**call_of(model, kind, *each)).logits[0] for each in zip(sequences, images, strict=True)]
        prepare_model(model, impl="flex")
        logits = model(**cast(row.inputs(), model)).logits[0]
    for path, alone in zip(whole_paths(row), want, strict=True):
        torch.testing.assert_close(logits[path], alone, rtol=1e-4, atol=1e-4)


def test_each_image_of_a_row_is_there_once() -> None:
    kind = KINDS["qwen2_vl"]
    groups = example_groups(kind)
    (row,) = pack(groups)
    images = row.layout.images
    assert images is not None
    assert images.counts == (4, 4, 8)
    assert images.inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4], [1, 4, 8]]
    # every image token is one of a known image, and nothing else is
    torch.testing.assert_close(images.features >= 0, row.input_ids == IMAGE)
    moved = row.to("cpu").layout.without_masks().images
    assert moved is not None
    torch.testing.assert_close(moved.features, images.features)


def test_rows_are_put_side_by_side_with_their_images() -> None:
    kind = KINDS["gemma3"]
    groups = example_groups(kind)
    with Float64():
        model = make_model("gemma3")
        want = stock_run(model, kind, groups)
        prepare_model(model)
        rows = [Row.from_groups([group]) for group in groups]
        logits = model(**cast(stack_inputs(rows), model)).logits
        paths = [(b, path) for b, row in enumerate(rows) for path in whole_paths(row)]
        got = _run(model, [logits[b, path] for b, path in paths])
    assert max(logit_error(got, want), gradient_error(got, want)) < 1e-11


def test_a_prompt_that_was_cut_within_an_image() -> None:
    image, tokens = KINDS["llava"].picture(1)
    with pytest.raises(FlexdpoError, match=r"9 image tokens .id 120. and its 1 images stand for 16"):
        Row.from_groups([group_of(tokens[:10], [image], 1)])


@pytest.mark.parametrize("part", ["response 1", "the prompt"])
def test_an_image_token_without_an_image(part: str) -> None:
    image, tokens = KINDS["llava"].picture(1)
    pictured = group_of(words(1, 3) + tokens, [image], 1)
    literal = [3, IMAGE] if part == "the prompt" else [3, 4]
    responses = [[5, 6], [7, IMAGE] if part == "response 1" else [7]]
    text = Group.from_lists(literal, responses, [(0, 1)], name="row 5")
    with pytest.raises(FlexdpoError, match=rf"row 5: token 1 of {part} is the image token .id 120. and stands for no"):
        Row.from_groups([pictured, text])
    # without images a model takes the token for a word, as in an ordinary run
    assert Row.from_groups([text]).layout.images is None


def test_one_digest_for_images_of_other_sizes() -> None:
    kind = KINDS["qwen2_vl"]
    (small, in_small), (large, in_large) = kind.picture(1), kind.picture(1, 1)
    wrong = PromptImage(small.digest, large.tokens, large.inputs)
    with pytest.raises(FlexdpoError, match="8 tokens here and for 4 elsewhere"):
        Row.from_groups([group_of(words(1, 3) + in_small, [small], 1), group_of(words(1, 3) + in_large, [wrong], 2)])


def test_images_for_a_model_of_text() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    prepare_model(model)
    row = Row.from_groups(example_groups(KINDS["llava"]))
    with pytest.raises(UnsupportedModelError, match="has no get_image_features"):
        model(**row.inputs())


def test_a_model_that_encodes_images_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare_model(make_model("llava"))
    row = Row.from_groups(example_groups(KINDS["llava"])[:1])
    encode = type(model.model).get_image_features
    # never called by this name
    monkeypatch.setitem(vars(model.model), "get_image_features", lambda *a, **k: encode(model.model, *a, **k))
    with pytest.raises(UnsupportedModelError, match="did not encode the images"):
        model(**cast(row.inputs(), model))


def test_a_tower_that_draws_random_numbers() -> None:
    model = prepare_model(make_model("llava"))
    row = Row.from_groups(example_groups(KINDS["llava"])[:1])
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    with pytest.raises(UnsupportedModelError, match="draws random numbers while it encodes images"):
        model(**cast(row.inputs(), model))
    put_back = disable_dropout(model)
    model(**cast(row.inputs(), model))
    put_back()
    assert model.model.vision_tower.encoder.layers[0].self_attn.dropout == 0.5
    model.eval()
    model(**cast(row.inputs(), model))


def test_images_of_another_size_than_their_tokens() -> None:
    model, kind = prepare_model(make_model("gemma4")), KINDS["gemma4"]
    (small, in_small), (large, _) = kind.picture(1), kind.picture(1, 1)
    row = Row.from_groups([group_of(in_small, [PromptImage("a", small.tokens, large.inputs)], 1)])
    with pytest.raises(UnsupportedModelError, match=r"makes 6 features of the distinct images .* which have 4"):
        model(**cast(row.inputs(), model))
