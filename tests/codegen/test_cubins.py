"""The attention kernels compiled for three cards: they fit, and spill no more than the committed table says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.codegen.conftest import ROOT, Suite
from tests.codegen.cubins import CARDS, CASES, IN_CI

SUITE = Suite("tests.codegen.cubins", interpret=False)
TABLE = ROOT / "notebooks" / "results" / "compiled-kernels.json"
ARCHITECTURES = {"A100": "sm_80", "H100": "sm_90", "B200": "sm_100"}


@pytest.mark.codegen
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("case", IN_CI)
def test_kernels_fit_and_spill_no_more_than_recorded(case: str, card: str, outcome: dict[str, Any]) -> None:
    recorded = json.loads(TABLE.read_text(encoding="utf-8"))["cards"][card][case]
    for which in ("forward", "backward"):
        found, ceiling = outcome[which], recorded[which]
        assert found["arch"].startswith(ARCHITECTURES[card])
        assert found["shared_bytes"] <= found["shared_limit"]
        assert found["spilled_bytes"] <= ceiling["spilled_bytes"]
        # the table says which kernel spills that
        assert found["tile"] == ceiling["tile"]
        assert found["warps"] == ceiling["warps"]


def test_the_table_holds_every_case_and_every_kernel_fits() -> None:
    cards = json.loads(TABLE.read_text(encoding="utf-8"))["cards"]
    assert list(cards) == list(CARDS)
    for cases in cards.values():
        assert list(cases) == list(CASES)
        for kernels in cases.values():
            for kernel in kernels.values():
                assert 0 < kernel["shared_bytes"] <= kernel["shared_limit"]
