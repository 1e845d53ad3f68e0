"""The proof at the start of a run: packed and shared equals one sequence at a time, on the run's own first examples.

Everything is as it will be trained: weights, dtype, adapters, train mode, checkpointing, autocast. The same responses
run packed, as training lays them out, and one by one through the model's stock attention; compared are their
log-probabilities and the gradients that arrive at the embeddings (and at an adapter's weights). What rounding alone may
do is measured, not guessed: some sequences run once more, in another batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.hf.draws import RandomState, draws_by_module
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.row_dependence import limits_of
from flexdpo.layout.packing import pack
from flexdpo.objective.linear_logps import logits_logps
from flexdpo.objective.lm_head import base_model, head_logps, head_plan
from flexdpo.objective.logps import member_values, require_finite, response_logps
from flexdpo.proof.probe import (
    NOISE_FACTOR,
    ROUNDINGS,
    CoarsestRounding,
    beside_another,
    path_of,
    rounded_otherwise,
    stock_attention,
    token_error,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row

# log-probabilities of the responses of a row, [R]
ReferenceSums = Callable[["Row"], "Tensor"]

# adapters whose gradients are compared weight by weight: two copies of so many numbers
_MOST_ADAPTER_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Proof:
    """What was measured; errors and noise are relative to the largest value of their kind.

    Gradients are NaN where they could not be taken (sharded models), the reference's error where it need not agree.
    In half precision each figure is that of nine in ten tokens.
    """

    examples: int
    sequences: int
    value_error: float
    value_noise: float
    gradient_error: float
    gradient_noise: float
    adapter_error: float
    reference_error: float
    rounding: float
    drew_random_numbers: bool
    seconds: float

    @property
    def failures(self) -> list[str]:
        """What does not hold, with its figures; empty where everything does."""
        values = max(NOISE_FACTOR * self.value_noise, ROUNDINGS * self.rounding)
        gradients = max(values, NOISE_FACTOR * self.gradient_noise)
        found = ["random numbers were drawn in the forward pass"] if self.drew_random_numbers else []
        for what, error, budget in (
            ("packed log-probabilities", self.value_error, values),
            ("packed gradients at the embeddings", self.gradient_error, gradients),
            ("packed gradients of the adapter", self.adapter_error, gradients),
            ("the reference's log-probabilities, which are the policy's before the first step,",
             self.reference_error, values),
        ):  # fmt: skip
            # NaN stands for what was not compared
            if error > budget:
                found.append(f"{what} are off by {error:.1e} where rounding explains {budget:.1e}")
        return found

    def figures(self) -> dict[str, float | None]:
        """All figures as plain JSON values, which know no NaN."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}

    def line(self) -> str:
        """The proof in one line, for a log."""
        figures = (
            ("log-probabilities", self.value_error),
            ("gradients", self.gradient_error),
            ("the adapter's", self.adapter_error),
            ("the reference", self.reference_error),
        )
        compared = ", ".join(f"{name} within {error:.0e}" for name, error in figures if not math.isnan(error))
        noise = max(figure for figure in (self.value_noise, self.gradient_noise) if not math.isnan(figure))
        many = "s" if self.examples > 1 else ""
        return f"proved on {self.examples} example{many}: {compared}, noise floor {noise:.0e} ({self.seconds:.1f} s)"


def prove(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    reference: ReferenceSums | None = None,
    max_tokens_per_row: int | None = None,
    pad_to_multiple_of: int = 1,
    sharing: str = "group",
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Proof:
    """Prove on a model, as it is and in the mode it is in, that packed and shared gives the ordinary result.

    Costs a forward and a backward pass over the groups packed, over their sequences one by one and over one sequence
    of each group again. Weights, gradients and random states are left as they were.

    Args:
        model: A Hugging Face causal LM, with adapters and wrappers; prepared here if it was not.
        groups: Some examples, at least one; two or more also show that documents of a row keep apart.
        reference: Gives the log-probabilities ``[R]`` of a row's responses under a reference that must agree with the
            policy as it is now.
        max_tokens_per_row: As in training, like the next two.
        pad_to_multiple_of: As in training.
        sharing: As in training.
        autocast: Entered around every forward pass.

    Returns:
        What was measured.

    Raises:
        FlexdpoError: with the figures, where an error is larger than rounding explains.
    """
    prepare_model(base_model(model))
    device = next(model.parameters()).device
    rows = pack(
        groups,
        max_tokens_per_row,
        pad_to_multiple_of=pad_to_multiple_of,
        sharing=sharing,
        limits=limits_of(base_model(model)).limits,
    )
    proof = measure(model, [row.to(device) for row in rows], reference=reference, autocast=autocast)
    require_proof(proof, model)
    return proof


def require_proof(proof: Proof, model: nn.Module) -> None:
    """Raise ``FlexdpoError`` with the figures where a proof fails."""
    if proof.failures:
        raise FlexdpoError(
            f"{type(base_model(model)).__name__} does not give the ordinary result on the first examples of this run: "
            f"{'; '.join(proof.failures)}. Nothing was trained. flexdpo.parity_probe(model) tells more about the "
            "model; prove=False trains without this proof"
        )


def measure(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    reference: ReferenceSums | None = None,
    with_gradients: bool = True,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Proof:
    """Measure what :func:`prove` judges, on rows that are on the model's device.

    Args:
        model: Prepared, wrapped or not; a sharded one is run through its wrapper.
        rows: As training packs them.
        reference: See :func:`prove`.
        with_gradients: Leave out for sharded models, whose weights exist during their own passes only.
        autocast: Entered around every forward pass.

    Raises:
        FlexdpoError: naming the example, where a log-probability is not finite to begin with.
    """
    started = time.perf_counter()
    base = base_model(model)
    before = RandomState.now()
    with _listening(model, with_gradients) as listener:
        runs = _Runs(model, listener, autocast)
        packed = [runs.packed(row) for row in rows]
        # a number that is compared with a rate of 0 changes nothing
        drew = RandomState.now().differs(before) and bool(draws_by_module(base))
        adapter = listener.take_adapter_gradients()
        # a compiled layer would be compiled again for every length of a sequence
        with stock_attention(base), torch.compiler.set_stance("force_eager"):
            with CoarsestRounding() as rounding:
                one_by_one = [[runs.alone(row, response) for response in range(row.num_responses)] for row in rows]
            listener.rounding = rounding.eps
            adapter_alone = listener.take_adapter_gradients()
            noise = [
                (runs.again(row, response), once[response])
                for row, once in zip(rows, one_by_one, strict=True)
                for response in _first_responses(row)
            ]
        with torch.no_grad(), autocast():
            references = [] if reference is None else [reference(row) for row in rows]
    before.restore()

    def error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        return token_error(pairs, listener.rounding)

    alone = [_joined(runs_of_row) for runs_of_row in one_by_one]
    gradients = [
        (run.gradient[: row.num_tokens], _summed_by_token(other.gradient, row))
        for run, other, row in zip(packed, alone, rows, strict=True)
        if run.gradient is not None and other.gradient is not None
    ]
    return Proof(
        examples=sum(len(row.groups) for row in rows),
        sequences=sum(row.num_responses for row in rows),
        value_error=error((run.logps, other.logps) for run, other in zip(packed, alone, strict=True)),
        value_noise=error((again.logps, once.logps) for again, once in noise),
        gradient_error=error(gradients),
        gradient_noise=error(
            (again.gradient, once.gradient)
            for again, once in noise
            if once.gradient is not None and again.gradient is not None
        ),
        adapter_error=error([(adapter, adapter_alone)] if adapter.any() else []),
        reference_error=error((sums, run.sums(row)) for sums, run, row in zip(references, packed, rows, strict=False)),
        rounding=listener.rounding,
        drew_random_numbers=drew,
        seconds=time.perf_counter() - started,
    )


# --- what is run -----------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Log-probabilities of the tokens of responses, ``[M]`` float64, and gradients at the embeddings, ``[L, H]``."""

    logps: Tensor
    gradient: Tensor | None

    def sums(self, row: Row) -> Tensor:
        """Log-probabilities of whole responses, ``[R]``."""
        return self.logps.new_zeros(row.num_responses).index_add_(0, row.member_responses, self.logps)


@dataclass
class _Runs:
    """Runs rows and sequences, each with its own random weights on the log-probabilities as what is differentiated."""

    model: Any
    listener: _Listener
    autocast: Callable[[], AbstractContextManager[Any]]

    def packed(self, row: Row) -> _Run:
        with self.autocast():
            found = response_logps(self.model, row)
        require_finite(found.sums, row, where="before the first step")
        logps = member_values(found.targets, row)
        return self._run(logps, torch.cat([_direction(row, response) for response in range(row.num_responses)]))

    def alone(self, row: Row, response: int) -> _Run:
        """One sequence, as an ordinary trainer gives it to the model."""
        ids = row.input_ids[:, path_of(row, response)]
        return self._sequence({"input_ids": ids}, row, response)

    def again(self, row: Row, response: int) -> _Run:
        """The sequence beside another one in a padded batch, from embeddings that are rounded otherwise."""
        ids = row.input_ids[:, path_of(row, response)]
        with self.listener.rounding_otherwise():
            return self._sequence(beside_another(ids), row, response)

    def _sequence(self, inputs: dict[str, Tensor], row: Row, response: int) -> _Run:
        """Run inputs whose first sequence ends with the response."""
        ids, size = inputs["input_ids"][0], len(row.response_paths[response])
        predictors = torch.arange(len(ids) - size - 1, len(ids) - 1, device=ids.device)
        plan, labels = head_plan(self.model), ids[predictors + 1]
        with self.autocast():
            if plan.obstacle is None:
                values = head_logps(self.model, {**inputs, "use_cache": False}, predictors, labels, plan)
            else:
                values = logits_logps(self.model(**inputs, use_cache=False).logits[0, predictors], labels)
        run = self._run(values.logps.double(), _direction(row, response))
        return run if run.gradient is None else run._replace(gradient=run.gradient[: len(ids)])

    def _run(self, logps: Tensor, direction: Tensor) -> _Run:
        return _Run(logps.detach(), self.listener.gradient((logps * direction.to(logps)).sum()))


def _joined(runs: Sequence[_Run]) -> _Run:
    gradients = [run.gradient for run in runs if run.gradient is not None]
    return _Run(torch.cat([run.logps for run in runs]), torch.cat(gradients) if gradients else None)


def _first_responses(row: Row) -> list[int]:
    """The first response of every group."""
    counts = [len(group.response_ids) for group in row.groups]
    return [sum(counts[:number]) for number in range(len(counts))]


def _direction(row: Row, response: int) -> Tensor:
    """One random weight for every token of a response, ``[L]``: its gradient then says on what each one depends."""
    generator = torch.Generator().manual_seed(response)
    return torch.randn(len(row.response_paths[response]), generator=generator, dtype=torch.float64)


def _summed_by_token(gradient: Tensor, row: Row) -> Tensor:
    """Add the gradients of all copies of a token, ``[S, H]``."""
    paths = torch.cat([path_of(row, response) for response in range(row.num_responses)])
    return gradient.new_zeros(row.num_tokens, gradient.shape[-1]).index_add_(0, paths, gradient)


# --- what is listened to ---------------------------------------------------------------------------------------------


@dataclass
class _Listener:
    """Takes gradients at the embeddings and of an adapter; everything else learns nothing while it listens."""

    adapter: list[Tensor] = field(default_factory=list)
    embedded: list[Tensor] = field(default_factory=list)
    active: bool = True
    rounding: float = 0.0
    rounds_otherwise: bool = False

    @contextlib.contextmanager
    def rounding_otherwise(self) -> Iterator[None]:
        """Move every embedding by about its last bit, where another batch alone may happen to round alike."""
        self.rounds_otherwise = True
        try:
            yield
        finally:
            self.rounds_otherwise = False

    def capture(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        if self.rounds_otherwise:
            output = rounded_otherwise(output.detach(), self.rounding)
        if not (self.active and torch.is_grad_enabled()):
            return output
        # an adapter on the embedding itself needs its gradient too
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaf.retain_grad()
        self.embedded.append(leaf)
        # some models scale what they get in place, which a leaf does not allow
        return leaf.clone()

    def gradient(self, score: Tensor) -> Tensor | None:
        if not self.active:
            return None
        # not autograd.grad, which reentrant checkpoints do not know
        score.backward()
        found, self.embedded = self.embedded, []
        if len(found) != 1 or found[0].grad is None:
            return None
        return found[0].grad[0]

    def take_adapter_gradients(self) -> Tensor:
        """Gradients of all weights of the adapter since the last call, one after the other."""
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.adapter]
        for weight in self.adapter:
            weight.grad = None
        return torch.cat([each.flatten() for each in gradients]) if gradients else torch.zeros(0)


@contextlib.contextmanager
def _listening(model: nn.Module, with_gradients: bool) -> Iterator[_Listener]:
    """Freeze all but the embedding's output and a small adapter, and bring everything back at the end."""
    base: Any = base_model(model)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    is_adapter = hasattr(model, "peft_config") and sum(weight.numel() for weight in learning) <= _MOST_ADAPTER_WEIGHTS
    listener = _Listener(list(learning) if is_adapter else [], active=with_gradients)
    kept = [weight.grad for weight in learning]
    handle = base.get_input_embeddings().register_forward_hook(listener.capture)
    try:
        for weight in learning:
            weight.grad = None
            weight.requires_grad_(is_adapter and with_gradients)
        with torch.set_grad_enabled(with_gradients):
            yield listener
    finally:
        handle.remove()
        for weight, gradient in zip(learning, kept, strict=True):
            weight.requires_grad_(True)
            weight.grad = gradient
