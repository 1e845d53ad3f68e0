"""Attention that a pass which runs again does not compute again: its outputs are remembered, call by call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# what a call came to: its output, and its normaliser where the kernel has one
Attended = tuple["Tensor", "Tensor | None"]


class _Remembered(threading.local):
    kept: list[Attended] | None = None  # where the outputs of a first pass go
    again: Iterator[Attended] | None = None  # those of a pass that runs again
    checkpointed: bool = False  # whether a checkpoint asked for it


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


class _Checkpointed:
    """One of the two contexts around a checkpoint: entered for its first pass, and at every pass that runs it again."""

    def __init__(
        self, outputs: list[Attended], around: Callable[[list[Attended]], AbstractContextManager[None]]
    ) -> None:
        self._outputs, self._around = outputs, around
        self._inside: list[tuple[bool, AbstractContextManager[None]]] = []

    def __enter__(self) -> None:
        self._inside.append((remembered.checkpointed, context := self._around(self._outputs)))
        context.__enter__()
        remembered.checkpointed = True

    def __exit__(self, *raised: Any) -> None:
        remembered.checkpointed, context = self._inside.pop()
        context.__exit__(*raised)


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """A ``context_fn`` of ``torch.utils.checkpoint.checkpoint`` under which attention is not computed again.

    Of each layer, what its attention came to is kept besides its inputs, and the linear layers run again. For attention
    in query blocks (``attn_impl="sdpa"``, on a CPU the default) in layers that are not compiled; others raise.
    """
    outputs: list[Attended] = []
    return _Checkpointed(outputs, remembering), _Checkpointed(outputs, remembered_as)
