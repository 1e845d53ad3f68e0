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
    # against float64: within 1e-6 of a tensor's largest value; where the CPU's float32 loses more, within twice that
    budget = {name: max(SHARE, 2 * share) for name, share in outcome["of pieces to float64"].items()}
    assert {name: share for name, share in exact.items() if not share <= budget[name]} == {}
    # both ways of GPT-OSS are up to 2e-6 off in float32, also where no attention is (its router's bias: 1.7e-6 on the
    # CPU, 1.4e-6 with the kernels), so the two cannot agree more closely with each other than with float64
    if case != "gpt_oss":
        assert {name: share for name, share in outcome["to pieces"].items() if not share <= SHARE} == {}
