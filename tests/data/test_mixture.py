"""Several datasets as one: read by its own columns, counted, in an order that a continued run goes on with."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from flexdpo import DPOTrainer, FlexdpoError, load_mixture, tokenize_preferences
from flexdpo.data.mixture import Mixture
from flexdpo.data.stream import StreamedPreferences
from tests.training.test_trainer import settings


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three datasets in three layouts, of 12, 8 and 6 rows; one row of the first is empty."""
    pairs = [{"prompt": f"w3 w{n + 4} ", "chosen": "w5", "rejected": "w6"} for n in range(12)]
    pairs[2]["chosen"] = ""
    others = {
        "pairs": pairs,
        "named": [{"q": f"w7 w{n + 4} ", "a": "w5", "b": "w6", "c": n} for n in range(8)],
        "ranked": [{"prompt": f"w8 w{n + 4} ", "responses": ["w5", "w6", "w7"], "ranks": [2, 1, 3]} for n in range(6)],
    }
    for name, rows in others.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / f"{name}.jsonl") for name in others]


def entries(files: list[str], **more: list[Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"path": path} for path in files]
    made[1]["columns"] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for key, values in more.items():
        for entry, value in zip(made, values, strict=True):
            entry[key] = value
    return made


def prompts(rows: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row["prompt_ids"]).split()[0] for row in rows]


def test_each_is_read_as_its_columns_say(files: list[str], tokenizer: Any) -> None:
    mixture, held_out = load_mixture(entries(files))
    assert held_out is None
    data, report = tokenize_preferences(mixture, tokenizer, max_length=None)
    assert prompts(data, tokenizer) == ["w3"] * 11 + ["w7"] * 8 + ["w8"] * 6
    assert data[24]["edges"] == [[0, 2], [1, 0], [1, 2]]
    assert (report.rows, report.used, report.skipped) == (26, 25, {"empty response": 1})
    said = report.summary()
    assert "25 of 26 rows used" in said
    assert f"train, {files[1]}: 8 of 8 rows used" in said
    assert "read as ranked responses: prompt, responses, ranks" in said
    assert "not read: 'c'" in said


def test_counts_and_shares(files: list[str], tokenizer: Any) -> None:
    def sizes(mixture: Mixture) -> list[int]:
        return [len(part.data) for part in mixture.parts]

    counted = load_mixture(entries(files, count=[5, None, 2]))[0]
    assert sizes(counted) == [5, 8, 2]
    # which the report says, as it says the names
    assert [part.name.removeprefix(str(file)) for part, file in zip(counted.parts, files, strict=True)] == [
        " (5 of its 12 rows)", "", " (2 of its 6 rows)"
    ]  # fmt: skip
    # as many as none of them runs out of: 6 are a quarter
    assert sizes(load_mixture(entries(files, fraction=[1, 2, 1]))[0]) == [4, 8, 4]
    assert sizes(load_mixture(entries(files, fraction=[*np.float32([0.5, 0.25]), 0.25]))[0]) == [12, 6, 6]
    assert sizes(load_mixture(files[::2])[0]) == [12, 6]


def test_held_out_rows(files: list[str], tokenizer: Any) -> None:
    train, test = load_mixture(entries(files), test_split_size=0.25, seed=3)
    again, same = load_mixture(entries(files), test_split_size=np.float32(0.25), seed=3)
    assert test is not None
    assert same is not None
    rows = [[row for part in mixture.parts for row in part.data.to_list()] for mixture in (train, test)]
    assert [len(part) for part in rows] == [20, 6]
    whole = [row for part in load_mixture(entries(files))[0].parts for row in part.data.to_list()]
    assert sorted(map(json.dumps, rows[0] + rows[1])) == sorted(map(json.dumps, whole))
    assert rows == [[row for part in mixture.parts for row in part.data.to_list()] for mixture in (again, same)]
    with pytest.raises(FlexdpoError, match="leaves one of the two without any"):
        load_mixture(files[2:], test_split_size=0.01)
    with pytest.raises(FlexdpoError, match="a stream does not tell"):
        load_mixture(files, test_split_size=0.2, streaming=True)


def streamed(files: list[str], tokenizer: Any, **changes: Any) -> StreamedPreferences:
    mixture, _ = load_mixture(entries(files, fraction=[0.5, 0.3, 0.2]), streaming=True)
    return StreamedPreferences(mixture, tokenizer, max_length=None, **changes)


def test_streams_alternate_by_their_shares(files: list[str], tokenizer: Any) -> None:
    found = prompts(streamed(files, tokenizer, endless=False), tokenizer)
    assert found[:10] == ["w3", "w7", "w3", "w8", "w3", "w7", "w3", "w8", "w3", "w7"] or sorted(found[:10]) == (
        ["w3"] * 5 + ["w7"] * 3 + ["w8"] * 2
    )
    endless = streamed(files, tokenizer, shuffle_buffer=4, seed=1)
    first = list(islice(endless, 60))
    assert list(islice(streamed(files, tokenizer, shuffle_buffer=4, seed=1), 60)) == first
    assert len({json.dumps(row) for row in first[:20]}) == 20
    report = endless.report
    assert report.used + sum(report.skipped.values()) == report.rows
    assert report.skipped == {"empty response": 1}
    # without shares, one after another
    mixture, _ = load_mixture(entries(files, count=[3, 2, 1]), streaming=True)
    rows = StreamedPreferences(mixture, tokenizer, max_length=None, endless=False)
    assert prompts(rows, tokenizer) == ["w3"] * 2 + ["w7"] * 2 + ["w8"]
    assert rows.report.rows == 6


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_continued_run_is_the_uninterrupted_one(
    files: list[str], tmp_path: Path, tokenizer: Any, small_model: Any, streaming: bool
) -> None:
    def run(folder: str, resume: bool = False, **changes: Any) -> list[Any]:
        mixture, _ = load_mixture(entries(files, fraction=[0.5, 0.3, 0.2]), streaming=streaming)
        args = settings(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=3, logging_steps=1, **changes)
        trainer = DPOTrainer(small_model(), None, args, train_dataset=mixture, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-3") if resume else None)
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    whole = run("once")
    assert len(whole) == 6
    assert run("again", resume=True) == whole


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the list is empty"),
        ([3], "entry 0: expected a path, or a mapping with one, found int"),
        ([{"name": "x"}], "entry 0: expected a path"),
        ([{"path": "x", "spilt": "a"}], "entry 0: unknown 'spilt'; did you mean 'split'"),
        ([{"path": "x", "count": 0}], "count=0 must be a number of rows"),
        ([{"path": "x", "count": 1, "fraction": 1}], "give 'count' or 'fraction', not both"),
    ],
)
def test_entries_that_cannot_be_used(given: list[Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        load_mixture(given)


def test_entries_that_do_not_fit_their_data(files: list[str], tokenizer: Any) -> None:
    with pytest.raises(FlexdpoError, match=r"entry 1: 'fraction' is missing; give it for all datasets or for none"):
        load_mixture(entries(files, fraction=[1, None, 1]))
    with pytest.raises(FlexdpoError, match=r"count=99, but there are 12 rows"):
        load_mixture(entries(files, count=[99, None, None]))
    with pytest.raises(FlexdpoError, match=r"no column 'question'; found"):
        load_mixture([{"path": files[0], "columns": ["question"]}])
    labelled = Dataset.from_list([{"prompt": "w3 ", "completion": "w4", "label": True}])
    mixture, _ = load_mixture(files[:1])
    mixed = Mixture((*mixture.parts, type(mixture.parts[0])("labelled", labelled)))
    with pytest.raises(FlexdpoError, match="some datasets hold labelled responses and others preferences"):
        tokenize_preferences(mixed, tokenizer, max_length=None)
