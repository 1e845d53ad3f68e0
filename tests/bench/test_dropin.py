"""The benchmark of the drop-in: what it counts, and that it compares like with like."""

from __future__ import annotations

import pytest

from flexdpo import cli
from flexdpo.bench.dropin import bench_sharing
from flexdpo.bench.settings import BenchSettings


def test_a_small_measurement() -> None:
    result = bench_sharing(BenchSettings(device="cpu"), prompts=1, completions=8, lengths=(48, 12))
    assert result.tokens_in == 8 * 60
    assert 48 + 8 * 6 <= result.tokens_run <= 48 + 8 * 12
    assert result.tokens_in >= 3 * result.tokens_run
    assert result.gradient_error < 1e-4
    assert 0 < result.plan_seconds < result.shared_seconds
    assert result.speed_up[0] <= result.speed_up[1] <= result.speed_up[2]
    table = result.table()
    assert "480" in table
    assert "times faster" in table


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--drop_in", "true", "--device", "cpu", "--scale", "0.05"]) == 0
    printed = capsys.readouterr().out
    assert "tokens through the model" in printed
    assert "of the step" in printed
