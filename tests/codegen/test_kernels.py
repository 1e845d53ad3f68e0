"""The attention kernels that a card would run, interpreted, against dense attention in float64."""

from typing import Any

import pytest

from tests.codegen.conftest import Suite
from tests.codegen.kernel_cases import FAULTS, KERNELS

pytestmark = pytest.mark.codegen
SUITE = Suite("tests.codegen.kernel_cases", interpret=True)


@pytest.mark.parametrize("case", KERNELS)
def test_output_and_gradients_are_within_budget(case: str, outcome: dict[str, Any]) -> None:
    assert outcome["wrong"] == {}
    expected = ["output", "dQ", "dK", "dV", *(["dSinks"] if KERNELS[case].sinks else [])]
    assert outcome["compared"] == expected
    # a kernel that meets one kind of tile only would leave half of itself unread
    if KERNELS[case].kind.name == "causal":
        assert outcome["partial"] > 0
        assert outcome["full"] > 0


@pytest.mark.parametrize(
    ("case", "wrong"),
    {
        # a fault of the lists of queries leaves output and dQ right
        "transposed lists": {"dK", "dV"},
        "short query list": {"dK", "dV"},
        "all tiles full": {"output", "dQ", "dK", "dV"},
        "missing tile": {"output", "dQ", "dK", "dV"},
        "broken promise": {"output", "dQ", "dK", "dV"},
    }.items(),
    ids=FAULTS,
)
def test_a_fault_is_found(case: str, wrong: set[str], outcome: dict[str, Any]) -> None:
    assert set(outcome["wrong"]) == wrong
