"""The benchmark of the drop-in: what it counts, and that it compares like with like."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexdpo import cli
from flexdpo.bench.dropin import bench_sharing
from flexdpo.bench.results_page import load_result, render_page
from flexdpo.bench.settings import BenchSettings


def test_a_small_measurement() -> None:
    result = bench_sharing(BenchSettings(device="cpu"), completions=8, lengths=(48, 12))
    assert result.tokens_in == 8 * 60
    assert 48 + 8 * 6 <= result.tokens_run <= 48 + 8 * 12
    assert result.tokens_in >= 3 * result.tokens_run
    assert result.gradient_error < 1e-4
    assert 0 < result.plan_seconds < result.shared_seconds
    assert result.speed_up[0] <= result.speed_up[1] <= result.speed_up[2]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "completions.json"
    words = ["bench", "--drop_in", "true", "--device", "cpu", "--scale", "0.02", "--json", str(path)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:7]] == [[k, p] for k in ("8", "16") for p in ("5", "20", "48")]
    page = render_page([load_result(path)])
    assert "The drop-in on completions of one prompt" in page
    assert "| 16 | 48 | 3 | 816 |" in page
    header, line = (
        next(each for each in page.splitlines() if each.startswith(f"| {of} |")) for of in ("completions", 8)
    )
    assert header.count("|") == line.count("|")
