"""The benchmark of the drop-in: what it counts, and that it compares like with like."""

from __future__ import annotations

import pytest

from flexdpo import FlexdpoError, cli
from flexdpo.bench.dropin import SharingBenchSettings, bench_sharing


def test_a_small_measurement() -> None:
    result = bench_sharing(
        SharingBenchSettings(prompts=1, completions=8, prompt_tokens=48, completion_tokens=12, rounds=2)
    )
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


def test_settings_out_of_range() -> None:
    with pytest.raises(FlexdpoError, match="completions must be at least 1, got 0"):
        SharingBenchSettings(completions=0)
