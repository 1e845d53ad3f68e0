"""What is compiled on a card, and how often: generated for one, launched on none."""

from typing import Any

import pytest

from tests.codegen.conftest import Suite
from tests.codegen.graph_cases import EQUAL
from tests.codegen.model_cases import CONFIGS

pytestmark = pytest.mark.codegen
SUITE = Suite("tests.codegen.graph_cases", interpret=False)


@pytest.mark.parametrize("case", EQUAL)
def test_one_dynamic_kernel_is_compiled_once(case: str, outcome: int) -> None:
    # left to itself, torch takes sizes that are equal at the first call for one, and compiles again when they part
    assert outcome == 1


@pytest.mark.parametrize("case", [f"{name} layers" for name in CONFIGS])
def test_a_decoder_layer_is_one_graph_with_its_attention_inside(case: str, outcome: dict[str, Any]) -> None:
    assert outcome["graph breaks"] == {}
    assert outcome["attention outside of layers"] == 0
    # forward and backward; layers with a window are another graph than those without
    kinds = 2 if case in ("gemma2 layers", "gpt_oss layers") else 1
    assert outcome["graphs"] == kinds
    assert outcome["launches of attention"] == [1] * (2 * kinds)


@pytest.mark.parametrize("case", ["llama layers of all lengths", "llama layers with as many tiles as heads"])
def test_dynamic_layers_are_compiled_once(case: str, outcome: dict[str, Any]) -> None:
    assert outcome["graph breaks"] == {}
    assert outcome["graphs"] == 1
    assert outcome["launches of attention"] == [1, 1]
