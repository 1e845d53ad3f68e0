"""A parquet file of scores: the log-probability of every response of a dataset, row by row, and what follows from it.

Its metadata say whose values they are, as ``identity.json`` of a cache does, so that a run takes them for its reference
only if they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from flexdpo.errors import FlexdpoError, first_line
from flexdpo.reference.cache import Key, ReferenceCache, ReferenceIdentity, unfinished

if TYPE_CHECKING:
    from collections.abc import Sequence

_METADATA = b"flexdpo"
_NUMBERS = pa.list_(pa.float64())
# of the model that was scored, and of the one it is held against
_SUMS = ("logps", "ref_logps")
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the dataset as it was given
        ("keys", pa.list_(pa.string())),  # what stands for the tokens of each prompt and response, in hexadecimal
        ("logps", _NUMBERS),  # in nats, for each response
        ("ref_logps", _NUMBERS),
        ("rewards", _NUMBERS),  # beta times the difference of the two
        ("accuracy", pa.float64()),  # share of the preferences that the rewards agree with
    ]
)


def write_scores(
    path: Path, rows: Sequence[dict[str, Any]], identity: ReferenceIdentity, reference: ReferenceIdentity | None
) -> None:
    """Write the columns of ``_SCHEMA``, whole or not at all; ``keys`` are those of the cache."""
    owners = {"logps": identity.as_dict(), "ref_logps": None if reference is None else reference.as_dict()}
    schema = _SCHEMA.with_metadata({_METADATA: json.dumps(owners, sort_keys=True).encode()})
    named = [{**row, "keys": [_as_text(key) for key in row["keys"]]} for row in rows]
    with unfinished(path) as whole:
        pq.write_table(pa.Table.from_pylist(named, schema=schema), whole)


def is_scores(path: Path) -> bool:
    """Whether a file is one that :func:`write_scores` wrote."""
    try:
        return _METADATA in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def cache_of_scores(path: Path, identity: ReferenceIdentity) -> ReferenceCache:
    """The values of a file that belong to ``identity``, as a cache that nothing is added to.

    Raises ``FlexdpoError`` if it is no such file, or holds other models' values only.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise FlexdpoError(f"{path} cannot be read: {first_line(error)}; write it with flexdpo score") from error
    if not table.schema.equals(_SCHEMA) or _METADATA not in (table.schema.metadata or {}):
        raise FlexdpoError(f"{path} holds no scores; write it with flexdpo score")
    owners = json.loads(table.schema.metadata[_METADATA])
    column = next((name for name in _SUMS if owners[name] == identity.as_dict()), None)
    if column is None:
        others = [
            f"{name} of another {part}" for name in _SUMS if owners[name] for part in _different(owners[name], identity)
        ]
        raise FlexdpoError(
            f"{path} has no values of this run's reference, but {', '.join(others)}; score the reference with the "
            "settings of this run, or leave the file out"
        )
    keys, sums = (table.column(name).to_pylist() for name in ("keys", column))
    values = {_as_key(key): value for row in zip(keys, sums, strict=True) for key, value in zip(*row, strict=True)}
    return ReferenceCache.holding(values, path, identity)


def _different(owner: dict[str, Any], identity: ReferenceIdentity) -> list[str]:
    return [name for name, value in identity.as_dict().items() if owner.get(name) != value]


def _as_text(key: Key) -> str:
    return "".join(f"{part & (1 << 64) - 1:016x}" for part in key)


def _as_key(text: str) -> Key:
    first, second = (int(part, 16) for part in (text[:16], text[16:]))
    return _signed(first), _signed(second)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
