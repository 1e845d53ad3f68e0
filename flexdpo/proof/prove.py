"""The proof at the start of a run: packed and shared equals one sequence at a time, on the run's own first examples.

Everything is as it will be trained: weights, dtype, adapters, train mode, checkpointing, autocast. The same sequences
run packed, as training lays them out, and unpacked through the model's stock attention: each alone, or a few short ones
in a padded batch; compared are their log-probabilities and the gradients that arrive at the embeddings (and at an
adapter's weights). What rounding alone may do is measured, not guessed: one sequence runs once more, in another batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from flexdpo.errors import FlexdpoError
from flexdpo.hf.draws import RandomState, draws_by_module
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.row_dependence import limits_of
from flexdpo.layout.packing import pack
from flexdpo.objective.linear_logps import logits_logps
from flexdpo.objective.lm_head import base_model, head_logps, head_plan, without_wrappers
from flexdpo.objective.logps import member_values, require_finite, response_logps
from flexdpo.proof.probe import (
    NOISE_FACTOR,
    ROUNDINGS,
    CoarsestRounding,
    beside_another,
    path_of,
    rounded_otherwise,
    stock_attention,
    summed_by_token,
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
# tokens of a padded batch that are worth one call of the model; more only where a packed row has as many
_SHORT_BATCH = 1024


@dataclass(frozen=True)
class Proof:
    """What was measured; errors and noise are relative to the largest value of their kind.

    Gradients are NaN where they could not be taken (sharded models), their noise where rounding explains all without
    it, the reference's error where it need not agree. In half precision each figure is that of nine in ten tokens.
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
    def value_budget(self) -> float:
        """What rounding alone may do to log-probabilities."""
        return max(NOISE_FACTOR * self.value_noise, ROUNDINGS * self.rounding)

    @property
    def gradient_budget(self) -> float:
        """What it may do to gradients."""
        return max(self.value_budget, 0.0 if math.isnan(self.gradient_noise) else NOISE_FACTOR * self.gradient_noise)

    @property
    def failures(self) -> list[str]:
        """What does not hold, with its figures; empty where everything does."""
        found = ["random numbers were drawn in the forward pass"] if self.drew_random_numbers else []
        # rounding spoils the last digits, never half of them
        if self.value_noise > math.sqrt(self.rounding):
            found.append(
                f"unpacked log-probabilities depend on the batch: they move by {self.value_noise:.1e} in another one"
            )
        for what, error, budget in (
            ("packed log-probabilities", self.value_error, self.value_budget),
            ("packed gradients at the embeddings", self.gradient_error, self.gradient_budget),
            ("packed gradients of the adapter", self.adapter_error, self.gradient_budget),
            ("the reference's log-probabilities, which are the policy's before the first step,",
             self.reference_error, self.value_budget),
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

    Costs a forward and a backward pass over the groups packed and over their sequences unpacked, and a forward pass
    over the shortest sequence again. Weights, gradients and random states are left as they were.

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
    prepare_model(without_wrappers(model))
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
            unpacked = [runs.unpacked(row) for row in rows]
            adapter_unpacked = listener.take_adapter_gradients()
            with torch.no_grad():
                again, once = runs.again(rows, unpacked)
            proof = Proof(
                examples=sum(len(row.groups) for row in rows),
                sequences=sum(row.num_responses for row in rows),
                value_error=runs.error(
                    (run.logps, torch.cat([other.logps for other in others]))
                    for run, others in zip(packed, unpacked, strict=True)
                ),
                value_noise=runs.error([(again.logps, once.logps)]),
                gradient_error=runs.error(
                    (run.gradient[0, : row.num_tokens], summed_by_token([other.gradient for other in others], row))
                    for run, others, row in zip(packed, unpacked, rows, strict=True)
                    if run.gradient is not None
                ),
                gradient_noise=math.nan,
                adapter_error=runs.error([(adapter, adapter_unpacked)] if adapter.any() else []),
                reference_error=math.nan,
                rounding=runs.rounding,
                drew_random_numbers=drew,
                seconds=0.0,
            )
            if max(proof.gradient_error, proof.adapter_error) > proof.gradient_budget:
                again, once = runs.again(rows, unpacked)
                proof = replace(proof, gradient_noise=runs.error([(again.gradient, once.gradient)]))
        with torch.no_grad(), autocast():
            references = [] if reference is None else [reference(row) for row in rows]
    before.restore()
    reference_error = runs.error(
        (sums, run.sums(row)) for sums, run, row in zip(references, packed, rows, strict=False)
    )
    return replace(proof, reference_error=reference_error, seconds=time.perf_counter() - started)


# --- what is run -----------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Log-probabilities of the tokens of responses, ``[M]`` float64; gradients at the embeddings, ``[..., L, H]``."""

    logps: Tensor
    gradient: Any

    def sums(self, row: Row) -> Tensor:
        """Log-probabilities of whole responses, ``[R]``."""
        return self.logps.new_zeros(row.num_responses).index_add_(0, row.member_responses, self.logps)


@dataclass
class _Runs:
    """Runs rows and sequences, each with its own random weights on the log-probabilities as what is differentiated."""

    model: Any
    listener: _Listener
    autocast: Callable[[], AbstractContextManager[Any]]
    rounding: float = 0.0

    def error(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        return token_error(pairs, self.rounding)

    def packed(self, row: Row) -> _Run:
        with self.autocast():
            found = response_logps(self.model, row)
        require_finite(found.sums, row, where="before the first step")
        return self._run(member_values(found.targets, row), row, range(row.num_responses))

    def unpacked(self, row: Row) -> list[_Run]:
        """Every sequence of a row, through batches that hold no more tokens than the row or few."""
        runs: list[Any] = [None] * row.num_responses
        for responses in self._batches(row):
            for response, run in zip(responses, self._batch(row, responses), strict=True):
                runs[response] = run
        return runs

    def again(self, rows: Sequence[Row], unpacked: Sequence[Sequence[_Run]]) -> tuple[_Run, _Run]:
        """The shortest sequence in another batch, from embeddings that are rounded otherwise; and as it was before."""
        runs = [
            (row, response, run) for row, each in zip(rows, unpacked, strict=True) for response, run in enumerate(each)
        ]
        row, response, once = min(runs, key=lambda run: len(path_of(*run[:2])))
        alone = [response] in self._batches(row)
        with self.listener.rounding_otherwise(self.rounding):
            (run,) = self._batch(row, [response], beside=alone)
        return run, once

    def _batch(self, row: Row, responses: Sequence[int], *, beside: bool = False) -> list[_Run]:
        """Run sequences as an ordinary trainer would; ``beside`` another one that is not looked at."""
        sequences = [row.input_ids[0, path_of(row, response)] for response in responses]
        inputs = {"input_ids": pad_sequence(sequences, batch_first=True)}
        if beside:
            inputs = beside_another(inputs["input_ids"])
        elif len(sequences) > 1:
            inputs["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
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
        return [_Run(*each) for each in zip(run.logps.split(sizes), gradients, strict=True)]

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

    def _run(self, logps: Tensor, row: Row, responses: Sequence[int]) -> _Run:
        direction = torch.cat([_direction(row, response) for response in responses])
        return _Run(logps.detach(), self.listener.gradient((logps * direction.to(logps)).sum()))


def _direction(row: Row, response: int) -> Tensor:
    """One random weight for every token of a response, ``[L]``: its gradient then says on what each one depends."""
    generator = torch.Generator().manual_seed(response)
    return torch.randn(len(row.response_paths[response]), generator=generator, dtype=torch.float64)


# --- what is listened to ---------------------------------------------------------------------------------------------


@dataclass
class _Listener:
    """Takes gradients at the embeddings and of an adapter; everything else learns nothing while it listens."""

    adapter: list[Tensor] = field(default_factory=list)
    embedded: list[Tensor] = field(default_factory=list)
    rounding: float = 0.0

    @contextlib.contextmanager
    def rounding_otherwise(self, rounding: float) -> Iterator[None]:
        """Move every embedding by about its last bit, where another batch alone may happen to round alike."""
        self.rounding = rounding
        try:
            yield
        finally:
            self.rounding = 0.0

    def capture(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
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
def _listening(model: nn.Module, with_gradients: bool) -> Iterator[_Listener]:
    """Freeze all but the embedding's output and a small adapter, and bring everything back at the end."""
    base: Any = base_model(model)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    some_frozen = len(learning) < len(list(model.parameters()))
    is_adapter = some_frozen and sum(weight.numel() for weight in learning) <= _MOST_ADAPTER_WEIGHTS
    listener = _Listener([*learning] if is_adapter else [])
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
