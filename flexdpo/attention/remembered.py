"""Attention that a pass which runs again does not compute again: its outputs are remembered, call by call."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# what a call came to: its output, and its normaliser where the kernel has one
Attended = tuple["Tensor", "Tensor | None"]


class _Remembered(threading.local):
    kept: list[Attended] | None = None  # where the outputs of a first pass go
    again: Iterator[Attended] | None = None  # those of a pass that runs again


remembered = _Remembered()


@contextlib.contextmanager
def remembering(outputs: list[Attended]) -> Iterator[None]:
    """Put what every attention on a packed row comes to into a list, in this thread."""
    before, remembered.kept = remembered.kept, outputs
    try:
        yield
    finally:
        remembered.kept = before


@contextlib.contextmanager
def remembered_as(outputs: list[Attended]) -> Iterator[None]:
    """Take what attention comes to from a list, for a pass that makes the same calls."""
    before, remembered.again = remembered.again, iter(outputs)
    try:
        yield
    finally:
        remembered.again = before
