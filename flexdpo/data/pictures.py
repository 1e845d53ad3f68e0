"""Pictures as data hold them: paths, bytes, PIL images, and dicts of ``datasets.Image``."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexdpo.data.draft import IMAGES_COLUMN
from flexdpo.errors import FlexdpoError, first_line, found

if TYPE_CHECKING:
    from PIL.Image import Image


def as_stored(picture: Any, place: str) -> dict[str, Any]:
    """A picture in the form of ``datasets.Image``: ``{"path": ..., "bytes": ...}``, one of which is ``None``.

    Taken are paths, bytes, PIL images and such dicts.

    Raises:
        FlexdpoError: naming the place, for a URL and for anything else.
    """
    if isinstance(picture, bytes | bytearray):
        return {"path": None, "bytes": bytes(picture)}
    if isinstance(picture, dict) and (picture.get("bytes") is not None or picture.get("path") is not None):
        if picture.get("bytes") is not None:
            return {"path": None, "bytes": bytes(picture["bytes"])}
        picture = picture["path"]
    if isinstance(picture, str | Path):
        path = str(picture)
        if "://" in path or path.startswith("data:"):
            raise FlexdpoError(
                f"{place}: {path[:80]} is a URL, and nothing is downloaded while data are read; save the picture as a "
                "file and give its path, or load the data with datasets.Image, which keeps its bytes"
            )
        return {"path": str(Path(path).expanduser().absolute()), "bytes": None}
    if hasattr(picture, "save") and hasattr(picture, "getexif"):
        held = io.BytesIO()
        # without loss, and as it is
        picture.save(held, format="TIFF" if picture.mode not in _PNG_MODES else "PNG", **_fast(picture.mode))
        return {"path": None, "bytes": held.getvalue()}
    raise FlexdpoError(
        f"{place}: expected a path, bytes, a PIL image or {{'path': ..., 'bytes': ...}}, found {found(picture)}"
    )


_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def _fast(mode: str) -> dict[str, int]:
    return {"compress_level": 1} if mode in _PNG_MODES else {}


def opened(stored: Mapping[str, Any], place: str) -> Image:
    """The picture itself, upright.

    Raises:
        FlexdpoError: if there is no such file, or no picture in it.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise FlexdpoError(f"{place}: images need Pillow; pip install 'flexdpo[images]'") from error
    path = stored["path"]
    what = "its bytes" if path is None else path
    try:
        # pictures that are large enough to be an attack are an error too
        picture = Image.open(io.BytesIO(stored["bytes"]) if path is None else path)
        picture.load()
        upright: Image.Image = ImageOps.exif_transpose(picture)
        # as transformers does with what it opens itself; other pictures are left to the processor
        return upright if path is None else upright.convert("RGB")
    except FileNotFoundError as error:
        raise FlexdpoError(
            f"{place}: there is no file {path}; relative paths begin at the data file's folder, or where the command "
            "was given"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders have errors of their own
        raise FlexdpoError(
            f"{place}: {what} cannot be read as a picture ({type(error).__name__}: {first_line(error)}); mend it or "
            "leave the row out"
        ) from error


def with_undecoded(batch: Any, columns: Sequence[str]) -> dict[str, list[Any]]:
    """A batch with the paths and bytes of pictures that Arrow holds and ``datasets`` would decode."""
    table = getattr(batch, "pa_table", None)
    return {
        name: batch[name] if table is None or name not in columns else table.column(name).to_pylist() for name in batch
    }


def paths_of(dataset: Any, columns: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of change of each file that columns of a dataset name: what is read is more than they say."""
    for column in columns:
        for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=4096):
            for held in batch.column(0).to_pylist():
                for picture in held if isinstance(held, list) else [held]:
                    path = picture.get("path") if isinstance(picture, dict) else picture
                    bare = not (isinstance(picture, dict) and picture.get("bytes"))
                    if bare and isinstance(path, str) and os.path.isfile(path):
                        about = os.stat(path)
                        yield path, about.st_size, about.st_mtime_ns


# columns that hold paths of pictures, where they hold text
_COLUMNS = ("images", "image")


def with_paths_from(dataset: Any, folder: Path) -> Any:
    """Rows whose relative paths of pictures begin at ``folder``; those of files that are not there stay as they are."""
    columns = [column for column in _COLUMNS if column in (dataset.column_names or ())]
    columns = [column for column in columns if _holds_text(dataset.features[column])]
    if not columns:
        return dataset
    if hasattr(dataset, "num_rows"):
        for column in columns:
            found = [_moved(held, folder) for held in dataset.with_format(None)[column]]
            dataset = dataset.remove_columns([column]).add_column(column, found)
        return dataset
    return dataset.map(
        lambda row: {column: _moved(row[column], folder) for column in columns}, features=dataset.features
    )


def _holds_text(feature: Any) -> bool:
    """Whether a column has texts or lists of them."""
    kind = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _moved(held: Any, folder: Path) -> Any:
    if isinstance(held, list):
        return [_moved(each, folder) for each in held]
    if not isinstance(held, str) or "://" in held:
        return held
    inside = folder / held
    return str(inside.absolute()) if inside.is_file() else held


def holds_images(data: Any) -> bool:
    """Whether a dataset, a stream, a mixture or any of several has a column for the images of its prompts."""
    if data is None:
        return False
    if isinstance(data, dict | list):
        return any(map(holds_images, data.values() if isinstance(data, dict) else data))
    parts = getattr(data, "parts", None)
    if parts is not None:
        return any(holds_images(part.data) for part in parts)
    # a stream that nobody looked into
    columns: Any = getattr(data, "column_names", None) or next(iter(data if hasattr(data, "__iter__") else ()), {})
    # what is no data at all is refused where it is read
    columns = columns if isinstance(columns, Collection) else ()
    return any(column in columns for column in ("images", "image", IMAGES_COLUMN))


def undecoded_stream(stream: Any) -> Any:
    """A stream that gives paths and bytes of pictures, which are decoded where they are looked at."""
    if stream.features is None or not any("Image(" in repr(feature) for feature in stream.features.values()):
        return stream
    return stream.decode(False)
