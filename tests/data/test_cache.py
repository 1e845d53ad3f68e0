"""Tokens that are kept between runs, when their file is not what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexdpo import load_preference_dataset, tokenize_preferences
from tests.conftest import preference_rows


@pytest.mark.parametrize("kept", [slice(0), slice(3000), slice(20, None)], ids=["nothing", "beginning", "end"])
def test_a_damaged_cache_is_named_and_written_again(tmp_path: Path, tokenizer: Any, caplog: Any, kept: slice) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(40)))
    data = load_preference_dataset(str(path))
    want = tokenize_preferences(data, tokenizer, max_length=64).dataset[:]
    (cache,) = Path(data.cache_files[0]["filename"]).parent.glob("cache-*.arrow")
    cache.write_bytes(cache.read_bytes()[kept])
    assert tokenize_preferences(data, tokenizer, max_length=64).dataset[:] == want
    assert f"{cache} is damaged" in caplog.text
