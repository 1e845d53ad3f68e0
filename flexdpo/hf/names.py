"""What a name stands for, a path or an entry of the Hugging Face hub: decided here for models, tokenizers and data."""

from __future__ import annotations

import json
import os
from pathlib import Path

from flexdpo.errors import FlexdpoError, first_line

_DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
_PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")


def local_path(name: str) -> Path | None:
    """The path that a name means, whether there is something or not; ``None`` for a hub name.

    What exists on disk comes first. The hub knows ``name`` and ``owner/name`` and nothing deeper, and no data files.
    """
    path = Path(name).expanduser()
    file = path.with_suffix("") if path.suffix.lower() in _PACKED_ENDINGS else path
    looks_local = name.startswith((".", "~", "/", os.sep)) or name.count("/") > 1 or "\\" in name
    return path if looks_local or file.suffix.lower() in _DATA_ENDINGS or path.exists() else None


def require_saved(name: str, *needed: str, revision: str | None = None) -> None:
    """Say at once that a local folder has none of the files ``needed``, or no ``revision``, instead of asking a hub."""
    path = local_path(name)
    if path is not None and revision not in (None, "main"):
        raise FlexdpoError(
            f"revision {revision!r} has no effect: {name} is a folder here, which holds one; leave it out, or give a "
            "hub name"
        )
    if path is None or any((path / file).is_file() for file in needed):
        return
    if not path.exists():
        raise FlexdpoError(f"{name} is not a folder with a saved model; give one, or a hub name")
    entries = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [f"a file, {path.name}"]
    found = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "") if entries else "nothing"
    raise FlexdpoError(
        f"{name} has no {needed[0]}, so it is no saved model; found {found}. Give a folder that save_pretrained wrote"
    )


def adapter_base(name: str) -> str | None:
    """The model that a folder's adapter belongs to; ``None`` where the folder holds a model, or the name is a hub's."""
    path = local_path(name)
    file = None if path is None else path / "adapter_config.json"
    if file is None or not file.is_file() or (file.parent / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FlexdpoError(f"{file} is damaged ({type(error).__name__}: {first_line(error)}); save it again") from error
    if not isinstance(base, str) or not base:
        raise FlexdpoError(
            f"{file} does not name the model that its adapter belongs to; write it there as base_model_name_or_path, "
            "or load both in Python and give the PeftModel"
        )
    return base


def why_unreachable(name: str, *, dataset: bool = False) -> str:
    """Ask the hub for a name with a short patience; why no answer came, or ``""`` after any answer and for a path."""
    # the libraries would retry the network for half a minute for each file first
    if local_path(name) is not None:
        return ""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        (HfApi().dataset_info if dataset else HfApi().model_info)(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return ""  # an answer, or a name no hub can have: the loader says the same in better words
    except Exception as error:  # each HTTP client that the hub library may use has errors of its own
        return f"the hub cannot be reached: {type(error).__name__}: {first_line(error)}"
    return ""
