"""Packed rows with images against one sequence at a time: values and gradients, tower and projector included."""

from __future__ import annotations

import pytest

from flexdpo import Row, prepare_model
from tests.hf.equivalence import Float64, gradient_error, logit_error
from tests.images.models import KINDS, make_model
from tests.images.runs import example_groups, packed_run, stock_run


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
