"""``max_prompt_length``: a prompt keeps its end, and its responses go on sharing it."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from flexdpo import FlexdpoError, tokenize_preferences
from flexdpo.data.stream import StreamedPreferences
from tests.conftest import preference_rows


def test_a_prompt_keeps_its_end_and_is_shared(tokenizer: Any) -> None:
    rows = preference_rows(12)
    whole = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=64)
    short = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=64, max_prompt_length=3)
    cut = sum(len(row["prompt_ids"]) > 3 for row in whole.dataset)
    assert cut
    assert "prompt cut on its left to max_prompt_length" in short.report.summary()
    for before, after in zip(whole.dataset, short.dataset, strict=True):
        assert after["prompt_ids"] == before["prompt_ids"][-3:]
        assert after["response_ids"] == before["response_ids"]
    # rows of token ids, and a stream
    again = tokenize_preferences(whole.dataset, tokenizer, max_length=64, max_prompt_length=3).dataset
    assert again["prompt_ids"][:] == short.dataset["prompt_ids"][:]
    stream = StreamedPreferences(
        Dataset.from_list(rows).to_iterable_dataset(), tokenizer, max_length=64, max_prompt_length=3, endless=False
    )
    assert [row["prompt_ids"] for row in stream] == short.dataset["prompt_ids"][:]
    # a long one is read to its end
    long = [{**rows[0], "prompt": "w3 " * 60_000 + rows[0]["prompt"]}]
    read = tokenize_preferences(Dataset.from_list(long), tokenizer, max_length=64, max_prompt_length=3).dataset[0]
    assert read == short.dataset[0]
    with pytest.raises(FlexdpoError, match="max_prompt_length=64 leaves no room for a response within max_length=64"):
        tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=64, max_prompt_length=64)
