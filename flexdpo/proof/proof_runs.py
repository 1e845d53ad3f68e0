"""Runs the examples of a proof packed and unpacked, and listens to the gradients that arrive at the embeddings."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flexdpo.hf.forward_layout import TOKEN_TYPES, packed_forward
from flexdpo.hf.row_dependence import LengthLimits
from flexdpo.hf.unwrap import base_model
from flexdpo.layout.groups import Group
from flexdpo.layout.images import joined_inputs
from flexdpo.layout.row import Piece, Row
from flexdpo.layout.row_layout import RowLayout
from flexdpo.objective.linear_logps import logits_logps
from flexdpo.objective.lm_head import head_logps, head_plan
from flexdpo.objective.logps import member_values, require_finite, response_logps
from flexdpo.proof.allowance import batches_of
from flexdpo.proof.probe import beside_another, path_of
from flexdpo.proof.rounding import CoarsestRounding, rounded_otherwise, token_error

# adapters whose gradients are compared weight by weight: two copies of so many numbers
_MOST_ADAPTER_WEIGHTS = 1 << 24
# of a number's last bit: what another kernel moves, figures that it leads to are as far off as those of eager attention
_ROUNDED_BY = 0.3


class Run(NamedTuple):
    """Log-probabilities of a response's tokens, ``[M]`` float64; the gradient at the embeddings, ``[L, H]``."""

    logps: Tensor
    gradient: Any


class PackedRun(NamedTuple):
    """The same of a whole row: log-probabilities response by response, and the gradient at its tokens, ``[S, H]``."""

    logps: tuple[Tensor, ...]
    gradient: Any

    @property
    def sums(self) -> Tensor:
        """Log-probabilities of whole responses, ``[R]``."""
        return torch.stack([logps.sum() for logps in self.logps])


@dataclass
class Runs:
    """Runs rows and sequences, each with its own random weights on the log-probabilities as what is differentiated."""

    model: Any
    limits: LengthLimits
    listener: Listener
    autocast: Callable[[], AbstractContextManager[Any]]
    rounding: float = 0.0

    def error(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        """As :func:`token_error`, by the rounding that was seen."""
        return token_error(pairs, self.rounding)

    def packed(self, row: Row, responses: Sequence[int]) -> PackedRun:
        """A whole row, as training runs it; the gradient is that of some of its responses.

        ``FlexdpoError`` names the example whose values are not finite.
        """
        with self.autocast(), contextlib.nullcontext() if responses else torch.no_grad():
            found = response_logps(self.model, row)
        require_finite(found.sums, row, where="before the first step")
        logps = member_values(found.targets, row).split([len(path) for path in row.response_paths])
        gradient = self._gradient({response: logps[response] for response in responses}, row.pieces)
        gradient = None if gradient is None else gradient[0, : row.num_tokens]
        return PackedRun(tuple(each.detach() for each in logps), gradient)

    def unpacked(self, row: Row, responses: Sequence[int]) -> dict[int, Run]:
        """Sequences of a row, through batches that hold no more tokens than the row or few."""
        runs: dict[int, Run] = {}
        for batch in batches_of(row, responses, self.limits):
            runs |= self._batch(row, batch)
        return runs

    def again(self, row: Row, batches: Sequence[Sequence[int]], *, beside: bool, seed: int = 0) -> dict[int, Run]:
        """The sequences of batches once more, each in another batch, from embeddings that are rounded otherwise.

        Those of several are alone now, and those that were alone ``beside`` another one.
        """
        runs: dict[int, Run] = {}
        self.listener.rounding, self.listener.seed = _ROUNDED_BY * (1 + seed / 2) * self.rounding, seed
        for batch in batches:
            for response in batch:
                runs |= self._batch(row, [response], beside=beside and len(batch) == 1)
        self.listener.rounding = 0.0
        return runs

    def _batch(self, row: Row, responses: Sequence[int], *, beside: bool = False) -> dict[int, Run]:
        """Run sequences as an ordinary trainer would; ``beside`` another one that is not looked at."""
        sequences = [row.input_ids[0, path_of(row, response)] for response in responses]
        inputs = {"input_ids": pad_sequence(sequences, True)}
        groups = [group for group in row.groups for _ in group.response_ids]
        pictured = [groups[response] for response in responses if groups[response].images]
        if beside and pictured:
            # a whole one, since a part of it might end within an image
            inputs, pictured = {"input_ids": inputs["input_ids"].repeat(2, 1)}, pictured * 2
        elif beside:
            inputs = beside_another(inputs["input_ids"])
        elif len(sequences) > 1:
            inputs["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in sequences], True)
        if pictured:
            inputs |= _image_inputs(base_model(self.model), inputs["input_ids"], pictured)
        length = inputs["input_ids"].shape[1]
        sizes = [len(row.response_paths[response]) for response in responses]
        predictors = torch.cat(
            [
                number * length + torch.arange(len(ids) - size - 1, len(ids) - 1, device=ids.device)
                for number, (ids, size) in enumerate(zip(sequences, sizes, strict=True))
            ]
        )
        labels = inputs["input_ids"].flatten()[predictors + 1]
        plan = head_plan(self.model)
        with self.autocast(), contextlib.nullcontext() if self.rounding else CoarsestRounding() as watched:
            if plan.obstacle is None:
                values = head_logps(self.model, {**inputs, "use_cache": False}, predictors, labels, plan)
            else:
                values = logits_logps(self.model(**inputs, use_cache=False).logits.flatten(0, 1)[predictors], labels)
        if watched is not None:
            self.rounding = watched.eps
        logps = values.logps.double().split(sizes)
        gradient = self._gradient(dict(zip(responses, logps, strict=True)))
        return {
            response: Run(logps[n].detach(), None if gradient is None else gradient[n, : len(sequences[n])])
            for n, response in enumerate(responses)
        }

    def _gradient(self, logps: dict[int, Tensor], pieces: Sequence[Piece] = ()) -> Tensor | None:
        """At what the last pass, or those of a row's pieces, embedded, of log-probabilities of some responses."""
        # one random weight for every token of a response: the gradient then says on what each one depends
        scores = [
            (
                values
                * torch.randn(len(values), generator=torch.Generator().manual_seed(response), device="cpu").to(values)
            ).sum()
            for response, values in logps.items()
        ]
        return self.listener.gradient(torch.stack(scores).sum(), pieces) if scores else None


def _image_inputs(base: Any, input_ids: Tensor, groups: Sequence[Group]) -> dict[str, Tensor]:
    """What an ordinary run of sequences ``[B, L]`` is given of their images, in their order."""
    joined = joined_inputs([image.inputs for group in groups for image in group.images])
    found = {name: value.to(input_ids.device) for name, value in joined.items()}
    takes = inspect.signature(type(base.base_model).forward).parameters
    types = (input_ids == groups[0].image_token_id).long()
    return {**found, **{name: types for name in TOKEN_TYPES if name in takes}}


@dataclass
class Listener:
    """Takes gradients at the embeddings and of an adapter; everything else learns nothing while it listens.

    With a ``rounding`` every embedding moves by about that, where another batch alone may round alike.
    """

    adapter: list[Tensor] = field(default_factory=list)
    embedded: list[Tensor] = field(default_factory=list)
    layouts: list[RowLayout | None] = field(default_factory=list)  # of the packed rows that these belong to
    rounding: float = 0.0
    seed: int = 0

    def capture(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        """A forward hook of the embedding."""
        if self.rounding:
            output = rounded_otherwise(output.detach(), self.rounding, self.seed)
        if not torch.is_grad_enabled():
            return output
        # an adapter on the embedding itself needs its gradient too
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaf.retain_grad()
        self.embedded.append(leaf)
        forward = packed_forward()
        self.layouts.append(None if forward is None else forward.layout)
        # some models scale what they get in place, which a leaf does not allow
        return leaf.clone()

    def gradient(self, score: Tensor, pieces: Sequence[Piece] = ()) -> Tensor | None:
        """That of a score at what was embedded, ``[B, L, H]``; ``None`` where that is not one forward pass.

        The pieces of a row are one for each, some of which run in the backward pass; their gradients come in row order.
        """
        if not score.requires_grad:
            return None
        # not autograd.grad, which reentrant checkpoints do not know
        score.backward()
        found, layouts = self.embedded, self.layouts
        self.embedded, self.layouts = [], []
        if len(found) != max(1, len(pieces)):
            return None
        if not pieces:
            return found[0].grad
        by_layout = {id(layout): leaf.grad for layout, leaf in zip(layouts, found, strict=True)}
        gradients = [by_layout[id(piece.layout)] for piece in pieces]
        if any(gradient is None for gradient in gradients):
            return None
        parts = torch.cat([each[0, : len(p.tokens)] for each, p in zip(gradients, pieces, strict=True)])  # type: ignore[index]
        tokens = torch.cat([piece.tokens for piece in pieces])
        return torch.empty_like(parts).index_copy(0, tokens, parts)[None]

    def take_adapter_gradients(self) -> Tensor:
        """Gradients of all weights of the adapter since the last call, one after the other."""
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.adapter]
        for weight in self.adapter:
            weight.grad = None
        return torch.cat([each.flatten() for each in gradients]) if gradients else torch.zeros(0)


@contextlib.contextmanager
def listening(model: nn.Module, with_gradients: bool) -> Iterator[Listener]:
    """Freeze all but the embedding's output and a small adapter, and bring everything back at the end."""
    base: Any = base_model(model)
    # without gradients nothing is touched: FSDP keeps what it sees of its weights at their first pass
    learning = [weight for weight in model.parameters() if weight.requires_grad] if with_gradients else []
    some_frozen = len(learning) < len(list(model.parameters()))
    is_adapter = some_frozen and sum(weight.numel() for weight in learning) <= _MOST_ADAPTER_WEIGHTS
    listener = Listener([*learning] if is_adapter else [])
    kept = [weight.grad for weight in learning]
    handle = base.get_input_embeddings().register_forward_hook(listener.capture)
    try:
        for weight in learning:
            weight.grad = None
            weight.requires_grad_(is_adapter)
        with torch.set_grad_enabled(with_gradients):
            yield listener
    finally:
        handle.remove()
        for weight, gradient in zip(learning, kept, strict=True):
            weight.requires_grad_(True)
            weight.grad = gradient
