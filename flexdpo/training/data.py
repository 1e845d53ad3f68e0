"""Preference data: files, folders and hub names to tokenised groups, with every unusable row counted.

Rows are numbered from 0 in errors and reports, as ``dataset[row]`` numbers them; lines of a file from 1, as editors do.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import json
import logging
import lzma
import os
import warnings
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.layout.groups import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOKENISED_COLUMNS = ("prompt_ids", "response_ids", "edges", "row")

# --- loading ---------------------------------------------------------------------------------------------------------

_READER_OF_SUFFIX = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
_OPENER_OF_SUFFIX: dict[str, Callable[..., Any]] = {
    "": open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}


def load_preference_dataset(name_or_path: str, *, split: str = "train", config_name: str | None = None) -> Dataset:
    """Load one split of a dataset from a file, a folder or the Hugging Face hub.

    Args:
        name_or_path: A JSONL, JSON, Parquet, CSV or TSV file (JSON and CSV also as .gz, .bz2 or .xz), a folder
            written by ``save_to_disk``, a folder of data files, or a name on the hub. What exists on disk comes first.
        split: Which split; a single file, and a folder with one saved dataset, have the one split ``"train"``. Files
            and hub names also take slices such as ``"train[:10%]"``.
        config_name: Which configuration of a hub dataset or of a folder of data files.

    Returns:
        The split, with its columns as stored; cells of a CSV file are text as written, so ``NA`` stays ``"NA"``.

    Raises:
        FlexdpoError: if nothing is there, it cannot be read (with the line of a JSONL file), it has no such split, or
            it is empty.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        dataset = _load_folder(path, split, config_name)
    elif path.exists():
        dataset = _load_file(path, split, config_name)
    elif _looks_local(name_or_path):
        raise FlexdpoError(f"{name_or_path}: no such file or folder{_neighbour(path)}")
    else:
        dataset = _load_from_hub(name_or_path, split, config_name)
    if len(dataset) == 0:
        raise FlexdpoError(f"{name_or_path}: there are no rows; give a dataset with at least one")
    return dataset


def _looks_local(name: str) -> bool:
    """Whether a name can only mean a path: the hub knows ``name`` and ``owner/name`` and nothing deeper."""
    return (
        name.startswith((".", "~", os.sep, "/"))
        or name.count("/") > 1
        or "\\" in name
        or _reader_for(Path(name)) is not None
    )


def _neighbour(path: Path) -> str:
    """Suggest the entry of the same folder whose name comes closest."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()])


def _split_suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that names the format and the one that names the compression, ``""`` for none."""
    packed = path.suffix.lower() if path.suffix.lower() in _OPENER_OF_SUFFIX else ""
    return (path.with_suffix("") if packed else path).suffix.lower(), packed


def _reader_for(path: Path) -> str | None:
    """Name the reader for a file, or ``None``; Parquet is compressed inside and has no outer suffix."""
    kind, packed = _split_suffixes(path)
    reader = _READER_OF_SUFFIX.get(kind)
    return None if packed and reader == "parquet" else reader


def _load_file(path: Path, split: str, config_name: str | None) -> Dataset:
    reader = _reader_for(path)
    if reader is None:
        raise FlexdpoError(
            f"{path}: cannot tell the format from the name; known endings are {', '.join(_READER_OF_SUFFIX)}"
        )
    if config_name is not None:
        raise FlexdpoError(f"{path}: config_name={config_name!r} has no meaning for a single file; leave it out")
    if path.stat().st_size == 0:
        raise FlexdpoError(f"{path}: the file is empty")
    options = _csv_options([path]) if reader == "csv" else {}
    return _load(str(path), [path], reader, split=split, data_files={"train": str(path)}, **options)


def _load_folder(path: Path, split: str, config_name: str | None) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    if not any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        files = sorted(file for file in path.rglob("*") if file.is_file() and _reader_for(file))
        if not files:
            raise FlexdpoError(
                f"{path}: the folder has neither a saved dataset nor files ending in {', '.join(_READER_OF_SUFFIX)}"
            )
        only_csv = {_split_suffixes(file)[0] for file in files} == {".csv"}
        # resolved, because a bare folder name such as "json" would mean one of the library's own readers
        return _load(
            str(path),
            files,
            str(path.resolve()),
            name=config_name,
            split=split,
            **(_csv_options(files) if only_csv else {}),
        )
    try:
        saved = load_from_disk(str(path))
    except IndexError as error:  # what the library makes of a saved dataset without a single row
        raise FlexdpoError(f"{path}: there are no rows; give a dataset with at least one") from error
    except (OSError, ValueError, KeyError) as error:
        raise FlexdpoError(f"{path}: the saved dataset cannot be read ({_first_line(error)})") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise FlexdpoError(f"{path}: no split {split!r}; found {_quoted(saved)}")
        return saved[split]
    known = dict.fromkeys(["train", *([str(saved.split)] if saved.split else [])])
    if split not in known:
        raise FlexdpoError(f"{path}: no split {split!r}; the folder holds a single one, {_quoted(known)}")
    return saved


def _load_from_hub(name: str, split: str, config_name: str | None) -> Dataset:
    from datasets import config

    unreachable = _why_hub_is_unreachable(name)
    with contextlib.ExitStack() as stack:
        if unreachable:
            # only the local cache can help now; the library would retry the network for half a minute first
            stack.callback(setattr, config, "HF_HUB_OFFLINE", config.HF_HUB_OFFLINE)
            config.HF_HUB_OFFLINE = True
        return _load(name, [], name, note=unreachable, name=config_name, split=split)


def _why_hub_is_unreachable(name: str) -> str:
    """Ask the hub for one dataset with a short patience; return why no answer came, or ``""`` after any answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return ""  # an answer, or a name no hub can have: the loader says the same in better words
    except Exception as error:  # each HTTP client that the hub library may use has errors of its own
        return f"the hub cannot be reached: {type(error).__name__}: {_first_line(error)}"
    return ""


def _load(shown: str, files: Sequence[Path], source: str, *, note: str = "", **options: Any) -> Dataset:
    """Call ``datasets.load_dataset`` and turn what it raises about the data into one clear error.

    Args:
        shown: How errors call the source.
        files: The local files it reads; empty for the hub.
        source: What the library calls its path: a reader, a folder or a hub name.
        note: What is already known to be wrong, in place of the library's own words.
        options: Passed on.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with _silent_json_reader(), warnings.catch_warnings():
            # a CSV file whose rows have more cells than its header would be read with its columns shifted
            warnings.filterwarnings("error", message="Length of header or names")
            dataset = cast("Dataset", load_dataset(source, **options))
            if any(_READER_OF_SUFFIX[_split_suffixes(file)[0]] == "json" for file in files):
                # the JSON reader lets bytes through that are not UTF-8, and only a look at the cell trips over them
                dataset.data.validate(full=True)
    except (DatasetsError, ValueError, OSError, RuntimeError, StopIteration) as error:
        raise FlexdpoError(_why_not_loaded(shown, files, error, note)) from error
    return dataset


def _why_not_loaded(shown: str, files: Sequence[Path], error: Exception, note: str) -> str:
    from datasets.exceptions import DatasetsError

    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    fault = next(filter(None, map(_first_json_fault, files)), None)
    if fault:
        return fault
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f"{shown}: there are no rows; give a dataset with at least one"
    reason = note or f"{type(cause).__name__}: {_first_line(cause)}"
    if files:
        return f"{shown}: cannot be loaded ({reason})"
    return f"{shown!r} is no file or folder here, and the Hugging Face hub does not give it ({reason})"


@contextlib.contextmanager
def _silent_json_reader() -> Iterator[None]:
    """Keep the reader from logging a fault that the caller reports with its line number."""
    logger = logging.getLogger("datasets.packaged_modules.json.json")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _csv_options(files: Sequence[Path]) -> dict[str, Any]:
    """Read every cell as text: a response ``42`` is no number and a response ``None`` is not missing."""
    from datasets import Features, Value

    kind, packed = _split_suffixes(files[0])
    separator = "\t" if kind == ".tsv" else ","
    try:
        with _OPENER_OF_SUFFIX[packed](files[0], "rt", encoding="utf-8-sig", newline="") as stream:
            header = next((cells for cells in csv.reader(stream, delimiter=separator) if cells), [])
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, csv.Error) as error:
        raise FlexdpoError(f"{files[0]}: cannot be read as CSV ({_first_line(error)})") from error
    if len(set(header)) < len(header):
        raise FlexdpoError(f"{files[0]}: the header names a column twice: {_quoted(header)}")
    # the reader's own name for a column without one, as an index column often is
    names = [name or f"Unnamed: {number}" for number, name in enumerate(header)]
    features = Features({name: Value("string") for name in names})
    return {"sep": separator, "keep_default_na": False, "index_col": False, "features": features}


def _first_json_fault(path: Path) -> str | None:
    """Find the first line of a JSON or JSONL file that is no JSON object, as ``"file, line N: why"``."""
    kind, packed = _split_suffixes(path)
    if _READER_OF_SUFFIX.get(kind) != "json":
        return None
    try:
        with _OPENER_OF_SUFFIX[packed](path, "rb") as stream:
            if kind == ".json" and not _is_json_lines(stream):
                return _document_fault(path, stream.read())
            for number, line in enumerate(stream, start=1):
                why = _line_fault(line)
                if why:
                    return f"{path}, line {number}: {why}"
    except (OSError, EOFError, lzma.LZMAError) as error:
        return f"{path}: cannot be read ({_first_line(error)})"
    return None


def _is_json_lines(stream: IO[bytes]) -> bool:
    """Whether a ``.json`` file holds an object per line; rewinds the stream."""
    first = stream.readline().strip()
    stream.seek(0)
    return first.startswith(b"{") and first.endswith(b"}")


def _document_fault(path: Path, content: bytes) -> str | None:
    try:
        json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"{path}, line {content.count(chr(10).encode(), 0, error.start) + 1}: not UTF-8 text"
    except json.JSONDecodeError as error:
        return f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})"
    return None


def _line_fault(line: bytes) -> str | None:
    try:
        text = line.decode("utf-8-sig").strip()
        value = json.loads(text) if text else {}
    except UnicodeDecodeError:
        return "not UTF-8 text; convert the file to UTF-8"
    except json.JSONDecodeError as error:
        return f"not valid JSON ({error.msg}, column {error.colno})"
    return None if isinstance(value, dict) else f"expected a JSON object, found {_found(value)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _quoted(names: Iterable[object]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "nothing"


def _found(value: object) -> str:
    """Show a value's type and its beginning, for errors."""
    shown = repr(value)
    return f"{type(value).__name__} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


# --- what came of a dataset ------------------------------------------------------------------------------------------

_EMPTY_PROMPT = "empty prompt"
_EMPTY_RESPONSE = "empty response"
_IDENTICAL = "identical responses"
_PROMPT_FILLS = "prompt alone fills max_length"
_IDENTICAL_CUT = "identical responses once cut to max_length"
SKIP_REASONS = (_EMPTY_PROMPT, _EMPTY_RESPONSE, _IDENTICAL, _PROMPT_FILLS, _IDENTICAL_CUT)


@dataclass(frozen=True)
class DataReport:
    """What became of every row of a dataset; ``used + sum(skipped.values()) == rows``.

    Attributes:
        name: Which dataset, for instance ``"train"``.
        rows: Rows of the source dataset.
        used: Rows that can be trained on.
        skipped: Number of rows left out, by reason (see ``SKIP_REASONS``); reasons that never occurred are absent.
        first_skipped: The first row left out for each of those reasons, counted from 0.
        truncated: Used rows of which at least one response was cut to fit ``max_length``.
        longest: Tokens of the longest used prompt with one response behind it.
        notes: What else happened to the rows, one sentence each.
    """

    name: str
    rows: int
    used: int
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    longest: int = 0
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return one line for people, and one more for each note."""
        parts = [f"{self.used} of {self.rows} rows used"]
        if self.truncated:
            parts.append(f"{self.truncated} of them cut to max_length")
        parts += [
            f"skipped {count} ({reason}, first at row {self.first_skipped[reason]})"
            for reason, count in self.skipped.items()
        ]
        return "\n".join([f"{self.name}: {'; '.join(parts)}", *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class TokenizedPreferences:
    """A tokenised dataset and the account of its rows.

    Attributes:
        dataset: Columns ``prompt_ids: list[int]``, ``response_ids: list[list[int]]``, ``edges: list[list[int]]`` (pairs
            ``[chosen, rejected]`` of indices into ``response_ids``) and ``row: int`` (row of the source, from 0).
        report: How many rows were used, cut and skipped, and why.
    """

    dataset: Dataset
    report: DataReport


def group_from_row(row: Mapping[str, Any]) -> Group:
    """Build the group of one row of a tokenised dataset (see :class:`TokenizedPreferences`)."""
    return Group.from_lists(
        row["prompt_ids"],
        row["response_ids"],
        [(chosen, rejected) for chosen, rejected in row["edges"]],
        name=f"row {row['row']}",
    )


def require_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token its EOS token as one.

    The choice is free: padding is never attended to and never scored.

    Raises:
        FlexdpoError: if the tokenizer has neither.
    """
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise FlexdpoError(
            f"the tokenizer {_name_of(tokenizer)} has neither a pad nor an EOS token; set tokenizer.eos_token to the "
            "token that ends a text in this vocabulary"
        )
    tokenizer.pad_token = tokenizer.eos_token


def _name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


# --- tokenising ------------------------------------------------------------------------------------------------------

# raise it when the same row gives other tokens than before: `datasets` caches by settings, not by this file's code
_REVISION = 1


@dataclass(frozen=True)
class _Settings:
    """All that decides, beside the tokenizer, what a row becomes; part of the cache's key."""

    form: str
    max_length: int | None
    largest_id: int | None = None
    revision: int = _REVISION


@dataclass
class _Draft:
    """One row on its way from text to token ids."""

    row: int
    prompt: Any = None
    responses: list[Any] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    is_chat: bool = False
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[list[int]] = field(default_factory=list)
    edges: list[list[int]] = field(default_factory=list)
    skip: str = ""
    truncated: bool = False
    extracted: bool = False
    retokenised: bool = False
    ties: int = 0
    longest: int = 0

    @property
    def place(self) -> str:
        return f"row {self.row} (counted from 0)"


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    name: str = "train",
) -> TokenizedPreferences:
    """Turn a preference dataset into token ids, as TRL's ``DPOTrainer`` does, and account for every row.

    Columns taken, the first that fits: ``prompt_ids, response_ids, edges`` (this function's own output, whose other
    columns are kept); ``prompt_ids, chosen_ids, rejected_ids``; ``prompt, chosen, rejected``; ``chosen, rejected``
    (the prompt is their common beginning); ``prompt, completion`` (no preferences). The last three hold text or lists
    of messages; with messages, ``tools`` and ``chat_template_kwargs`` are honoured. Text responses end with the EOS
    token. A response is what follows the tokens that the prompt alone and prompt + response have in common.

    Args:
        dataset: The rows, a ``datasets.Dataset``.
        tokenizer: Tokenizes them; with BOS or whatever else it adds by default.
        max_length: Most tokens of prompt + response, the response is cut on the right; ``None`` for no limit.
        truncation_mode: ``"keep_start"``, the only one.
        num_proc: Processes that tokenise, ``None`` for this one alone.
        name: How errors, the progress bar and the report call this dataset.

    Returns:
        The usable rows in their order, and a report that counts the others by reason.

    Raises:
        FlexdpoError: for a setting or a column that cannot be used, a value of the wrong type (with its row), or when
            no row is left.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise FlexdpoError(f"{name}: expected a datasets.Dataset, found {type(dataset).__name__}; pick one split")
    _require_settings(max_length, truncation_mode, num_proc)
    if len(dataset) == 0:
        raise FlexdpoError(f"{name}: the dataset has no rows; give a dataset with at least one")
    form = _form_of(dataset.column_names, name)
    is_ids = form in _ID_FORMS
    settings = _Settings(form, max_length, max(tokenizer.get_vocab().values()) if is_ids else None)
    try:
        mapped = _map(dataset.with_format(None), tokenizer, settings, num_proc, name)
    except FlexdpoError as error:
        # rows are tokenised without the name, so that it does not change what the cache finds
        raise FlexdpoError(f"{name}: {error}") from error
    return _account(mapped, name)


def _require_settings(max_length: int | None, truncation_mode: str, num_proc: int | None) -> None:
    if truncation_mode == "keep_end":
        raise FlexdpoError(
            "truncation_mode='keep_end' cuts every response's copy of the prompt at another place, so that nothing "
            "can be shared, and TRL has deprecated it; use 'keep_start'"
        )
    if truncation_mode != "keep_start":
        raise FlexdpoError(
            f"unknown truncation_mode {truncation_mode!r}{nearest(truncation_mode, ['keep_start'])}; "
            "the only one is 'keep_start'"
        )
    if max_length is not None and max_length < 2:
        raise FlexdpoError(f"max_length={max_length} has no room for a prompt and a response; use at least 2")
    if num_proc is not None and num_proc < 1:
        raise FlexdpoError(f"num_proc={num_proc}: use at least 1, or None for this process alone")


def _form_of(columns: Sequence[str], name: str) -> str:
    """Name the first of ``_READERS`` whose columns are all there."""
    images = [column for column in ("images", "image") if column in columns]
    if images:
        raise FlexdpoError(f"{name}: column {images[0]!r}: images are not supported; drop the column to train on text")
    for form in _READERS:
        if set(form.split()) <= set(columns):
            return form
    wanted = sorted({column for form in _READERS for column in form.split()})
    strange = [column for column in columns if column not in wanted]
    hints = [f"; {column!r}:{hint[1:]}" for column in strange if (hint := nearest(column, wanted))]
    raise FlexdpoError(
        f"{name}: no preference columns; found {_quoted(columns)}; wanted 'prompt' (or none, if the others begin with "
        f"it), 'chosen', 'rejected'; or 'prompt', 'completion'; or {_quoted(_TRL_ID_FORM.split())}; or "
        f"{_quoted(_OWN_FORM.split())}{''.join(hints)}"
    )


def _map(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: _Settings,
    num_proc: int | None,
    name: str,
) -> Dataset:
    from datasets import Features, Value

    # a dataset of ours may carry precomputed columns along; anything else has served its purpose
    kept = [c for c in dataset.column_names if c not in TOKENISED_COLUMNS] if settings.form == _OWN_FORM else []
    features = Features(
        {
            "prompt_ids": [Value("int32")],
            "response_ids": [[Value("int32")]],
            "edges": [[Value("int32")]],
            "row": Value("int64"),
            **{column: dataset.features[column] for column in kept},
            **{column: Value("int64") for column in _STATUS_COLUMNS},
        }
    )
    return dataset.map(
        _tokenize_batch,
        with_indices=True,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "settings": settings},
        remove_columns=[column for column in dataset.column_names if column not in kept],
        features=features,
        num_proc=num_proc,
        # the cache lies beside the source, which may be a shared folder that nobody may write to
        keep_in_memory=not _may_write_beside(dataset),
        desc=f"Tokenizing {name} dataset",
    )


def _may_write_beside(dataset: Dataset) -> bool:
    files = dataset.cache_files
    return not files or os.access(os.path.dirname(files[0]["filename"]), os.W_OK)


_STATUS_COLUMNS = ("_skip", "_truncated", "_extracted", "_retokenised", "_ties", "_longest")


def _tokenize_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: _Settings,
) -> dict[str, list[Any]]:
    """Tokenise a batch of rows; a row that cannot be used comes out empty, with the reason's number."""
    drafts = []
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        drafts.append(_READERS[settings.form](index, dict(zip(batch, values, strict=True)), settings))
    if settings.form not in _ID_FORMS:
        _tokenize_text([draft for draft in drafts if not draft.skip and not draft.is_chat], tokenizer)
        _tokenize_chats([draft for draft in drafts if not draft.skip and draft.is_chat], tokenizer)
    for draft in drafts:
        _settle(draft, settings.max_length)
    usable = [not draft.skip for draft in drafts]
    return {
        "prompt_ids": [draft.prompt_ids if used else [] for draft, used in zip(drafts, usable, strict=True)],
        "response_ids": [draft.response_ids if used else [] for draft, used in zip(drafts, usable, strict=True)],
        "edges": [draft.edges if used else [] for draft, used in zip(drafts, usable, strict=True)],
        "row": [draft.row for draft in drafts],
        "_skip": [SKIP_REASONS.index(draft.skip) + 1 if draft.skip else 0 for draft in drafts],
        "_truncated": [int(draft.truncated) for draft in drafts],
        "_extracted": [int(draft.extracted) for draft in drafts],
        "_retokenised": [int(draft.retokenised) for draft in drafts],
        "_ties": [draft.ties for draft in drafts],
        "_longest": [draft.longest for draft in drafts],
    }


def _settle(draft: _Draft, max_length: int | None) -> None:
    """Cut the responses to ``max_length`` and say why a row cannot be used, if so."""
    if draft.skip:
        return
    compared = bool(draft.edges)
    if not draft.prompt_ids:
        draft.skip = _EMPTY_PROMPT
    elif not draft.response_ids or not all(draft.response_ids):
        draft.skip = _EMPTY_RESPONSE
    elif _drop_ties(draft) and compared and not draft.edges:
        draft.skip = _IDENTICAL
    elif max_length is not None and len(draft.prompt_ids) >= max_length:
        draft.skip = _PROMPT_FILLS
    elif max_length is not None:
        room = max_length - len(draft.prompt_ids)
        draft.truncated = any(len(ids) > room for ids in draft.response_ids)
        draft.response_ids = [ids[:room] for ids in draft.response_ids]
        if _drop_ties(draft) and compared and not draft.edges:
            draft.skip = _IDENTICAL_CUT
    draft.longest = len(draft.prompt_ids) + max(map(len, draft.response_ids), default=0)


def _drop_ties(draft: _Draft) -> int:
    """Take out preferences between equal responses, which have no gradient; return how many went."""
    edges = [edge for edge in draft.edges if draft.response_ids[edge[0]] != draft.response_ids[edge[1]]]
    dropped = len(draft.edges) - len(edges)
    draft.edges = edges
    draft.ties += dropped
    return dropped


def _account(mapped: Dataset, name: str) -> TokenizedPreferences:
    """Count the status columns, then drop them and the rows that cannot be used."""
    status: dict[str, Any] = mapped.with_format("numpy", columns=[*_STATUS_COLUMNS, "row"])[:]
    rows, skip = status["row"], status["_skip"]
    kept = np.flatnonzero(skip == 0)
    skipped = {reason: int((skip == code).sum()) for code, reason in enumerate(SKIP_REASONS, start=1)}
    skipped = {reason: count for reason, count in skipped.items() if count}
    first = {reason: int(rows[np.argmax(skip == SKIP_REASONS.index(reason) + 1)]) for reason in skipped}
    if not kept.size:
        counts = "; ".join(
            f"{count} skipped ({reason}, first at row {first[reason]})" for reason, count in skipped.items()
        )
        raise FlexdpoError(f"{name}: none of the {len(rows)} rows can be used: {counts}")
    truncated, longest = int(status["_truncated"][kept].sum()), int(status["_longest"][kept].max())
    dataset = mapped.remove_columns(list(_STATUS_COLUMNS))
    notes = _notes({column: values[kept] for column, values in status.items()})
    stale = [column for column in dataset.column_names if column not in TOKENISED_COLUMNS]
    if truncated and stale:
        dataset = dataset.remove_columns(stale)
        notes.append(f"dropped {_quoted(stale)}, which belonged to the responses before they were cut")
    if skipped:
        dataset = dataset.select(kept)
    report = DataReport(name, len(rows), len(kept), skipped, first, truncated, longest, tuple(notes))
    return TokenizedPreferences(dataset, report)


def _notes(status: dict[str, Any]) -> list[str]:
    """Say what happened to used rows, with how often and where first."""
    sentences = {
        "_extracted": "prompt taken from the common beginning of chosen and rejected",
        "_retokenised": "prompt end re-tokenised, because it renders or merges otherwise before a response,",
        "_ties": "preferences between identical responses left out",
    }
    notes = []
    for column, sentence in sentences.items():
        hits = np.flatnonzero(status[column])
        if hits.size:
            notes.append(f"{sentence} in {hits.size} rows, first at row {status['row'][hits[0]]}")
    return notes


# --- reading one row -------------------------------------------------------------------------------------------------


def _read_pair(row: int, values: Mapping[str, Any], settings: _Settings) -> _Draft:  # noqa: ARG001
    return _read_texts(row, values, ("chosen", "rejected"), [[0, 1]])


def _read_completion(row: int, values: Mapping[str, Any], settings: _Settings) -> _Draft:  # noqa: ARG001
    return _read_texts(row, values, ("completion",), [])


def _read_texts(row: int, values: Mapping[str, Any], columns: tuple[str, ...], edges: list[list[int]]) -> _Draft:
    """Check the types of a row of text or messages, and find its prompt."""
    draft = _Draft(row, values.get("prompt"), [values[column] for column in columns], edges=edges)
    prompt_is_chat = "prompt" in values and _is_chat(draft.prompt, draft.place, "prompt")
    chats = [_is_chat(value, draft.place, column) for value, column in zip(draft.responses, columns, strict=True)]
    if any(_says_nothing(value) for value in draft.responses):
        draft.skip = _EMPTY_RESPONSE
        return draft
    if draft.prompt == []:
        draft.skip = _EMPTY_PROMPT
        return draft
    draft.is_chat = chats[0]
    if len(set(chats)) > 1 or (prompt_is_chat and not draft.is_chat):
        raise FlexdpoError(
            f"{draft.place}: {_quoted(c for c in values if c in ('prompt', *columns))} mix text and lists of messages; "
            "use one of the two in a row"
        )
    # a text prompt beside whole conversations repeats what they begin with, so they are what counts
    implicit = "prompt" not in values or (draft.is_chat and not prompt_is_chat and draft.prompt is not None)
    if implicit and len(columns) < 2:
        raise FlexdpoError(
            f"{draft.place}: 'prompt' is text but 'completion' is a list of messages; use one of the two"
        )
    if implicit:
        draft.extracted = True
        draft.prompt, *draft.responses = _split_common_beginning(*draft.responses)
    if draft.prompt is None or draft.prompt == []:
        draft.skip = _EMPTY_PROMPT
    elif draft.is_chat:
        draft.template_kwargs = _template_kwargs(values, draft.place)
    return draft


def _is_chat(value: object, place: str, column: str) -> bool:
    """Whether a value is a list of messages; raises unless it is that, text, or missing."""
    if value is None or isinstance(value, str):
        return False
    if not isinstance(value, list):
        raise FlexdpoError(f"{place}, column {column!r}: expected text or a list of messages, found {_found(value)}")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            why = f"found {_found(message)}"
        elif not isinstance(message.get("role"), str):
            why = f"its 'role' is {_found(message.get('role'))}"
        elif not isinstance(message.get("content"), (str, list, type(None))):
            why = f"its 'content' is {_found(message['content'])}"
        else:
            continue
        raise FlexdpoError(
            f"{place}, column {column!r}, message {number}: expected {{'role': 'user', 'content': 'text'}}, {why}"
        )
    return True


def _says_nothing(response: Any) -> bool:
    """Whether a response is missing, or text or messages without any content: the end token alone is no answer."""
    if isinstance(response, list):
        return not any(value for message in response for key, value in message.items() if key != "role")
    return not response


def _split_common_beginning(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two texts or conversations into what both begin with, and each one's rest, as TRL does.

    The rest is never empty: where one is the beginning of the other, the prompt ends one character (message) earlier.
    A space before the difference belongs to the rest.
    """
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if same == min(len(chosen), len(rejected)) or (same and chosen[same - 1] == " "):
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


def _template_kwargs(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise FlexdpoError(f"{place}, column 'tools': not valid JSON ({error})") from error
    more = values.get("chat_template_kwargs") or {}
    for column, value, kind in (("tools", tools, list), ("chat_template_kwargs", more, dict)):
        if value is not None and not isinstance(value, kind):
            raise FlexdpoError(f"{place}, column {column!r}: expected a {kind.__name__}, found {_found(value)}")
    return {"tools": tools, **more}


def _read_pair_ids(row: int, values: Mapping[str, Any], settings: _Settings) -> _Draft:
    draft = _Draft(row, edges=[[0, 1]])
    ids = [_token_ids(values[c], draft.place, c, settings.largest_id) for c in _TRL_ID_FORM.split()]
    draft.prompt_ids, draft.response_ids = ids[0], ids[1:]
    return draft


def _read_own(row: int, values: Mapping[str, Any], settings: _Settings) -> _Draft:
    # a dataset that went through here before keeps the row numbers of its source
    draft = _Draft(values["row"] if isinstance(values.get("row"), int) else row)
    draft.prompt_ids = _token_ids(values["prompt_ids"], draft.place, "prompt_ids", settings.largest_id)
    responses, edges = values["response_ids"] or [], values["edges"] or []
    for column, value in (("response_ids", responses), ("edges", edges)):
        if not isinstance(value, list):
            raise FlexdpoError(f"{draft.place}, column {column!r}: expected a list of lists, found {_found(value)}")
    draft.response_ids = [_token_ids(ids, draft.place, "response_ids", settings.largest_id) for ids in responses]
    if not responses:
        draft.skip = _EMPTY_RESPONSE
        return draft
    for edge in edges:
        known = isinstance(edge, list) and len(edge) == 2 and all(end in range(len(responses)) for end in edge)
        if not known or edge[0] == edge[1]:
            raise FlexdpoError(
                f"{draft.place}, column 'edges': {edge} must name two different responses among 0 to "
                f"{len(responses) - 1}"
            )
    draft.edges = edges
    return draft


def _token_ids(value: Any, place: str, column: str, largest_id: int | None) -> list[int]:
    """Check a list of token ids; ``None`` is an empty one."""
    if value is None:
        return []
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of unequal length inside
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise FlexdpoError(f"{place}, column {column!r}: expected a list of token ids, found {_found(value)}")
    if ids.size and not 0 <= ids.min() <= ids.max() <= (largest_id or 0):
        raise FlexdpoError(
            f"{place}, column {column!r}: token ids reach from {ids.min()} to {ids.max()}, the tokenizer's from 0 to "
            f"{largest_id}; was the dataset tokenised with another tokenizer?"
        )
    return cast("list[int]", value)


_OWN_FORM = "prompt_ids response_ids edges"
_TRL_ID_FORM = "prompt_ids chosen_ids rejected_ids"
_ID_FORMS = (_OWN_FORM, _TRL_ID_FORM)
# in order of preference: a dataset that was tokenised in place still has its text beside the ids
_READERS: dict[str, Callable[[int, Mapping[str, Any], _Settings], _Draft]] = {
    _OWN_FORM: _read_own,
    _TRL_ID_FORM: _read_pair_ids,
    "chosen rejected": _read_pair,
    "prompt completion": _read_completion,
}


# --- text and messages to token ids ----------------------------------------------------------------------------------


def _tokenize_text(drafts: Sequence[_Draft], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise rows of text: the prompt, and the prompt with each response and the EOS token behind it."""
    if not drafts:
        return
    eos = tokenizer.eos_token
    if eos is None:
        raise FlexdpoError(
            f"the tokenizer {_name_of(tokenizer)} has no EOS token, so nothing would mark the end of a response; set "
            "tokenizer.eos_token"
        )
    texts = []
    for draft in drafts:
        texts.append(draft.prompt)
        for response in draft.responses:
            texts.append(draft.prompt + (response if response.endswith(eos) else response + eos))
    _hand_out(iter(tokenizer(text=texts)["input_ids"]), drafts)


def _tokenize_chats(drafts: Sequence[_Draft], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise rows of messages with the chat template; rows that call it alike go together."""
    alike: dict[str, list[_Draft]] = {}
    for draft in drafts:
        alike.setdefault(json.dumps(draft.template_kwargs, sort_keys=True, default=repr), []).append(draft)
    if drafts:
        _require_chat_template(tokenizer)
    for members in alike.values():
        kwargs = members[0].template_kwargs
        prompts = _render(
            tokenizer,
            [(draft.place, draft.prompt) for draft in members],
            {"add_generation_prompt": True, **kwargs},
        )
        whole = _render(
            tokenizer,
            [(draft.place, draft.prompt + response) for draft in members for response in draft.responses],
            kwargs,
        )
        merged = iter(whole)
        for prompt, draft in zip(prompts, members, strict=True):
            _hand_out(iter([prompt, *(next(merged) for _ in draft.responses)]), [draft])


def _require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedTokenizerBase

    # a tokenizer with a renderer of its own, such as Mistral's, needs no template
    is_stock = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    if is_stock and not tokenizer.chat_template:
        raise FlexdpoError(
            f"the data holds messages but the tokenizer {_name_of(tokenizer)} has no chat template; set "
            "tokenizer.chat_template, use the tokenizer of an instruction-tuned model, or give the columns as text"
        )


def _render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[tuple[str, list[Any]]], kwargs: Mapping[str, Any]
) -> list[list[int]]:
    """Apply the chat template to ``(place, messages)`` in one go; look for the culprit only after a failure."""

    def token_ids(messages: list[Any]) -> Any:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]

    try:
        return cast("list[list[int]]", token_ids([messages for _, messages in conversations]))
    except Exception:  # a template is a program of the model's maker and may raise anything
        for place, messages in conversations:
            try:
                token_ids(messages)
            except Exception as error:
                raise FlexdpoError(f"{place}: the chat template cannot render its messages: {error}") from error
        raise


def _hand_out(token_ids: Iterator[list[int]], drafts: Sequence[_Draft]) -> None:
    """Give each draft its tokens, which come as the prompt's and then those of the prompt with each response.

    The response starts where the prompt alone and the prompt with a response part: a template may render the
    prompt's end otherwise before a response, and tokens may merge across the border.
    """
    for draft in drafts:
        prompt = next(token_ids)
        wholes = [next(token_ids) for _ in draft.responses]
        border = min(_common_length(prompt, whole) for whole in wholes)
        draft.retokenised = border < len(prompt)
        draft.prompt_ids = prompt[:border]
        draft.response_ids = [whole[border:] for whole in wholes]


def _common_length(ids: list[int], others: list[int]) -> int:
    if others[: len(ids)] == ids:
        return len(ids)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))
