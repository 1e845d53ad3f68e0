"""Which of a dataset's files cannot be read, and where; lines are counted from 1, as editors do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets

from flexdpo.data.file_formats import BROKEN, OPENER_OF_SUFFIX, format_of, is_json_lines
from flexdpo.errors import first_line, found, quoted


def other_columns(file: Path, columns: Iterable[str], first: Path, expected: Iterable[str]) -> str:
    """What is said of a file whose columns are not those of the first."""
    return (
        f"{file}: has the columns {quoted(columns)}, where {first.name} has {quoted(expected)}; give all files of a "
        "dataset the same columns, or name each of them in datasets: or load_mixture"
    )


def odd_one(files: Sequence[Path]) -> str | None:
    """Which of several files begins with a row of other columns, or with other types in them, than the first."""
    first: dict[str, Any] = {}
    for file in files[:1000]:
        try:
            rows = datasets.load_dataset(str(format_of(file)[2]), data_files=str(file), split="train", streaming=True)
            row: dict[str, Any] = next(iter(rows), {})
        except Exception:  # a fault of the file's own, which has been looked for
            return None
        first = first or row
        if row.keys() != first.keys():
            return other_columns(file, row, files[0], first)
        for name, value in row.items():
            if type(value) is not type(first[name]) and None not in (value, first[name]):
                return (
                    f"{file}: the column {name!r} holds {found(value)}, where {files[0].name} holds "
                    f"{found(first[name])}; give all files of a dataset the same columns"
                )
    return None


def first_json_fault(path: Path) -> str | None:
    """Find the first line of a JSON or JSONL file that is no JSON object, as ``"file, line N: why"``."""
    kind, packed, reader = format_of(path)
    if reader != "json":
        return None
    try:
        with OPENER_OF_SUFFIX[packed](path, "rb") as stream:
            whole = kind == ".json" and not is_json_lines(stream)
            faults = (_fault(text, n, whole) for n, text in enumerate([stream.read()] if whole else stream, start=1))
            return next((f"{path}, line {fault}" for fault in faults if fault), None)
    except (OSError, *BROKEN) as error:
        return f"{path}: cannot be read ({first_line(error)})"
    except RecursionError:
        return f"{path}: nested too deeply to be preferences"


def _fault(content: bytes, line: int, whole: bool) -> str | None:
    """``"N: why"`` for a whole document, or for a line, which must be an object."""
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text if whole else text.strip() or "{}")
    except UnicodeDecodeError as error:
        return f"{line + content.count(10, 0, error.start)}: not UTF-8 text; convert the file to UTF-8"
    except json.JSONDecodeError as error:
        return f"{line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno})"
    return None if whole or isinstance(value, dict) else f"{line}: expected a JSON object, found {found(value)}"
