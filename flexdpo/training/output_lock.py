"""One run at a time writes into an output folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from flexdpo.errors import FlexdpoError, first_line

try:
    import fcntl
except ImportError:  # Windows has none, and there the folder stays unguarded
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".flexdpo.lock"
# folders that this process holds: a trainer inside a job shares the job's
_held: set[Path] = set()


@contextlib.contextmanager
def holding_output(folder: Path, *, is_owner: bool) -> Iterator[None]:
    """Keep other runs out of an output folder for the length of a ``with`` block.

    The system lets go of the lock when its process dies, however it dies, so none is ever stale.

    Args:
        folder: Made if it does not exist.
        is_owner: Whether this process, of the several that a run may have, is the one that holds it.

    Raises:
        FlexdpoError: if another run holds it, naming its process, or if it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise FlexdpoError(f"--output_dir {folder} is a file; name a folder")
    path = folder.absolute() / LOCK_FILE
    if not is_owner or fcntl is None or path in _held:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlexdpoError(
            f"--output_dir {folder} cannot be made ({first_line(error)}); name another folder"
        ) from error
    descriptor = _acquire(path)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        # while it is still held: whoever waits for the file sees that it is gone
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the file may have been its last holder's, removed since
            mine = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            holder = os.read(descriptor, 4096).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise FlexdpoError(
                f"another run is writing into {path.parent} ({holder}); wait until it has ended, or give another "
                "output_dir"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise FlexdpoError(
                f"{path} cannot be locked ({first_line(error)}), so another run could write into the folder too; give "
                "an output_dir on a file system with locks"
            ) from error
        try:
            if mine:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
                return descriptor
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)
