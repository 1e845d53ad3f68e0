"""A cache of reference log-probabilities: a folder that survives interruptions and knows whose values it holds.

``identity.json`` says whose values they are, and ``part-*.safetensors`` hold them by the tokens of prompt and response.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flexdpo.errors import FlexdpoError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from flexdpo.layout.groups import Group, PromptImage

_IDENTITY = "identity.json"
_DIGEST = "blake2b"

Key = tuple[int, int]


@dataclass(frozen=True)
class ReferenceIdentity:
    """What reference values depend on beside the tokens themselves."""

    model: str  # from :func:`~flexdpo.reference.fingerprints.model_fingerprint`
    tokenizer: str = ""  # what stands for the tokenizer
    settings: tuple[tuple[str, Any], ...] = ()  # whatever else changes values, by name: precision, ..

    def folder_in(self, root: Path | str) -> Path:
        """A folder for this identity alone: caches of several models live side by side."""
        digest = hashlib.blake2b(json.dumps(self.as_dict(), sort_keys=True).encode(), digest_size=8)
        return Path(root) / f"reference-{digest.hexdigest()}"

    def as_dict(self) -> dict[str, Any]:
        """As it is written to disk."""
        return {"format": 2, "model": self.model, "tokenizer": self.tokenizer, "settings": dict(self.settings)}


def response_key(
    prompt_ids: NDArray[np.int64], response_ids: NDArray[np.int64], images: Sequence[PromptImage] = ()
) -> Key:
    """The name of a value in the cache: a 128-bit hash of prompt and response tokens, and of the prompt's images."""
    digest = hashlib.blake2b(np.int64(prompt_ids.size).tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(response_ids, dtype="<i8").tobytes())
    digest.update("".join(image.digest for image in images).encode())
    first, second = np.frombuffer(digest.digest(), dtype="<i8").tolist()
    return first, second


class ReferenceCache:
    """Reference log-probabilities of responses, in memory and in a folder of this identity's values alone."""

    def __init__(self, folder: Path | str, identity: ReferenceIdentity) -> None:
        self.folder, self.identity = Path(folder), identity
        self.values: dict[Key, float] = {}
        self._loaded: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        _claim(self.folder / _IDENTITY, identity)
        self.reload()

    @classmethod
    def holding(cls, values: dict[Key, float], source: Path, identity: ReferenceIdentity) -> ReferenceCache:
        """A cache of values that were read from ``source``, without a folder to add more to."""
        cache = cls.__new__(cls)
        cache.folder, cache.identity, cache.values, cache._loaded = source, identity, values, set()
        return cache

    def reload(self) -> None:
        """Read the parts that other processes have written since."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name not in self._loaded:
                tensors = read(path, "keys", "sums")
                self.values.update(zip(map(tuple, tensors["keys"].tolist()), tensors["sums"].tolist(), strict=True))
                self._loaded.add(path.name)

    def add(self, values: dict[Key, float], writer: int = 0) -> None:
        """Write values to a new part of the process ``writer``, whole or not at all."""
        if not values:
            return
        number = sum(name.startswith(f"part-{writer}-") for name in self._loaded)
        path = self.folder / f"part-{writer}-{number:06d}.safetensors"
        sums = np.array(list(values.values()), dtype=np.float64)
        write(path, {"keys": np.array(list(values), dtype=np.int64), "sums": sums})
        self.values.update(values)
        self._loaded.add(path.name)

    def sums(self, group: Group) -> list[float]:
        """The reference log-probability of each response of a group, in nats."""
        return [self._value(group, response) for response in group.response_ids]

    def pair_sums(self, group: Group, ld_alpha: float) -> list[list[float]]:
        """LD-DPO's reference log-probabilities of each preference of a group, chosen and rejected, in nats."""
        found = []
        for edge in group.edges:
            ends = [group.response_ids[end] for end in edge]
            shared = min(end.size for end in ends)
            values = [(self._value(group, end), self._value(group, end[:shared])) for end in ends]
            found.append([ld_alpha * whole + (1 - ld_alpha) * beginning for whole, beginning in values])
        return found

    def _value(self, group: Group, response: NDArray[np.int64]) -> float:
        try:
            return self.values[response_key(group.prompt_ids, response, group.images)]
        except KeyError:
            raise FlexdpoError(
                f"{group.name}: the cache {self.folder} has no reference log-probability for a response of "
                f"{response.size} tokens; compute it for this dataset first"
            ) from None


def _claim(path: Path, identity: ReferenceIdentity) -> None:
    """Write whose cache this is, or check it."""
    wanted = identity.as_dict()
    if not path.exists():
        # what an interrupted claim left behind is no stranger's
        others = sorted(e.name for e in path.parent.iterdir() if not e.name.startswith(f".{path.name}."))
        # another process of the same run may have claimed the folder since
        if others and not path.exists():
            raise FlexdpoError(
                f"{path.parent} is no reference cache: it has no {_IDENTITY} but {others[0]!r}; give an empty or new "
                "folder"
            )
        if not others:
            with unfinished(path) as whole:
                whole.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in wanted if held[name] != wanted[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, "it is not what flexdpo wrote there") from error
    if different:
        name = different[0]
        raise FlexdpoError(
            f"{path.parent} holds reference log-probabilities of another {name}: {held[name]} where this run has "
            f"{wanted[name]}; give another folder, or delete this one"
        )


def read(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Read a file of the cache, or say that it is truncated or holds anything else than what was written there."""
    try:
        with safe_open(path, framework="numpy") as file:
            if {*file.keys()} != {*names}:
                raise damaged(path, f"it holds {', '.join(sorted(file.keys())) or 'nothing'}")
            tensors = {name: file.get_tensor(name) for name in names}
            stored = (file.metadata() or {}).get(_DIGEST)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        # the last two: numpy lacks some of the dtypes that a file may name
        raise damaged(path, first_line(error)) from error
    if stored != _digest(tensors):
        raise damaged(path, "its values are not those that were written")
    return tensors


def _digest(tensors: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def damaged(path: Path, why: str) -> FlexdpoError:
    """The error for a file that cannot be used."""
    return FlexdpoError(
        f"{path} is truncated, damaged or not a file of a reference cache ({why}); delete it, and what it held is "
        "computed again"
    )


def write(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Write a file of the cache, whole or not at all."""
    with unfinished(path) as whole:
        save_file(tensors, whole, {_DIGEST: _digest(tensors)})


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Where to write a file that becomes ``path`` once it is whole; no other process, of any machine, writes there."""
    whole = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield whole
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
