"""Arguments of the wrong kind, to everything that reads data: one clear error, naming the argument and what it got."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from flexdpo import FlexdpoError, load_mixture, load_preference_dataset, regroup_by_prompt, tokenize_preferences
from tests.conftest import preference_rows


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "ok.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(2)))
    return str(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda _, v=v: load_preference_dataset(v), "a dataset must be one path, or one name on the hub, got")
          for v in (None, 3, ["a.jsonl"])),
        (lambda file: load_preference_dataset(file, split=None), "split must be the name of one, .* got NoneType"),
        *((lambda file, v=v: load_preference_dataset(file, columns=v), "columns must name one column for each, as in")
          for v in ("x", {"prompt": 3}, {3: "prompt"}, ["prompt"])),
        *((lambda _, v=v: load_mixture(v), "datasets must be a list of paths or of mappings with a path, got")
          for v in ("ok.jsonl", None, 3, {"path": "ok.jsonl"})),
        *((lambda file, v=v: load_mixture([{"path": file, "fraction": v}]), "must be a number above 0")
          for v in (0, -1, float("nan"), float("inf"), "x", True)),
        *((lambda file, v=v: load_mixture([file], test_split_size=v), "use a share of the rows between 0 and 1")
          for v in ("x", 1.5, float("nan"))),
        *((lambda _, v=v: regroup_by_prompt(v), "regrouping needs the dataset that tokenize_preferences returns")
          for v in ([], None, "x")),
    ],
)  # fmt: skip
def test_loading(call: Callable[[Any], Any], message: str, file: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        call(file)


@pytest.mark.parametrize("name", [None, "gpt2", 3])
def test_what_is_no_tokenizer(name: Any) -> None:
    with pytest.raises(FlexdpoError, match="train: expected a tokenizer or a processor, got"):
        tokenize_preferences(Dataset.from_list(preference_rows(1)), name, max_length=None)


@pytest.mark.parametrize("setting", ["max_length", "max_prompt_length", "num_proc"])
@pytest.mark.parametrize("value", ["50", 2.5, True])
def test_settings_that_are_no_numbers(setting: str, value: Any, tokenizer: Any) -> None:
    with pytest.raises(FlexdpoError, match=rf"{setting} must be a whole number, at least \d, got \w+ \({value!r}\)"):
        tokenize_preferences(Dataset.from_list(preference_rows(1)), tokenizer, **{"max_length": None, setting: value})


@pytest.mark.parametrize("value", [1, 2.5, "x", True])
def test_sizes_of_groups(value: Any, tokenizer: Any) -> None:
    data, _ = tokenize_preferences(Dataset.from_list(preference_rows(2)), tokenizer, max_length=None)
    with pytest.raises(FlexdpoError, match="max_responses must be at least 2"):
        regroup_by_prompt(data, max_responses=value)
