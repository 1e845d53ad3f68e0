"""Where prepared data is kept between runs, and under which name: another source or setting is another file."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.constants import HF_HOME

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def cache_folder(name: str) -> Path:
    """A folder under ``FLEXDPO_CACHE``, or else beside the hub's cache; it need not exist yet."""
    return Path(os.environ.get("FLEXDPO_CACHE", Path(HF_HOME) / "flexdpo")) / name


def map_settings(dataset: Dataset, parts: tuple[object, ...], folder: str) -> dict[str, Any]:
    """Arguments that tell ``Dataset.map`` where its result is kept, so that the same work in another process finds it.

    By itself ``datasets`` names it by the pickled function, and forgets what was made of a dataset in memory. Here its
    name stands for the source and for ``parts``, all else that decides it as plain values; what cannot lie beside its
    source, which may be in memory or in a folder that nobody may write to, lies in our own ``folder``.
    """
    from datasets import is_caching_enabled

    fingerprint = hashlib.blake2b(repr((dataset._fingerprint, parts)).encode(), digest_size=8).hexdigest()
    if not is_caching_enabled():
        return {"new_fingerprint": fingerprint}
    beside = [Path(file["filename"]).parent for file in dataset.cache_files[:1]]
    for place in (*beside, cache_folder(folder)):
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return {"new_fingerprint": fingerprint, "cache_file_name": str(place / f"cache-{fingerprint}.arrow")}
    return {"new_fingerprint": fingerprint, "keep_in_memory": True}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides what a tokenizer makes of a text, in a few letters, the same in every process."""
    about: dict[str, Any] = {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # what a call with padding= or truncation= leaves behind has no say
        about["backend"] = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    else:
        from datasets.fingerprint import Hasher

        about["pickled"] = Hasher.hash(tokenizer)
    return hashlib.blake2b(json.dumps(about, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()
