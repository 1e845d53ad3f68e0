"""The errors a user can mend, told apart from faults in flexdpo itself."""


class FlexdpoError(ValueError):
    """Something the caller gave cannot be used; the message names the value, the place and the way out.

    The command line prints the message alone and exits with 2. Anything that is not a ``FlexdpoError`` is a fault of
    the program and keeps its traceback.
    """


class UnsupportedModelError(FlexdpoError):
    """The model would not give the ordinary result on shared, packed rows, so it is refused."""


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
