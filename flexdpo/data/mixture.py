"""Several datasets as one: each is read as its own columns say, whole, by count or by share, in a fixed order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexdpo.errors import FlexdpoError, found, nearest, quoted
from flexdpo.layout.sequences import is_finite

_KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction", "count")


@dataclass(frozen=True)
class Part:
    """One dataset or stream of a mixture; ``fraction`` is a stream's share."""

    name: str
    data: Any
    fraction: float | None = None


@dataclass(frozen=True)
class Mixture:
    """Datasets, or streams, that are trained on or evaluated as one; takes the place of a dataset everywhere.

    Datasets follow one another and are shuffled as one; streams follow one another too, or alternate by their shares.
    """

    parts: tuple[Part, ...]

    @property
    def streams(self) -> bool:
        """Whether these are streams."""
        from datasets import IterableDataset

        return any(isinstance(part.data, IterableDataset) for part in self.parts)


def load_mixture(
    datasets: Sequence[str | Mapping[str, Any]],
    *,
    streaming: bool = False,
    test_split_size: float | None = None,
    seed: int = 0,
) -> tuple[Mixture, Mixture | None]:
    """Load datasets to train on as one, under the names of TRL's ``datasets:``.

    Args:
        datasets: For each, a path or hub name, or a mapping with ``path`` and, as wanted, ``name`` (configuration),
            ``data_dir``, ``data_files`` (one, inside of ``path``), ``split``, ``columns`` (a list to keep, or
            ``{"prompt": "question"}``), and ``count`` (take only the first so many rows) or ``fraction`` (its share of
            the mixture, measured by the sum of all, for all of them or none: as many first rows of each as none runs
            out of; streams alternate by it until one ends).
        streaming: Read the rows as they are needed.
        test_split_size: Share of the rows to hold out, taken at random from all.
        seed: Of the rows that are held out.

    Returns:
        What to train on, and what was held out, if so.

    Raises:
        FlexdpoError: naming the entry, for settings that are unknown or do not fit together.
    """
    if isinstance(datasets, str | bytes | Mapping) or not isinstance(datasets, Sequence):
        raise FlexdpoError(f"datasets must be a list of paths or of mappings with a path, got {found(datasets)}")
    if not datasets:
        raise FlexdpoError("datasets: the list is empty; give at least one with a path")
    entries = [_entry(given, number) for number, given in enumerate(datasets)]
    parts = [_load(entry, streaming) for entry in entries]
    shares = [entry.get("fraction") for entry in entries]
    if any(share is not None for share in shares):
        parts = _by_share(parts, [_share(share, number) for number, share in enumerate(shares)], streaming)
    mixture = Mixture(tuple(parts))
    if test_split_size is None:
        return mixture, None
    if streaming:
        raise FlexdpoError("test_split_size needs the number of rows, which a stream does not tell; give other data")
    if not is_finite(test_split_size) or not 0 < test_split_size < 1:
        raise FlexdpoError(f"test_split_size={test_split_size!r}: use a share of the rows between 0 and 1")
    return _held_out(mixture, test_split_size, seed)


def _entry(given: Any, number: int) -> dict[str, Any]:
    entry = {"path": given} if isinstance(given, str) else given
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise FlexdpoError(f"datasets, entry {number}: expected a path, or a mapping with one, found {found(given)}")
    for key in entry:
        if key not in _KEYS:
            raise FlexdpoError(
                f"datasets, entry {number}: unknown {key!r}{nearest(str(key), _KEYS)}; known are {quoted(_KEYS)}"
            )
    count = entry.get("count")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise FlexdpoError(f"datasets, entry {number}: count={count!r} must be a number of rows, at least 1")
    if count is not None and entry.get("fraction") is not None:
        raise FlexdpoError(f"datasets, entry {number}: give 'count' or 'fraction', not both")
    return dict(entry)


def _share(share: Any, number: int) -> float:
    if share is None:
        raise FlexdpoError(f"datasets, entry {number}: 'fraction' is missing; give it for all datasets or for none")
    if not is_finite(share) or share <= 0:
        raise FlexdpoError(f"datasets, entry {number}: fraction={share!r} must be a number above 0")
    return float(share)


def _load(entry: dict[str, Any], streaming: bool) -> Part:
    from flexdpo.data.load import load_preference_dataset

    path, columns = entry["path"], entry.get("columns")
    inside = [entry[key] for key in ("data_dir", "data_files") if entry.get(key) is not None]
    if any(not isinstance(part, str) for part in inside):
        raise FlexdpoError(f"{path}: data_files={inside[-1]!r}: give one file, and further ones entries of their own")
    # with a file to read, the name of a format says nothing that its ending does not
    where = str(Path("." if path in ("json", "csv", "parquet", "arrow") else path, *inside)) if inside else path
    data: Any = load_preference_dataset(
        where,
        split=entry.get("split") or "train",
        config_name=entry.get("name"),
        streaming=streaming,
        columns=dict(columns) if isinstance(columns, Mapping) else None,
    )
    if columns is not None and not isinstance(columns, Mapping):
        missing = [column for column in columns if column not in (data.column_names or columns)]
        if missing:
            raise FlexdpoError(f"{where}: no column {missing[0]!r}; found {quoted(data.column_names)}")
        data = data.select_columns(list(columns))
    count = entry.get("count")
    if count is not None and not streaming and count > len(data):
        raise FlexdpoError(f"{where}: count={count}, but there are {len(data)} rows")
    if count is None:
        return Part(where, data)
    return Part(where, data.take(count)) if streaming else _first_rows(Part(where, data), count)


def _by_share(parts: Sequence[Part], shares: Sequence[float], streaming: bool) -> list[Part]:
    shares = [share / sum(shares) for share in shares]
    if streaming:
        return [Part(part.name, part.data, share) for part, share in zip(parts, shares, strict=True)]
    total = min(len(part.data) / share for part, share in zip(parts, shares, strict=True))
    kept = [min(len(part.data), round(share * total)) for part, share in zip(parts, shares, strict=True)]
    return [_first_rows(part, rows) for part, rows in zip(parts, kept, strict=True)]


def _first_rows(part: Part, rows: int) -> Part:
    """The part whose name, which the report gives, says what is left out."""
    there = len(part.data)
    return part if rows == there else Part(f"{part.name} ({rows} of its {there} rows)", part.data.select(range(rows)))


def _held_out(mixture: Mixture, share: float, seed: int) -> tuple[Mixture, Mixture]:
    sizes = [len(part.data) for part in mixture.parts]
    total = sum(sizes)
    chosen = np.random.default_rng(seed).permutation(total) < round(share * total)
    if chosen.all() or not chosen.any():
        raise FlexdpoError(f"test_split_size={share} of {total} rows leaves one of the two without any")
    split: list[list[Part]] = [[], []]
    for part, held in zip(mixture.parts, np.split(chosen, np.cumsum(sizes)[:-1]), strict=True):
        for which, rows in enumerate((np.flatnonzero(~held), np.flatnonzero(held))):
            if len(rows):
                split[which].append(Part(part.name, part.data.select(rows)))
    return Mixture(tuple(split[0])), Mixture(tuple(split[1]))


def alternating(parts: Sequence[Iterator[Any]], shares: Sequence[float]) -> Iterator[Any]:
    """Take from each in turn, as often as its share says, until one ends; none falls a whole row behind."""
    credit = np.zeros(len(parts))
    while True:
        credit += shares
        which = int(credit.argmax())
        credit[which] -= 1
        try:
            yield next(parts[which])
        except StopIteration:
            return
