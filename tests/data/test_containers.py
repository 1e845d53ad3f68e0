"""The same rows in every kind of file: what is recognised, and read, does not depend on it."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from flexdpo import FlexdpoError, load_preference_dataset
from tests.data.test_columns import FORMATS, bytewise, own_cache, report_of, tokens_of

__all__ = ["bytewise", "own_cache"]

NAMES = [
    "sharegpt_system",
    "openai_preference",
    "context_completions",
    "scored_completions",
    "tools_nulls",
    "label_int",
]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def save(rows: list[dict[str, Any]], folder: Path) -> Path:
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(folder)
    return folder


def write_folder(rows: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir()
    for number, row in enumerate(rows):
        (folder / f"{number}.jsonl").write_bytes(lines_of([row]))
    return folder


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)


# a writer gives back the path, where it is not the one it was given
WRITERS: dict[str, Any] = {
    "rows.jsonl.gz": lambda rows, path: path.write_bytes(gzip.compress(lines_of(rows))),
    "rows.jsonl.xz": lambda rows, path: path.write_bytes(lzma.compress(lines_of(rows))),
    "rows.jsonl.zst": lambda rows, path: path.write_bytes(pytest.importorskip("zstandard").compress(lines_of(rows))),
    "rows.json": lambda rows, path: path.write_text(json.dumps(rows)),
    "rows.json.gz": lambda rows, path: path.write_bytes(gzip.compress(json.dumps({"v": 1, "data": rows}).encode())),
    "data.json": lambda rows, path: path.write_text(json.dumps({"data": rows}, indent=1)),
    "splits.json": lambda rows, path: path.write_text(json.dumps({"test": rows[:1], "train": rows})),
    "rows.parquet": lambda rows, path: Dataset.from_list(rows).to_parquet(path),
    "rows.arrow": lambda rows, path: next(save(rows, path.parent / "saved").rglob("*.arrow")),
    "saved": save,
    "folder": write_folder,
    "rows.csv": write_csv,
}


def write(rows: list[dict[str, Any]], kind: str, folder: Path) -> Path:
    written = WRITERS[kind](rows, folder / kind)
    return written if isinstance(written, Path) else folder / kind


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", WRITERS)
def test_rows_do_not_depend_on_the_file(bytewise: Any, tmp_path: Path, kind: str, streaming: bool) -> None:
    for name in NAMES if not streaming else NAMES[:3]:
        source = FORMATS / f"{name}.jsonl"
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        if (kind, name) == ("folder", "tools_nulls"):
            continue  # files whose columns differ in type are refused
        folder = tmp_path / name
        folder.mkdir()
        dataset = load_preference_dataset(str(write(rows, kind, folder)), streaming=streaming)
        want = load_preference_dataset(str(source))
        assert tokens_of(dataset, bytewise) == tokens_of(want, bytewise), name
        assert report_of(dataset, bytewise).layout == report_of(want, bytewise).layout


def test_splits_within_a_document(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "007", "rejected": "1e3"} for n in range(3)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": rows, "test": rows[:1]}))
    assert load_preference_dataset(str(path), split="test").to_list() == rows[:1]
    assert load_preference_dataset(str(path), split="train[1:]").to_list() == rows[1:]
    with pytest.raises(FlexdpoError, match="no split 'dev'; found 'train', 'test'"):
        load_preference_dataset(str(path), split="dev")
    path.write_text(json.dumps({column: [row[column] for row in rows] for column in rows[0]}))
    assert load_preference_dataset(str(path)).to_list() == rows
    # one row of messages is no set of splits
    row = {column: [{"role": "user", "content": column}] for column in rows[0]}
    path.write_text(json.dumps(row, indent=1))
    assert load_preference_dataset(str(path)).to_list() == [row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_preference_dataset(str(path)).to_list() == rows


def test_a_folder_that_cannot_be_unpacked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, taken = tmp_path / "rows.json", tmp_path / "taken"
    path.write_text(json.dumps({"data": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}))
    taken.write_text("")
    monkeypatch.setenv("FLEXDPO_CACHE", str(taken))
    with pytest.raises(FlexdpoError, match=r"must be unpacked into .* set FLEXDPO_CACHE to a folder that can"):
        load_preference_dataset(str(path))


def test_zstd_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(FlexdpoError, match=r"needs the zstandard package; pip install zstandard, or unpack the file"):
        load_preference_dataset(str(path))


# --- columns of other names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_columns_say_which_is_which(bytewise: Any, tmp_path: Path, streaming: bool) -> None:
    rows = [{"prompt": "old", "q": "Nile?", "a": "Water.", "b": "Sand.", "n": n} for n in range(2)]
    path = write(rows, "rows.jsonl.gz", tmp_path)
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    got = load_preference_dataset(str(path), streaming=streaming, columns=columns)
    own = [{"prompt": "Nile?", "chosen": "Water.", "rejected": "Sand."}] * 2
    assert tokens_of(got, bytewise) == tokens_of(Dataset.from_list(own), bytewise)
    assert "not read: 'prompt (as stored)', 'n'" in report_of(got, bytewise).notes
    swapped = load_preference_dataset(
        str(path), streaming=streaming, columns={**columns, "chosen": "b", "rejected": "a"}
    )
    assert [responses[::-1] for _, responses, *_ in tokens_of(swapped, bytewise)] == [
        responses for _, responses, *_ in tokens_of(got, bytewise)
    ]
    with pytest.raises(FlexdpoError, match=r"no column 'quest'; found 'prompt', 'q', 'a', 'b', 'n'"):
        load_preference_dataset(str(path), streaming=streaming, columns={"prompt": "quest"})
    with pytest.raises(FlexdpoError, match="read one column twice"):
        load_preference_dataset(str(path), streaming=streaming, columns={"chosen": "a", "rejected": "a"})
