"""Whole models whose attention runs in interpreted CUDA kernels, against the CPU's own way, gradient by gradient."""

import pytest

from tests.codegen.conftest import Suite
from tests.codegen.model_cases import CASES

pytestmark = pytest.mark.codegen
SUITE = Suite("tests.codegen.model_cases", interpret=True)
SHARE = 1e-6


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_agree(case: str, outcome: dict[str, dict[str, float]]) -> None:
    exact = outcome["to float64"]
    # where float32 itself loses more, the kernels may lose twice what the pieces do
    budget = {name: max(SHARE, 2 * share) for name, share in outcome["of pieces to float64"].items()}
    assert {name: share for name, share in exact.items() if not share <= budget[name]} == {}
    if case != "gpt_oss":  # whose experts and sinks lose more than that in float32, either way
        assert {name: share for name, share in outcome["to pieces"].items() if not share <= SHARE} == {}
