"""Runs the examples of a proof packed and unpacked, and listens to the gradients that arrive at the embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from flexdpo.hf.row_dependence import limits_of
from flexdpo.hf.unwrap import base_model
from flexdpo.objective.linear_logps import logits_logps
from flexdpo.objective.lm_head import head_logps, head_plan
from flexdpo.objective.logps import member_values, require_finite, response_logps
from flexdpo.proof.probe import CoarsestRounding, beside_another, path_of, rounded_otherwise, token_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flexdpo.layout.row import Row

# adapters whose gradients are compared weight by weight: two copies of so many numbers
_MOST_ADAPTER_WEIGHTS = 1 << 24
# tokens of a padded batch that are worth one call of the model; more only where a packed row has as many
_SHORT_BATCH = 1024


class Run(NamedTuple):
    """Log-probabilities of the tokens of responses, ``[M]`` float64; gradients at the embeddings, ``[..., L, H]``."""

    logps: Tensor
    gradient: Any

    def sums(self, row: Row) -> Tensor:
        """Log-probabilities of whole responses, ``[R]``."""
        return self.logps.new_zeros(row.num_responses).index_add_(0, row.member_responses, self.logps)


@dataclass
class Runs:
    """Runs rows and sequences, each with its own random weights on the log-probabilities as what is differentiated."""

    model: Any
    listener: Listener
    autocast: Callable[[], AbstractContextManager[Any]]
    rounding: float = 0.0

    def error(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        """As :func:`token_error`, by the rounding that was seen."""
        return token_error(pairs, self.rounding)

    def packed(self, row: Row) -> Run:
        """A whole row, as training runs it; ``FlexdpoError`` names the example whose values are not finite."""
        with self.autocast():
            found = response_logps(self.model, row)
        require_finite(found.sums, row, where="before the first step")
        return self._run(member_values(found.targets, row), row, range(row.num_responses))

    def unpacked(self, row: Row) -> list[Run]:
        """Every sequence of a row, through batches that hold no more tokens than the row or few."""
        runs: list[Any] = [None] * row.num_responses
        for responses in self._batches(row):
            for response, run in zip(responses, self._batch(row, responses), strict=True):
                runs[response] = run
        return runs

    def again(
        self, rows: Sequence[Row], unpacked: Sequence[Sequence[Run]], *, every: bool = False
    ) -> list[tuple[Run, Run]]:
        """The shortest sequence, or every one, in another batch, rounded otherwise; each with what it was before."""
        runs = [
            (row, response, run) for row, each in zip(rows, unpacked, strict=True) for response, run in enumerate(each)
        ]
        found = []
        for row, response, once in runs if every else [min(runs, key=lambda run: len(path_of(*run[:2])))]:
            alone = [response] in self._batches(row)
            self.listener.rounding = self.rounding
            (run,) = self._batch(row, [response], beside=alone)
            self.listener.rounding = 0.0
            found.append((run, once))
        return found

    def _batch(self, row: Row, responses: Sequence[int], *, beside: bool = False) -> list[Run]:
        """Run sequences as an ordinary trainer would; ``beside`` another one that is not looked at."""
        sequences = [row.input_ids[0, path_of(row, response)] for response in responses]
        inputs = {"input_ids": pad_sequence(sequences, True)}
        if beside:
            inputs = beside_another(inputs["input_ids"])
        elif len(sequences) > 1:
            inputs["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in sequences], True)
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
        run = self._run(values.logps.double(), row, responses)
        gradients = [None if run.gradient is None else run.gradient[n, : len(ids)] for n, ids in enumerate(sequences)]
        return [Run(*each) for each in zip(run.logps.split(sizes), gradients, strict=True)]

    def _batches(self, row: Row) -> list[list[int]]:
        """Responses whose sequences may run together: on the same side of every limit, and in no more memory."""
        limits, room = limits_of(base_model(self.model)), max(row.num_tokens, _SHORT_BATCH)
        lengths = [len(path_of(row, response)) for response in range(row.num_responses)]
        batches: list[list[int]] = []
        for response in sorted(range(row.num_responses), key=lambda each: -lengths[each]):
            longest = lengths[batches[-1][0]] if batches else room
            alike = limits.side(lengths[response]) == limits.side(longest)
            if alike and batches and (len(batches[-1]) + 1) * longest <= room:
                batches[-1].append(response)
            else:
                batches.append([response])
        return batches

    def _run(self, logps: Tensor, row: Row, responses: Sequence[int]) -> Run:
        # one random weight for every token of a response: the gradient then says on what each one depends
        weights = [
            torch.randn(len(row.response_paths[response]), generator=torch.Generator().manual_seed(response))
            for response in responses
        ]
        return Run(logps.detach(), self.listener.gradient((logps * torch.cat(weights).to(logps)).sum()))


@dataclass
class Listener:
    """Takes gradients at the embeddings and of an adapter; everything else learns nothing while it listens.

    With a ``rounding`` every embedding moves by about its last bit, where another batch alone may round alike.
    """

    adapter: list[Tensor] = field(default_factory=list)
    embedded: list[Tensor] = field(default_factory=list)
    rounding: float = 0.0

    def capture(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        """A forward hook of the embedding."""
        if self.rounding:
            output = rounded_otherwise(output.detach(), self.rounding)
        if not torch.is_grad_enabled():
            return output
        # an adapter on the embedding itself needs its gradient too
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaf.retain_grad()
        self.embedded.append(leaf)
        # some models scale what they get in place, which a leaf does not allow
        return leaf.clone()

    def gradient(self, score: Tensor) -> Tensor | None:
        """That of a score at what the last forward embedded, ``[B, L, H]``; ``None`` where there is not one such."""
        if not score.requires_grad:
            return None
        # not autograd.grad, which reentrant checkpoints do not know
        score.backward()
        found, self.embedded = self.embedded, []
        return found[0].grad if len(found) == 1 else None

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
