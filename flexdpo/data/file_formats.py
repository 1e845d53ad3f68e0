"""What a data file is by its name, and how it is opened."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from flexdpo.errors import FlexdpoError

READER_OF_SUFFIX = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv",
    ".tsv": "csv",
}  # fmt: skip


def _open_zstd(path: Path, *args: Any, **kwargs: Any) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise FlexdpoError(
            f"{path}: reading .zst files needs the zstandard package; pip install zstandard, or unpack the file first"
        ) from error
    return zstandard.open(path, *args, **kwargs)


# what readers of packed files raise
BROKEN = (EOFError, zlib.error, lzma.LZMAError)
OPENER_OF_SUFFIX: dict[str, Callable[..., Any]] = {
    "": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd,
}  # fmt: skip


def format_of(path: Path) -> tuple[str, str, str | None]:
    """The suffixes of the format and the compression, ``""`` for none, and the reader, if there is one."""
    packed = path.suffix.lower() if path.suffix.lower() in OPENER_OF_SUFFIX else ""
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    # Parquet is compressed inside and has no outer suffix
    return kind, packed, None if packed and kind == ".parquet" else READER_OF_SUFFIX.get(kind)


def is_json_lines(stream: IO[bytes]) -> bool:
    """Whether a ``.json`` file holds an object per line; rewinds the stream."""
    first = stream.readline().strip()
    stream.seek(0)
    return first.startswith(b"{") and first.endswith(b"}")
