"""What goes wrong in the worker processes of a ``DataLoader``, said as it would be said without them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = f"{FlexdpoError.__module__}.{FlexdpoError.__qualname__}: "


@contextmanager
def plain_worker_errors(num_workers: int) -> Iterator[None]:
    """Turn the death of a worker, and a traceback that came out of one as text, into one clear message.

    Args:
        num_workers: ``dataloader_num_workers`` of the run.

    Raises:
        FlexdpoError: for both; any other error passes as it is.
    """
    try:
        yield
    except FlexdpoError as error:
        text = str(error)
        if not text.startswith("Caught ") or _MARK not in text:
            raise
        # torch passes a worker's error on as its traceback, which ends with the message
        raise FlexdpoError(text.rsplit(_MARK, 1)[1].strip()) from error
    except RuntimeError as error:
        # torch's words for a worker that a signal ended, and for one that is gone without a word
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise FlexdpoError(
            f"a data loader worker died ({str(error).splitlines()[0]}), most often because memory ran out; use fewer "
            f"than dataloader_num_workers={num_workers} (0 needs no worker) and go on with resume_from_checkpoint"
        ) from error
