"""The benchmark of the log-probability pass: its figures, and the memory that chunks save."""

from __future__ import annotations

import pytest

from flexdpo import FlexdpoError
from flexdpo.bench import logps
from flexdpo.bench.logps import compare_logps, measure_logps


def test_a_small_measurement() -> None:
    # the logits of all targets would take 268 MB
    cost = measure_logps("chunked", targets=4096, vocabulary=16384, hidden=16)
    assert cost.way == "chunked"
    assert cost.forward_s > 0
    assert cost.backward_s > 0
    assert cost.total_s == cost.forward_s + cost.backward_s
    assert 1e6 < cost.peak_bytes < 200e6


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlexdpoError, match="unknown way 'full'; known: chunked, full logits, linear_cross_entropy"):
        measure_logps("full")  # type: ignore[arg-type]
    with pytest.raises(FlexdpoError, match=r"full logits of this size need about \d+\.\d GB and .* GB are free"):
        measure_logps("full logits", targets=2**40)
    with pytest.raises(FlexdpoError, match="measuring 'chunked' with -3 targets and 50 words failed: RuntimeError"):
        measure_logps("chunked", targets=-3, vocabulary=50)
    assert logps.WAYS[0] == "chunked"


@pytest.mark.slow
def test_chunks_take_a_quarter_of_the_memory_at_most() -> None:
    targets, vocabulary, hidden = 8192, 131_072, 512
    cost = measure_logps("chunked", targets=targets, vocabulary=vocabulary, hidden=hidden)
    # one copy of the full logits alone, and the ordinary pass holds several
    assert cost.peak_bytes <= targets * vocabulary * 4 / 4
    # the ordinary pass at this size needs 16 GB or more, so both are compared where it fits
    figures = compare_logps(targets=targets // 4, vocabulary=vocabulary, hidden=hidden)
    assert figures["memory_ratio"] <= 1 / 4
