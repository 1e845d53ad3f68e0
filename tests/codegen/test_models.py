"""Whole models whose attention runs in interpreted CUDA kernels, against the CPU's own way, gradient by gradient."""

import math
from typing import Any

import pytest

from tests.codegen.conftest import Suite
from tests.codegen.model_cases import MODELS

pytestmark = pytest.mark.codegen
SUITE = Suite("tests.codegen.model_cases", interpret=True)


@pytest.mark.parametrize("case", MODELS)
def test_loss_and_every_gradient_agree(case: str, outcome: dict[str, dict[str, float]]) -> None:
    # as shares of a tensor's largest value. Float32 alone loses about 1e-6 here or there, where depends on the CPU, so
    # what the CPU's own way loses at worst is the unit; a wrong kernel is off by a tenth and more
    budget = max(1e-6, 2 * max(outcome["of pieces to float64"].values()))
    assert {name: share for name, share in outcome["to float64"].items() if not share <= budget} == {}
    assert budget < 1e-5


@pytest.mark.parametrize("case", ["trainer"])
def test_a_trainer_on_a_card_compiles_its_layers_unasked(case: str, outcome: dict[str, Any]) -> None:
    assert outcome["compiles unasked"]
    # two layers, two steps: one graph for the policy, one without gradients for its reference
    assert outcome["graphs"] == 2
    assert outcome["graph breaks"] == {}
    assert outcome["attention outside of layers"] == 0
    assert outcome["launches of attention"] == [1, 1, 1]
    # what is interpreted is right as well: at the default rate a step hardly moves the policy away from its reference
    assert outcome["losses"] == pytest.approx([math.log(2)] * 2, abs=1e-3)
