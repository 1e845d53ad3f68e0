"""Which data files of a folder belong to which split, by the names that the datasets library goes by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging

from flexdpo.data.file_formats import READER_OF_SUFFIX, format_of
from flexdpo.errors import FlexdpoError, first_line, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.get_logger(__name__)


def data_files(path: Path) -> list[Path]:
    """The files below a folder whose names say that they hold rows, but for those that the library passes over."""
    from datasets.data_files import FILES_TO_IGNORE

    shown = (file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)))
    files = sorted(each for each in shown if each.is_file() and format_of(each)[2] and each.name not in FILES_TO_IGNORE)
    if not files:
        raise FlexdpoError(
            f"{path}: the folder has neither a saved dataset nor files ending in {', '.join(READER_OF_SUFFIX)}; name "
            "another"
        )
    return files


def _is_hidden(inside: Path) -> bool:
    return any(part.startswith((".", "__")) for part in inside.parts)


def declares_files(path: Path) -> bool:
    """Whether a folder says itself, as folders of the hub do, which files belong to which configuration and split."""
    from huggingface_hub import metadata_load

    card = path / "README.md"
    if not card.is_file():
        return (path / ".huggingface.yaml").is_file()
    try:
        return bool((metadata_load(card) or {}).get("configs")) or (path / ".huggingface.yaml").is_file()
    except Exception as error:  # of YAML, of text, of the hub's own checks
        raise FlexdpoError(f"{card}: its header cannot be read ({first_line(error)}); mend or remove it") from error


def files_by_split(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Sort the data files of a folder into splits; without a split in any of their names all are ``"train"``.

    What would be left out because its name says no split, while others' do, is named.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = path.resolve()
    found = DataFilesDict.from_patterns(get_data_patterns(str(base)), base_path=str(base))
    # as the library names them, without following links: files of the hub's cache are links to others without an ending
    by_path = {str(base / file.relative_to(path)): file for file in files}
    claimed = {str(split): [by_path[each] for each in names if each in by_path] for split, names in found.items()}
    # the names of pictures beside the data say nothing about the data
    claimed = {split: held for split, held in claimed.items() if held} or {"train": list(by_path.values())}
    left = sorted({*by_path.values()}.difference(*claimed.values()))
    if left:
        logger.warning(
            f"{path}: {quoted(file.name for file in left)} is left out: its name says no split, where those of others "
            f"do ({quoted(claimed)}). Rename it, or name it as a dataset of its own"
        )
    return claimed
