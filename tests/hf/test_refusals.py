"""What cannot be exact stops with one clear error: models, inputs and layouts that do not fit."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from flexdpo import FlexdpoError, Row, RowLayout, UnsupportedModelError, disable_dropout, prepare_model, share_prefixes
from flexdpo.hf import images
from flexdpo.hf.interface import mask_kind_of
from flexdpo.layout.row import stack_inputs
from tests.hf.architectures import build_model, build_or_skip
from tests.hf.equivalence import example_row, logit_error, packed_run
from tests.images.models import KINDS, make_model
from tests.images.runs import cast, group_of


@pytest.fixture
def model() -> Any:
    return prepare_model(build_model("mistral"))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("falcon", "does not go through transformers' attention interface"),
        ("bart", "takes no position_ids"),
        ("roberta", r"start at padding_idx \+ 1"),
        ("xlstm", "carries a recurrent state"),
        ("deepseek_v32", "layers of type indexed_attention choose keys"),
        ("deepseek_v4", "compressed_sparse_attention, heavily_compressed_attention compress neighbouring keys"),
        ("minimax_m3_vl_text", "minimax_m3_sparse choose blocks"),
    ],
)
def test_a_refusal_says_why_and_the_way_out(name: str, reason: str) -> None:
    stock = build_or_skip(name)
    with pytest.raises(
        UnsupportedModelError, match=rf"\(model_type '.*'\) cannot be exact .*{reason}.*\. Train it without"
    ):
        prepare_model(stock)
    assert stock.config._attn_implementation != "flexdpo"


def test_attention_that_looks_ahead() -> None:
    encoder = build_model("bert", is_decoder=False)
    with pytest.raises(UnsupportedModelError, match="also looks ahead"):
        prepare_model(encoder)(**example_row().inputs())


def test_a_mask_function_that_looks_ahead() -> None:
    with pytest.raises(UnsupportedModelError, match="also looks ahead"):
        mask_kind_of(lambda batch, head, q_idx, kv_idx: kv_idx <= q_idx + 4)


def test_positions_that_the_backbone_is_not_told() -> None:
    class Forgetful(LlamaForCausalLM):
        def forward(self, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
            return super().forward(**kwargs)

    model = prepare_model(Forgetful(build_model("llama").config))
    model(input_ids=torch.tensor([[1, 5, 6]]))
    with pytest.raises(UnsupportedModelError, match="Forgetful does not hand position_ids on to its LlamaModel"):
        model(**example_row().inputs())


def test_a_model_that_wants_more_than_token_ids_in_training() -> None:
    class Wanting(LlamaForCausalLM):
        def forward(self, token_type_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
            if self.training and token_type_ids is None:
                raise ValueError("token_type_ids is required")
            return super().forward(**kwargs)

    model = prepare_model(Wanting(build_model("llama").config))
    with pytest.raises(UnsupportedModelError, match=r"Wanting does not run on token ids alone \(token_type_ids is req"):
        disable_dropout(model)


def test_image_tokens() -> None:
    from transformers import masking_utils
    from transformers.masking_utils import causal_mask_function, or_masks

    if not (blockwise_overlay := getattr(masking_utils, "blockwise_overlay", None)):
        pytest.skip("this version of transformers has a mask of its own for each kind of model with images")

    text, image = torch.full((1, 8), -1), torch.tensor([[-1, 0, 0, -1, -1, -1, -1, -1]])
    assert mask_kind_of(or_masks(causal_mask_function, blockwise_overlay(text))).name == "causal"
    with pytest.raises(UnsupportedModelError, match="image or audio tokens"):
        mask_kind_of(or_masks(causal_mask_function, blockwise_overlay(image)))


def test_images_before_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "TAKES_IMAGES", False)
    model, kind = make_model("llava"), KINDS["llava"]
    with pytest.raises(UnsupportedModelError, match=r"LlavaForConditionalGeneration looks at images, .* 5\.15 on"):
        share_prefixes(model)
    picture, tokens = kind.picture(1)
    row = Row.from_groups([group_of(tokens, [picture], 1)])
    with pytest.raises(UnsupportedModelError, match=r"has images, .* or transformers is older than 5"):
        prepare_model(model)(**cast(row.inputs(), model))


def test_a_mask_function_of_its_own() -> None:
    """A distance is honoured; a table of tokens is not, since positions stand for several tokens at once."""
    assert mask_kind_of(lambda batch, head, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 7)).name == "other"
    table, reach = torch.ones(1, 9, dtype=torch.bool), torch.tensor(7)
    assert mask_kind_of(lambda batch, head, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < reach)).size == 0
    with pytest.raises(UnsupportedModelError, match="depends on which token stands where"):
        mask_kind_of(lambda batch, head, q_idx, kv_idx: (kv_idx <= q_idx) & table[batch, kv_idx])


def recursive(table: torch.Tensor | None = None) -> Any:
    """A function that its own closure leads back to, by itself and by a list that holds it and itself."""
    around: list[Any] = []

    def near(batch: Any, head: Any, q_idx: Any, kv_idx: Any, steps: int = 2) -> Any:
        if steps:
            return near(batch, head, q_idx, kv_idx, steps - 1)
        assert around
        allowed = (kv_idx <= q_idx) & (q_idx - kv_idx < 7)
        return allowed if table is None else allowed & table[batch, kv_idx]

    around += [around, near, {"self": near}]
    return near


def with_a_default(table: torch.Tensor) -> Any:
    def mask(batch: Any, head: Any, q_idx: Any, kv_idx: Any, table: torch.Tensor = table) -> Any:
        return (kv_idx <= q_idx) & table[batch, kv_idx]

    return mask


def with_a_partial(table: torch.Tensor) -> Any:
    def mask(table: torch.Tensor, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & table[batch, kv_idx]

    return functools.partial(mask, table)


def in_a_dictionary(table: torch.Tensor) -> Any:
    tables = {"only": [table]}
    return lambda batch, head, q_idx, kv_idx: (kv_idx <= q_idx) & tables["only"][0][batch, kv_idx]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [recursive, with_a_default, with_a_partial, in_a_dictionary])
def test_a_table_of_tokens_is_found_wherever_a_mask_function_keeps_it(make: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="depends on which token stands where"):
        mask_kind_of(make(torch.ones(1, 9, dtype=torch.bool)))


@pytest.mark.timeout(20)
def test_a_mask_function_whose_closure_leads_back_to_it() -> None:
    function = recursive()
    kind = mask_kind_of(function)
    assert (kind.name, kind.function) == ("other", function)

    def endless(*places: Any) -> Any:
        return endless(*places)

    with pytest.raises(UnsupportedModelError, match="calls itself without end"):
        mask_kind_of(endless)


def test_not_a_model_of_transformers() -> None:
    with pytest.raises(FlexdpoError, match=r"expected a transformers PreTrainedModel .*, got Linear"):
        prepare_model(torch.nn.Linear(2, 2))


def test_data_parallel(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="torchrun or accelerate launch"):
        prepare_model(torch.nn.DataParallel(build_model("mistral")))
    # what nn.DataParallel makes of a prepared model on each of its devices
    replica = model._replicate_for_data_parallel()
    with pytest.raises(UnsupportedModelError, match="torchrun or accelerate launch"):
        replica(**example_row().inputs())


def test_unknown_kernel() -> None:
    with pytest.raises(FlexdpoError, match=r"impl must be one of .*, got 'flx'; did you mean 'flex'\?"):
        prepare_model(build_model("mistral"), impl="flx")  # type: ignore[arg-type]


def test_attention_dropout() -> None:
    dropping = prepare_model(build_model("mistral", attention_dropout=0.1)).train()
    with pytest.raises(FlexdpoError, match=r"attention dropout 0\.1, .* flexdpo\.disable_dropout\(model\)"):
        dropping(**example_row().inputs())


def test_attention_switched_back_after_preparation(model: Any) -> None:
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match=r"never called flexdpo's attention.*prepare_model"):
        model(**example_row().inputs())
    # and nothing of it stays behind
    model.set_attn_implementation("flexdpo")
    model(**example_row().inputs())


@pytest.mark.parametrize("attention", ["sdpa", "flexdpo"])
def test_unprepared_model(attention: str) -> None:
    model = build_model("mistral")
    model.set_attn_implementation(attention)
    with pytest.raises(FlexdpoError, match=r"not prepared for it .* call flexdpo\.prepare_model\(model\)"):
        model(**example_row().inputs())


# --- inputs and layouts ----------------------------------------------------------------------------------------------


def test_layout_of_another_length(model: Any) -> None:
    row, other = example_row(), example_row(prompt=40)
    with pytest.raises(FlexdpoError, match=r"layout is for 1 rows of \d+ tokens, but the inputs are \[1, \d+\]"):
        model(**{**row.inputs(), "attention_mask": other.layout, "position_ids": None})


def test_layout_of_another_batch(model: Any) -> None:
    row = example_row()
    batch = stack_inputs([row, row])
    with pytest.raises(FlexdpoError, match=r"layout is for 1 rows of \d+ tokens, but the inputs are \[2, \d+\]"):
        model(**{**batch, "attention_mask": row.layout})


def test_positions_of_another_row(model: Any) -> None:
    row, other = example_row(), example_row(prompt=40)
    with pytest.raises(FlexdpoError, match="position_ids have the shape"):
        model(**{**row.inputs(), "position_ids": other.position_ids})


def test_layout_on_another_device(model: Any) -> None:
    row = example_row()
    inputs = {**row.inputs(), "attention_mask": row.layout.to("meta"), "position_ids": None}
    with pytest.raises(FlexdpoError, match=r"layout is on meta and the inputs on cpu; move the row with row\.to"):
        model(**inputs)


def test_layout_without_tokens(model: Any) -> None:
    with pytest.raises(FlexdpoError, match="came without input_ids"):
        model(attention_mask=example_row().layout)


def test_layout_by_position(model: Any) -> None:
    row = example_row()
    with pytest.raises(FlexdpoError, match="pass a row by name"):
        model(row.input_ids, row.layout)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"labels": torch.zeros(1, 96, dtype=torch.int64)}, r"labels= .* use flexdpo\.response_logps"),
        (
            {"pixel_values": torch.zeros(1, 3, 8, 8)},
            "pixel_values=.* packed rows hold text and the images of Group.images",
        ),
        ({"my_bias": 3}, r"MistralAttention passes my_bias= to its attention.* train this model without"),
        ({"indices": (1, 2)}, "a packed row came with indices=, which flexdpo does not know how to share"),
        ({"is_causal": False}, "looks ahead"),
    ],
)
def test_unknown_arguments(model: Any, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        model(**{**example_row().inputs(), **extra})


def test_a_cache_with_tokens(model: Any) -> None:
    row = example_row()
    # transformers renamed the argument in 5.24
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        cache = model(input_ids=row.input_ids[:, :4], use_cache=True)[name]
    with pytest.raises(FlexdpoError, match="cannot be combined with a cache or with extra tokens"):
        model(**{**row.inputs(), name: cache})


def test_a_stale_mask(model: Any) -> None:
    """A BlockMask kept from an earlier row is not taken for this one's."""
    row, other = example_row(), example_row(seed=2)
    packed_run(model, row)
    (kept,) = {id(mask): mask for mask in row.layout.memo.values() if hasattr(mask, "block_mask")}.values()
    layer = model.model.layers[1]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": kept.block_mask}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match="mask that is not the packed row's own"):
        model(**other.inputs())
    hook.remove()
    # the row that failed left nothing behind
    want = packed_run(model, row)
    assert logit_error(packed_run(model, row), want) == 0


def test_a_failed_forward_leaves_nothing_behind(model: Any) -> None:
    row = example_row()
    want = model(input_ids=row.input_ids[:, :9], use_cache=False).logits
    layer = model.model.layers[1]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**row.inputs())
    hook.remove()
    torch.testing.assert_close(model(input_ids=row.input_ids[:, :9], use_cache=False).logits, want)


def test_layouts_that_do_not_stack() -> None:
    with pytest.raises(FlexdpoError, match="at least one layout"):
        RowLayout.stack([])
    layout = example_row().layout
    with pytest.raises(FlexdpoError, match=r"layouts are on cpu, meta"):
        RowLayout.stack([layout, layout.to("meta")])


def test_prompt_tuning() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    inner = prepare_model(build_model("mistral", dtype=torch.float32))
    wrapped = peft.get_peft_model(inner, config)
    with pytest.raises(UnsupportedModelError, match="puts extra tokens before every sequence"):
        prepare_model(wrapped)
    with pytest.raises(FlexdpoError, match=r"computed with a packed row's layout \(cat\)"):
        wrapped(**example_row().inputs())


def test_an_interrupted_forward_does_not_reach_another_model(model: Any) -> None:
    """Ctrl-C skips the hook that lets go of the layout; a row-sized plain forward elsewhere must not inherit it."""
    row, other = example_row(), prepare_model(build_model("mistral"))
    with torch.no_grad():
        want = other(input_ids=row.input_ids, use_cache=False).logits

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**row.inputs())
        hook.remove()
        torch.testing.assert_close(other(input_ids=row.input_ids, use_cache=False).logits, want)
        torch.testing.assert_close(model(input_ids=row.input_ids, use_cache=False).logits, want)
