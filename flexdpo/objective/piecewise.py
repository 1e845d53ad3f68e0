"""Log-probabilities of a row that runs in pieces: each token once forward, and its gradients added up along the path.

Pieces run depth first against the keys and values of their path (:mod:`flexdpo.attention.path_keys`). How much each
target weighs in the loss is known when all log-probabilities are, so the forward pass keeps the graphs of as many
pieces as there is room for, the last ones, and of the others what attention came to; in the backward pass these run
again, last first, without their attention. When all pieces behind one have sent their gradients into its keys and
values, its own graph runs backwards, once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from flexdpo.attention.path_keys import PathKeys
from flexdpo.attention.remembered import Attended, remembered_as, remembering
from flexdpo.attention.row_mask import RowMask
from flexdpo.attention.settings import kernel_settings, kernel_settings_as
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.unwrap import base_model
from flexdpo.objective.linear_logps import TargetLogps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from flexdpo.layout.row import Piece, Row


def piecewise_logps(run: Callable[[Row], TargetLogps], row: Row) -> TargetLogps:
    """Return the log-probability of every target of a row in pieces.

    ``run`` takes a piece through the model. Differentiable once in the model's weights, whose gradients are
    added to theirs while the backward pass runs.
    """
    passes = _Passes(run, row)
    return passes.forward()


def require_attention_only(model: Any) -> None:
    """Refuse a model with layers that hand on more than keys and values.

    Raises ``UnsupportedModelError`` naming it.
    """
    base = base_model(model)
    stateful = base._flexdpo_mixing.stateful
    if stateful:
        raise UnsupportedModelError(
            f"a row is longer than max_tokens_per_row, and {type(base).__name__} cannot run it in pieces: "
            f"{stateful} of its layers carry a state from token to token, which is not handed from piece to piece; "
            "raise max_tokens_per_row, or lower max_length"
        )


@dataclass(eq=False)
class _Pass:
    """One piece in progress."""

    kept: PathKeys
    values: TargetLogps


@dataclass(eq=False)
class _Passes:
    """The pieces of one row, forwards and then backwards."""

    run: Callable[[Row], TargetLogps]
    row: Row
    # of which the graph is there; without gradients all that are on the path of a piece to come
    open: dict[int, _Pass] = field(default_factory=dict)
    # what attention came to in those that will run again, in the order of its calls
    attended: dict[int, list[Attended]] = field(default_factory=dict)
    room: int = 0  # tokens that the longest path takes with the piece in hand
    closed: int = 0  # tokens of the pieces that were dropped since memory was handed back

    def forward(self) -> TargetLogps:
        pieces = self.row.pieces
        paths = [{*self._path(number), number} for number in range(len(pieces))]
        self.room = max(self._tokens(path) for path in paths)
        with_graph = self._with_graph(paths) if torch.is_grad_enabled() else frozenset()
        self.settings, self.precision = kernel_settings(), _precision(self.row.input_ids.device.type)
        parts: list[TargetLogps] = []
        for number, piece in enumerate(pieces):
            for done in [each for each in self.open if each not in with_graph and not self._is_on_path(each, piece)]:
                self._close(done)
            with torch.set_grad_enabled(number in with_graph), contextlib.ExitStack() as stack:
                if with_graph and number not in with_graph:
                    stack.enter_context(remembering(self.attended.setdefault(number, [])))
                self.open[number] = found = self._pass(number)
            parts.append(found.values)
        wanted = any(each.values.logps.requires_grad for each in self.open.values())
        order = torch.cat([piece.targets for piece in pieces])
        logps = _in_order([each.logps.detach() for each in parts], order)
        squares = [each.log_sum_squares for each in parts if each.log_sum_squares is not None]
        for number in self.open.keys() - with_graph:
            self._close(number)
        if wanted:
            logps = _InPieces.apply(logps.new_zeros((), requires_grad=True), logps, self)
        return TargetLogps(logps, _in_order(squares, order) if squares else None)

    def backward(self, gradient: Tensor) -> None:
        """Add the weights' gradients to theirs; ``gradient`` is that of each target, ``[T]``."""
        if not self.open:
            raise FlexdpoError(
                "a row in pieces ran backwards already, and its graphs are gone; run it forward again, or add up "
                "what is to run backwards"
            )
        with torch.enable_grad(), kernel_settings_as(self.settings), self.precision():
            for number in reversed(range(len(self.row.pieces))):
                self._reach(number)
                found, piece = self.open[number], self.row.pieces[number]
                roots, gradients = found.kept.gradients()
                if found.values.logps.requires_grad and len(piece.targets):
                    roots.append(found.values.logps)
                    gradients.append(gradient[piece.targets])
                if roots:
                    torch.autograd.backward(roots, gradients)
                self._close(number)

    def _with_graph(self, paths: list[set[int]]) -> frozenset[int]:
        """The pieces whose graphs are kept at the first pass: the last ones, with their paths, as far as there is room.

        The room is what any path takes with the piece in hand.
        """
        kept: set[int] = set()
        for path in reversed(paths):
            if self._tokens(kept | path) > self.room:
                break
            kept |= path
        return frozenset(kept)

    def _tokens(self, numbers: set[int]) -> int:
        return sum(self.row.pieces[each].layout.length for each in numbers)

    def _path(self, number: int) -> list[int]:
        """The pieces before one on its path, the first one first."""
        found: list[int] = []
        while (number := self.row.pieces[number].parent) >= 0:
            found.append(number)
        return found[::-1]

    def _is_on_path(self, number: int, piece: Piece) -> bool:
        return piece.parent >= 0 and (number == piece.parent or number in self._path(piece.parent))

    def _reach(self, number: int) -> None:
        """Run a piece, and what is missing of its path, with gradients."""
        for each in (*self._path(number), number):
            if each not in self.open:
                with remembered_as(self.attended.pop(each)):
                    self.open[each] = self._pass(each)

    def _pass(self, number: int) -> _Pass:
        piece = self.row.pieces[number]
        layout, kept = piece.layout, PathKeys()
        layout.path, layout.kept = tuple(self.open[each].kept for each in self._path(number)), kept
        return _Pass(kept, self.run(piece))

    def _close(self, number: int) -> None:
        """Drop a piece's graph, keys and masks."""
        del self.open[number]
        layout = self.row.pieces[number].layout
        layout.path, layout.kept = (), None
        for known in layout.memo.values():
            if isinstance(known, RowMask):
                # mask and BlockMask know each other, so that they would stay until garbage is collected
                known.biases.clear()
        layout.memo.clear()
        self.closed += layout.length
        if self.closed >= self.room // 4 and (trim := _malloc_trim()) and self.row.input_ids.device.type == "cpu":
            # glibc keeps the holes that pieces leave, up to a third of the peak; to fill them anew costs time, so not
            # after every piece
            trim(0)
            self.closed = 0


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _in_order(parts: list[Tensor], order: Tensor) -> Tensor:
    values = torch.cat(parts)
    return torch.empty_like(values).index_copy(0, order, values)


def _precision(device: str) -> Callable[[], Any]:
    """What brings back, in a thread of the backward pass too, the autocast that is in force now."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            yield

    return again


class _InPieces(torch.autograd.Function):
    """Log-probabilities whose gradients are added up piece by piece."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logps: Tensor, passes: _Passes) -> Tensor:  # noqa: ARG004
        ctx.passes = passes
        return logps.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.passes.backward(gradient)
        return gradient.new_zeros(()), None, None
