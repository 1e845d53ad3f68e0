"""What goes wrong in the worker processes of a ``DataLoader``, said as it would be said without them."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flexdpo.errors import FlexdpoError, first_line

_MARK = f"{FlexdpoError.__module__}.{FlexdpoError.__qualname__}: "


@contextmanager
def plain_worker_errors(num_workers: int) -> Iterator[None]:
    """Turn the death of a worker, and a traceback that came out of one as text, into one clear ``FlexdpoError``."""
    try:
        yield
    except FlexdpoError as error:
        text = str(error)
        if not text.startswith("Caught ") or _MARK not in text:
            raise
        traceback.clear_frames(error.__traceback__)
        # torch passes a worker's error on as its traceback, which ends with the message
        raise FlexdpoError(text.rsplit(_MARK, 1)[1].strip()) from error
    except (RuntimeError, OSError, EOFError) as error:
        died = False
        for _ in range(10):
            # torch raises from a signal handler too, which may come as late as this
            with suppress(RuntimeError):
                died = _tells_of_a_death(error)
                if died:
                    # else the loader lives on in them, and torch would report the death again at any child's end
                    traceback.clear_frames(error.__traceback__)
                break
        if not died:
            raise
        raise FlexdpoError(
            f"a data loader worker died ({first_line(error)}), most often because memory ran out; use fewer than "
            f"dataloader_num_workers={num_workers} (0 needs no worker) and go on with resume_from_checkpoint"
        ) from error


def _tells_of_a_death(error: BaseException) -> bool:
    """Whether torch says that a worker is gone, or a batch could not be fetched from one because it is."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    frames = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    # files are read in the workers, so only the connection to one can fail here
    return "torch.utils.data.dataloader" in frames and "torch.multiprocessing.reductions" in frames
