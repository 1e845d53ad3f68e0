"""How far a pair travels: a reader who follows it opens so many functions, and changes the file so often."""

from __future__ import annotations

from pathlib import Path

from tests.trace_one_pair import trace_one_pair


def test_one_pair_passes_few_functions(tmp_path: Path) -> None:
    trace = trace_one_pair(tmp_path)
    told = "\n".join(trace.lines())
    # the recorder saw the whole way: text, rows, mask, loss, gradient, and the look before the step
    names = {code.co_name for code in trace.calls}
    assert {
        "tokenize_batch",
        "pack",
        "build_block_mask",
        "sigmoid_loss",
        "backward",
        "require_finite",
    } <= names
    assert trace.functions <= 180, told
    assert trace.changes <= 140, told
