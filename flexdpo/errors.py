"""The errors a user can mend, told apart from faults in flexdpo itself, and how their messages show things."""

import errno
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class FlexdpoError(ValueError):
    """Something the caller gave cannot be used; the message names the value, the place and the way out.

    The command line prints it alone and exits with 2. Any other error is the program's fault and keeps its traceback.
    """


class UnsupportedModelError(FlexdpoError):
    """The model would not give the ordinary result on shared, packed rows, so it is refused."""


# what a disk or a folder refuses: nobody's fault in here
_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip


def is_the_disks(error: BaseException | None) -> bool:
    """Whether an error says that a disk is full, or a folder may not be written to."""
    return isinstance(error, OSError) and error.errno in _DISK


class Interrupted(KeyboardInterrupt):
    """A signal ended a run; ``number`` is the signal, the message says what there is to go on from."""

    def __init__(self, number: int, left: str = "") -> None:
        super().__init__(left)
        self.number = number


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string when none is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quoted(names: Iterable[object]) -> str:
    """Names in quotes, with commas; ``nothing`` where there are none."""
    return ", ".join(repr(str(name)) for name in names) or "nothing"


def found(value: object) -> str:
    """A value's type and its beginning."""
    shown = repr(value)
    return f"{type(value).__name__} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
