"""Preference datasets from files, folders and hub names; lines of a file are counted from 1, as editors do."""

import contextlib
import csv
import hashlib
import json
import logging
import lzma
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from flexdpo.data.cache import cache_folder
from flexdpo.data.columns import renamed
from flexdpo.data.file_faults import first_json_fault, odd_one, other_columns
from flexdpo.data.file_formats import BROKEN, OPENER_OF_SUFFIX, READER_OF_SUFFIX, format_of, is_json_lines
from flexdpo.data.folders import data_files, declares_files, files_by_split
from flexdpo.data.layouts import LAYOUTS
from flexdpo.data.pictures import with_paths_from
from flexdpo.errors import FlexdpoError, first_line, found, is_the_disks, nearest, quoted
from flexdpo.hf.names import local_path, why_unreachable

# a JSON document may hold its rows under one of these
_ROWS_KEYS = ("data", "rows", "examples")


def load_preference_dataset(
    name_or_path: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Dataset | IterableDataset:
    """Load one split of a dataset from a file, a folder or the Hugging Face hub.

    Args:
        name_or_path: A JSONL, JSON, Parquet, Arrow, CSV or TSV file (JSON and CSV also as .gz, .bz2, .xz or .zst), a
            folder written by ``save_to_disk``, a folder of data files, or a name on the hub. What exists on disk comes
            first. A JSON file is a list of rows, or holds one under ``"data"`` or under the names of splits.
        split: Which split; a single file, and a folder with one saved dataset, have ``"train"`` alone. Files and hub
            names also take slices such as ``"train[:10%]"``, unless they are streamed.
        config_name: Which configuration of a hub dataset or of a folder of data files.
        streaming: Read the rows as they are needed, without a copy in the cache; a fault in the data then shows only
            when its row is reached.
        columns: Which column is which, as in ``{"prompt": "question", "chosen": "response_j"}``, where the names say
            nothing that is known.

    Returns:
        The split, with its columns as stored; cells of a CSV file are text as written, so ``NA`` stays ``"NA"``.

    Raises:
        FlexdpoError: if nothing is there, it is empty or cannot be read (with the line of a JSONL file).
    """
    _require_names(name_or_path, split, columns)
    if streaming and {*split} & {*"[+"}:
        raise FlexdpoError(
            f"{name_or_path}: split={split!r} takes parts of a split, and a stream is one split as a whole; name one "
            "split, or leave streaming out"
        )
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        dataset = _load_folder(path, split, config_name, streaming)
    elif path.exists():
        dataset = _load_file(path, split, config_name, streaming)
    elif local_path(name_or_path) is not None:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FlexdpoError(f"{name_or_path}: no such file or folder{nearest(path.name, beside)}")
    else:
        why, offline = why_unreachable(name_or_path, dataset=True), datasets.config.HF_HUB_OFFLINE
        # only the local cache can help then; the library would retry the network for half a minute first
        datasets.config.HF_HUB_OFFLINE = offline or bool(why)
        named: dict[str, Any] = {"name": config_name, "split": split, "streaming": streaming}
        try:
            dataset = _load(name_or_path, [], name_or_path, note=why, **named)
        finally:
            datasets.config.HF_HUB_OFFLINE = offline
    if not streaming and len(dataset) == 0:
        raise FlexdpoError(f"{name_or_path}: there are no rows; give a dataset with at least one")
    dataset = renamed(dataset, columns, name_or_path) if columns else dataset
    return with_paths_from(dataset, path if path.is_dir() else path.parent) if path.exists() else dataset


def _require_names(name_or_path: Any, split: Any, columns: Any) -> None:
    if not isinstance(name_or_path, str | os.PathLike):
        raise FlexdpoError(
            f"a dataset must be one path, or one name on the hub, got {found(name_or_path)}; load_mixture reads several"
        )
    if not isinstance(split, str):
        raise FlexdpoError(f"{name_or_path}: split must be the name of one, such as 'train', got {found(split)}")
    pairs = columns.items() if isinstance(columns, Mapping) else [] if columns is None else [(columns, None)]
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise FlexdpoError(
            f"{name_or_path}: columns must name one column for each, as in {{'prompt': 'question'}}, got "
            f"{found(columns)}"
        )


def _load_file(path: Path, split: str, config_name: str | None, streaming: bool) -> Dataset | IterableDataset:
    kind, packed, reader = format_of(path)
    if reader is None:
        known = ", ".join(READER_OF_SUFFIX)
        raise FlexdpoError(f"{path}: cannot tell the format from the name; known endings are {known}")
    if config_name is not None:
        raise FlexdpoError(f"{path}: config_name={config_name!r} has no meaning for a single file; leave it out")
    if path.stat().st_size == 0:
        raise FlexdpoError(f"{path}: the file is empty; name another")
    options = _csv_options([path]) if reader == "csv" else {}
    base = split.split("[", maxsplit=1)[0]
    held = _rows_within(path, packed, base) if kind == ".json" else None
    if held is not None:
        options["data_files"] = {base: str(held)}
    elif packed:
        # what it takes to open it may be missing
        OPENER_OF_SUFFIX[packed](path).close()
    files = {"data_files": {"train": str(path)}, **options}
    return _load(str(path), [path], reader, split=split, streaming=streaming, **files)


def _rows_within(path: Path, packed: str, split: str) -> Path | None:
    """The rows that a JSON document holds under ``"data"``, as columns or under the split's name, as a file of lines.

    Returns ``None`` for lines, for a list, and for a document that the reader will find fault with.
    """
    try:
        with OPENER_OF_SUFFIX[packed](path, "rb") as stream:
            if is_json_lines(stream) and next(stream, b"").strip() and next(stream, b"").strip():
                return None
            stream.seek(0)
            content = stream.read()
        document = json.loads(content.decode("utf-8-sig")) if content.lstrip()[:1] == b"{" else None
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError):
        return None
    if not isinstance(document, dict):
        return None
    rows = _rows_of(path, document, split)
    if rows is None:
        return None
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    written = cache_folder("json") / f"{hashlib.blake2b(lines, digest_size=16).hexdigest()}.jsonl"
    try:
        written.parent.mkdir(parents=True, exist_ok=True)
        if not written.exists():
            partial = written.with_suffix(f".{os.getpid()}")
            partial.write_bytes(lines)
            partial.replace(written)
    except OSError as error:
        raise FlexdpoError(
            f"{path}: its rows must be unpacked into {written.parent}, which cannot be written ({error.strerror}); set "
            "FLEXDPO_CACHE to a folder that can, or give the file as .jsonl"
        ) from error
    return written


def _rows_of(path: Path, document: dict[str, Any], split: str) -> list[Any] | None:
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    if any(set(layout.split()) <= document.keys() for layout in LAYOUTS):
        columns = [
            value for value in lists.values() if all(isinstance(cell, str | int | float | None) for cell in value)
        ]
        # one row of messages, or a list of values for each column
        if len(columns) < len(document) or len({len(column) for column in columns}) > 1:
            return [document]
        return [dict(zip(document, cells, strict=True)) for cells in zip(*document.values(), strict=True)]
    held = next((lists[key] for key in _ROWS_KEYS if key in lists), None)
    if held is not None and split == "train":
        return held
    splits = {key: value for key, value in lists.items() if all(isinstance(row, dict) for row in value)}
    if not splits or len(splits) < len(document):
        return None
    if split not in splits:
        raise FlexdpoError(f"{path}: no split {split!r}; found {quoted(splits)}")
    return splits[split]


def _load_folder(path: Path, split: str, config_name: str | None, streaming: bool) -> Dataset | IterableDataset:
    if not any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        files = data_files(path)
        options: dict[str, Any] = {"name": config_name, "split": split, "streaming": streaming}
        if not declares_files(path):
            parts = files_by_split(path, files)
            if lost := {each.split("[")[0].strip() for each in split.split("+")} - {*parts, "all"}:
                raise FlexdpoError(
                    f"{path}: no split {quoted(lost)}; by their names its files are {quoted(parts)}. Name one of "
                    "these, or a file"
                )
            files = [file for held in parts.values() for file in held]
            options |= _csv_options(files) if _one_reader(path, files) == "csv" else {}
            options["data_files"] = {part: [_unpacked(file, part) for file in held] for part, held in parts.items()}
        elif any(format_of(file)[2] == "csv" for file in files):
            options |= _declared_csv_options(path, config_name)
        # resolved, because a bare folder name such as "json" would mean one of the library's own readers
        return _load(str(path), files, str(path.resolve()), **options)
    try:
        saved = datasets.load_from_disk(str(path))
    except IndexError as error:  # what the library makes of a saved dataset without a single row
        raise FlexdpoError(f"{path}: there are no rows; give a dataset with at least one") from error
    except (OSError, ValueError, KeyError) as error:
        raise FlexdpoError(f"{path}: the saved dataset cannot be read ({first_line(error)})") from error
    alone = not isinstance(saved, datasets.DatasetDict)
    splits = dict.fromkeys(["train", *([str(saved.split)] if saved.split else [])], saved) if alone else saved
    if split not in splits:
        held_there = f"the folder holds a single one, {quoted(splits)}" if alone else f"found {quoted(splits)}"
        raise FlexdpoError(f"{path}: no split {split!r}; {held_there}")
    return splits[split].to_iterable_dataset() if streaming else splits[split]


def _declared_csv_options(path: Path, config_name: str | None) -> dict[str, Any]:
    """Those of the CSV files that the folder itself gives to a configuration; none where it has others."""
    try:
        config: Any = datasets.load_dataset_builder(str(path.resolve()), config_name).config
    except (datasets.exceptions.DatasetsError, ValueError, OSError):
        return {}  # loading says what is wrong
    files = [Path(file) for held in (config.data_files or {}).values() for file in held]
    if not files or _one_reader(path, files) != "csv":
        return {}
    return _csv_options(files, None if config.sep == "," else config.sep)


def _one_reader(path: Path, files: Sequence[Path]) -> str:
    """What reads the files of a folder: the library would take those of one reader, and leave the others out."""
    kinds = {("\t" if format_of(file)[0] == ".tsv" else "", format_of(file)[2]): file for file in files}
    if len(kinds) > 1:
        raise FlexdpoError(
            f"{path}: {quoted(file.name for file in kinds.values())} are of different formats, and one dataset is read "
            "from files of one; convert them, or name each of them in datasets: or load_mixture"
        )
    return str(next(iter(kinds))[1])


def _unpacked(file: Path, split: str) -> str:
    """The file, or the rows within it where it is a JSON document that holds them."""
    kind, packed, _ = format_of(file)
    if packed:
        OPENER_OF_SUFFIX[packed](file).close()
    return str(((_rows_within(file, packed, split) if kind == ".json" else None) or file).absolute())


def _load(
    shown: str, files: Sequence[Path], source: str, *, streaming: bool, note: str = "", **options: Any
) -> Dataset | IterableDataset:
    """Call ``datasets.load_dataset`` and turn what it raises about the data into one clear error."""
    try:
        with silent_json_reader(), warnings.catch_warnings():
            # a CSV file whose rows have more cells than its header would be read with its columns shifted
            warnings.filterwarnings("error", message="Length of header or names")
            dataset = datasets.load_dataset(source, streaming=streaming, **options)
            if not streaming and any(format_of(file)[2] == "json" for file in files):
                # the JSON reader lets bytes through that are not UTF-8, and only a look at the cell trips over them
                dataset.data.validate(full=True)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, StopIteration, *BROKEN) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ else error
        # which configurations there are stands in other lines than the first
        about_configs = isinstance(cause, ValueError) and "config" in first_line(cause).lower()
        said = " ".join(str(cause).split("Example of usage")[0].split()) if about_configs else first_line(cause)
        reason = note or f"{type(cause).__name__}: {said}"
        if fault := next(filter(None, map(first_json_fault, files)), None):
            why = f"{fault}; mend it there, or name another file"
        elif len(files) > 1 and not is_the_disks(cause) and (odd := odd_one(files)):
            why = odd
        elif isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            why = f"{shown}: there are no rows; give a dataset with at least one"
        elif files:
            room = "make room, or set HF_HOME to a folder that can be written to"
            way_out = room if is_the_disks(cause) else "mend the file, or name another"
            way_out = "name one with config_name (--dataset_config)" if about_configs else way_out
            why = f"{shown}: cannot be loaded ({reason}); {way_out}"
        else:
            nowhere = f"{shown!r} is no file or folder here, and the Hugging Face hub does not give it"
            why = f"{nowhere} ({reason}); give another name"
        raise FlexdpoError(why) from error
    return dataset


@contextlib.contextmanager
def silent_json_reader() -> Iterator[None]:
    """Keep the reader from logging a fault that the caller reports with its line number."""
    logger = logging.getLogger("datasets.packaged_modules.json.json")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _csv_options(files: Sequence[Path], separator: str | None = None) -> dict[str, Any]:
    """Read every cell as text: a response ``42`` is no number and a response ``None`` is not missing."""
    separator = separator or ("\t" if format_of(files[0])[0] == ".tsv" else ",")
    headers = [_header(file, separator) for file in files]
    header = headers[0]
    # what is no column of the first file would be left out, without a word
    other = next((n for n, each in enumerate(headers) if set(each) != set(header)), None)
    if other is not None:
        raise FlexdpoError(other_columns(files[other], headers[other], files[0], header))
    # the reader's own name for a column without one, as an index column often is
    names = [name or f"Unnamed: {number}" for number, name in enumerate(header)]
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"sep": separator, "keep_default_na": False, "index_col": False, "features": features}


def _header(file: Path, separator: str) -> list[str]:
    try:
        with OPENER_OF_SUFFIX[format_of(file)[1]](file, "rt", encoding="utf-8-sig", newline="") as stream:
            header = next((cells for cells in csv.reader(stream, delimiter=separator) if cells), [])
    except (OSError, UnicodeDecodeError, csv.Error, *BROKEN) as error:
        raise FlexdpoError(f"{file}: cannot be read as CSV ({first_line(error)})") from error
    if len(set(header)) < len(header):
        raise FlexdpoError(f"{file}: the header names a column twice: {quoted(header)}")
    return header
