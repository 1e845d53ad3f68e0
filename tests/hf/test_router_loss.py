"""The auxiliary loss of mixtures of experts: a shared token counts as often as the ordinary run repeats it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from flexdpo import FlexdpoError, RowLayout, prepare_model
from tests.hf.architectures import build_model, build_or_skip
from tests.hf.equivalence import Float64, Run, example_row, gradient_error

# fmt: off
WITH_AUXILIARY_LOSS = [
    "dbrx", "ernie4_5_moe", "flex_olmo", "flint", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared",
    "jetmoe", "laguna", "mellum", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
]
# fmt: on
TOLERANCE = 1e-11


def auxiliary(model: Any, **inputs: Any) -> tuple[float, Run]:
    model.zero_grad()
    loss = model(**inputs, output_router_logits=True).aux_loss
    loss.backward()
    return loss.item(), Run([], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("mixtral", "gpt_oss", "qwen3_moe") else pytest.mark.zoo)
        for n in WITH_AUXILIARY_LOSS
    ],
)
def test_auxiliary_loss_of_the_padded_batch(name: str) -> None:
    model, row = build_or_skip(name), example_row()
    sequences = [torch.from_numpy(s) for group in row.groups for s in group.sequences]
    padded = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True),
    }
    if not isinstance(model(**padded, output_router_logits=True).aux_loss, torch.Tensor):
        pytest.skip(f"{name} has no auxiliary loss in transformers {transformers.__version__}")
    with Float64():
        want, want_gradients = auxiliary(model, **padded)
        prepare_model(model)
        got, got_gradients = auxiliary(model, **row.inputs())
        # every distinct token counted once is another number
        layout = row.layout
        once = RowLayout(layout.position_ids, layout.subtree_end, layout.num_tokens, layout.multiplicity.clamp(max=1))
        wrong, _ = auxiliary(model, **{**row.inputs(), "attention_mask": once})
    assert got == pytest.approx(want, rel=TOLERANCE)
    assert gradient_error(got_gradients, want_gradients) < TOLERANCE
    assert wrong != pytest.approx(want, rel=1e-5)


def test_multiplicities_add_up_to_the_unshared_tokens() -> None:
    row = example_row()
    assert row.layout.multiplicity is not None
    assert int(row.layout.multiplicity.sum()) == row.unshared_tokens
    assert not row.layout.multiplicity[0, row.num_tokens :].any()


def test_a_layout_without_multiplicities() -> None:
    model, row = prepare_model(build_model("mixtral")), example_row()
    bare = RowLayout(row.layout.position_ids, row.layout.subtree_end, row.layout.num_tokens)
    with pytest.raises(FlexdpoError, match="output_router_logits=True needs the layout's multiplicity"):
        model(**{**row.inputs(), "attention_mask": bare}, output_router_logits=True)
    model(**{**row.inputs(), "attention_mask": bare})
