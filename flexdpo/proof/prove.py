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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from flexdpo.errors import FlexdpoError
from flexdpo.hf.draws import RandomState, draws_by_module
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.row_dependence import limits_of
from flexdpo.hf.unwrap import base_model, unwrapped
from flexdpo.layout.packing import pack
from flexdpo.proof.probe import NOISE_FACTOR, ROUNDINGS, stock_attention, summed_by_token
from flexdpo.proof.proof_runs import Runs, listening

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row

# log-probabilities of the responses of a row, [R]
ReferenceSums = Callable[["Row"], "Tensor"]


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
    prepare_model(unwrapped(model))
    device = next(model.parameters()).device
    rows = pack(
        groups,
        max_tokens_per_row,
        pad_to_multiple_of=pad_to_multiple_of,
        sharing=sharing,
        limits=limits_of(base_model(model)).limits,
    )
    # spread weights are whole during their own passes only
    sharded = any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())
    proof = measure(
        model, [row.to(device) for row in rows], reference=reference, with_gradients=not sharded, autocast=autocast
    )
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
    with listening(model, with_gradients) as listener:
        runs = Runs(model, listener, autocast)
        packed = [runs.packed(row) for row in rows]
        # a number that is compared with a rate of 0 changes nothing
        drew = RandomState.now().differs(before) and bool(draws_by_module(base))
        adapter = listener.take_adapter_gradients()
        # a compiled layer would be compiled again for every length of a sequence
        with stock_attention(base), torch.compiler.set_stance("force_eager"):
            unpacked = [runs.unpacked(row) for row in rows]
            adapter_unpacked = listener.take_adapter_gradients()
            with torch.no_grad():
                again = runs.again(rows, unpacked)
            proof = Proof(
                examples=sum(len(row.groups) for row in rows),
                sequences=sum(row.num_responses for row in rows),
                value_error=runs.error(
                    (run.logps, torch.cat([other.logps for other in others]))
                    for run, others in zip(packed, unpacked, strict=True)
                ),
                value_noise=runs.error((run.logps, once.logps) for run, once in again),
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
            # the shortest sequence alone says too little of gradients, which add up over a prompt
            if max(proof.gradient_error, proof.adapter_error) > proof.gradient_budget:
                again = runs.again(rows, unpacked, every=True)
                gradients = [(run.gradient, once.gradient) for run, once in again if run.gradient is not None]
                proof = replace(proof, gradient_noise=runs.error(gradients))
        with torch.no_grad(), autocast():
            references = [] if reference is None else [reference(row) for row in rows]
    before.restore()
    reference_error = runs.error(
        (sums, run.sums(row)) for sums, run, row in zip(references, packed, rows, strict=False)
    )
    return replace(proof, reference_error=reference_error, seconds=time.perf_counter() - started)
