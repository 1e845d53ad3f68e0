"""The proof at the start of a run: packed and shared equals one sequence at a time, on the run's own first examples.

Everything is as it will be trained: weights, dtype, adapters, train mode, checkpointing, autocast. The same sequences
run packed, as training lays them out, and unpacked through the model's stock attention: each alone, or a few short ones
in a padded batch; compared are their log-probabilities and the gradients that arrive at the embeddings (and at an
adapter's weights). What rounding alone may do is measured, not guessed: one sequence runs once more, in another batch;
where it does not explain an error, all of them do, rounded in several ways.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexdpo.errors import FlexdpoError
from flexdpo.hf.draws import RandomState, draws_by_module
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.row_dependence import limits_of
from flexdpo.hf.unwrap import base_model, unwrapped
from flexdpo.layout.groups import Group, require_groups
from flexdpo.layout.packing import pack
from flexdpo.layout.row import Row
from flexdpo.objective.logps import response_logps
from flexdpo.proof.allowance import UNLIMITED, Allowance, Plan, batches_of, planned
from flexdpo.proof.probe import NOISE_FACTOR, ROUNDINGS, path_of, stock_attention, summed_by_token
from flexdpo.proof.proof_runs import PackedRun, Run, Runs, listening
from flexdpo.proof.rounding import token_error

# log-probabilities of the responses of a row, [R]
ReferenceSums = Callable[["Row"], "Tensor"]

# half precision compares nine tokens in ten and its faults are no larger than a few roundings. The noise of all
# sequences is then as large as another kernel's error, so that less than in the probe is to be explained by it
_HALF_FACTOR, _HALF_ROUNDINGS = 3.0, 1.0
_SINGLE = torch.finfo(torch.float32).eps
# ways of rounding that are tried before a run is stopped, ever coarser: a router's ties break in some of them only
_WAYS = 6


@dataclass(frozen=True)
class Proof:
    """What was measured; errors and noise are relative to the largest value of their kind.

    Gradients are NaN where they were not taken (sharded models, no time), their noise where rounding explains all
    without it, the reference's error where it need not agree, its noise where it agrees without. ``noise_alone`` is
    that of rounding without another batch; it and ``adapter_noise`` are 0 where nobody asked. In half precision the
    figures of log-probabilities and gradients are those of nine in ten tokens.
    """

    examples: int
    sequences: int
    value_error: float
    value_noise: float
    gradient_error: float
    adapter_error: float
    rounding: float
    drew_random_numbers: bool
    gradient_noise: float = math.nan
    adapter_noise: float = 0.0
    reference_error: float = math.nan
    reference_noise: float = math.nan
    noise_alone: float = 0.0
    images: int = 0
    seconds: float = 0.0

    @property
    def _factor(self) -> float:
        return _HALF_FACTOR if self.rounding > _SINGLE else NOISE_FACTOR

    @property
    def value_budget(self) -> float:
        """What rounding alone may do to log-probabilities."""
        roundings = _HALF_ROUNDINGS if self.rounding > _SINGLE else ROUNDINGS
        return min(max(self._factor * self.value_noise, roundings * self.rounding), self._half_the_digits)

    @property
    def _half_the_digits(self) -> float:
        """Rounding spoils the last digits, never half of them."""
        return math.sqrt(self.rounding)

    @property
    def gradient_budget(self) -> float:
        """What it may do to gradients."""
        noise = 0.0 if math.isnan(self.gradient_noise) else self.gradient_noise
        # they add up over a prompt's responses, and single precision looks at the worst token
        roundings = ROUNDINGS if self.rounding > _SINGLE else 8 * ROUNDINGS
        return max(roundings * self.rounding, self._factor * max(self.value_noise, noise))

    @property
    def adapter_budget(self) -> float:
        """What it may do to gradients of the adapter, which add up over all tokens and may cancel."""
        return max(self.gradient_budget, self._factor * self.adapter_noise)

    @property
    def reference_budget(self) -> float:
        """What it may do to the sums of the reference."""
        if math.isnan(self.reference_noise):
            return self.value_budget
        return max(self._factor * self.reference_noise, ROUNDINGS * min(self.rounding, _SINGLE))

    @property
    def failures(self) -> list[str]:
        """What does not hold, with its figures; empty where everything does."""
        found = ["random numbers were drawn in the forward pass"] if self.drew_random_numbers else []
        # half of half precision's digits are few: there, rounding without another batch must be nearly as much
        most = self._half_the_digits
        if self.rounding > _SINGLE:
            most = min(most, max(ROUNDINGS * self.rounding, NOISE_FACTOR * self.noise_alone))
        if self.value_noise > most:
            found.append(
                f"unpacked log-probabilities depend on the batch: they move by {self.value_noise:.1e} in another one"
            )
        for what, error, budget in (
            ("packed log-probabilities", self.value_error, self.value_budget),
            ("packed gradients at the embeddings", self.gradient_error, self.gradient_budget),
            ("packed gradients of the adapter", self.adapter_error, self.adapter_budget),
            ("the reference's log-probabilities, which are the policy's before the first step,",
             self.reference_error, self.reference_budget),
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
        proved = f"proved on {self.examples} example{many}: {compared}, noise floor {noise:.0e} ({self.seconds:.1f} s)"
        if not self.images:
            return proved
        seen = f"{self.images} image{'s' * (self.images > 1)}"
        return f"{proved}; {seen} among them, gradients of the parts that see them were not compared"


@torch.inference_mode(False)  # gradients are compared
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
    over the shortest sequence again; more where that leaves an error unexplained. Weights, gradients and random states
    are left as they were.

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
    require_groups(groups)
    if not groups:
        raise FlexdpoError("prove needs at least one group, got none; two or more show that documents keep apart")
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
    proof = measure(model, [row.to(device) for row in rows], reference=reference, sharded=sharded, autocast=autocast)
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
    reference_runs_the_rows: bool = False,
    sharded: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    allowance: Allowance = UNLIMITED,
) -> Proof:
    """Measure what :func:`prove` judges, on rows that are on the model's device.

    Args:
        model: Prepared, wrapped or not; a sharded one is run through its wrapper.
        rows: As training packs them.
        reference: See :func:`prove`.
        reference_runs_the_rows: Whether it does now what the policy does, so that both agree bit for bit.
        sharded: Whether weights exist during their own passes only, which leaves out gradients; all processes measure.
        autocast: Entered around every forward pass.
        allowance: How many tokens may run.

    Raises:
        FlexdpoError: naming the example, where a log-probability is not finite to begin with.
    """
    started = time.perf_counter()
    base = base_model(model)
    limits = limits_of(base)
    plan = planned(rows, limits, allowance, gradients=not sharded)
    before = RandomState.now()
    with listening(model, plan.gradients) as listener:
        runs = Runs(model, limits, listener, autocast)
        packed = [runs.packed(row, responses) for row, responses in zip(rows, plan.responses, strict=True)]
        # a number that is compared with a rate of 0 changes nothing
        drew = RandomState.now().differs(before) and bool(draws_by_module(base))
        adapter = listener.take_adapter_gradients()
        # a compiled layer would be compiled again for every length of a sequence
        with stock_attention(base), torch.compiler.set_stance("force_eager"):
            unpacked = [runs.unpacked(row, responses) for row, responses in zip(rows, plan.responses, strict=True)]
            adapter_unpacked = listener.take_adapter_gradients()
            compared = _Compared(rows, plan, packed, unpacked, runs, adapter_unpacked)
            proof = Proof(
                examples=sum(len(row.groups) for row in rows),
                images=sum(len(row.layout.images.counts) for row in rows if row.layout.images is not None),
                sequences=sum(map(len, unpacked)),
                value_error=compared.value_error(),
                value_noise=compared.value_noise_of_one(),
                gradient_error=compared.gradient_error(),
                adapter_error=runs.error([(adapter, adapter_unpacked)] if adapter.any() else []),
                rounding=runs.rounding,
                drew_random_numbers=drew,
            )
            for seed in range(_WAYS):
                if not _anywhere(bool(proof.failures), base.device, sharded):
                    break
                proof = compared.with_noise_of_all(proof, seed)
    if reference is not None:
        with torch.no_grad(), autocast():
            proof = _with_reference(proof, model, rows, packed, reference, reference_runs_the_rows, sharded)
    before.restore()
    return replace(proof, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Compared:
    """The runs of a proof and what they differ by."""

    rows: Sequence[Row]
    plan: Plan
    packed: list[PackedRun]
    unpacked: list[dict[int, Run]]
    runs: Runs
    adapter: Tensor  # gradients of its weights, unpacked

    def value_error(self) -> float:
        return self.runs.error(
            (row.logps[response], run.logps)
            for row, others in zip(self.packed, self.unpacked, strict=True)
            for response, run in others.items()
        )

    def gradient_error(self) -> float:
        return self.runs.error(
            (run.gradient, _at_tokens(others, row))
            for run, others, row in zip(self.packed, self.unpacked, self.rows, strict=True)
            if run.gradient is not None
        )

    @torch.no_grad()
    def value_noise_of_one(self) -> float:
        """Of the shortest sequence."""
        sequences = [(n, batch, r) for n, batches in enumerate(self._batches()) for batch in batches for r in batch]
        number, batch, response = min(sequences, key=lambda each: len(path_of(self.rows[each[0]], each[2])))
        again = self.runs.again(self.rows[number], [[response]], beside=self.plan.beside and len(batch) == 1)
        return self.runs.error([(again[response].logps, self.unpacked[number][response].logps)])

    def with_noise_of_all(self, proof: Proof, seed: int) -> Proof:
        """The proof with the noise of every sequence, in other batches and of rounding alone, where it is larger."""
        values, gradients, alone = [], [], []
        for row, batches, once in zip(self.rows, self._batches(), self.unpacked, strict=True):
            again = self.runs.again(row, batches, beside=True, seed=seed)
            values += [(again[response].logps, run.logps) for response, run in once.items()]
            if any(run.gradient is not None for run in once.values()):
                gradients.append((_at_tokens(again, row), _at_tokens(once, row)))
            with torch.no_grad():
                for batch in batches:
                    rounded = again if len(batch) > 1 else self.runs.again(row, [batch], beside=False, seed=seed)
                    plain = {r: self.runs.unpacked(row, [r])[r] for r in batch} if len(batch) > 1 else once
                    alone += [(rounded[response].logps, plain[response].logps) for response in batch]
        again_adapter = self.runs.listener.take_adapter_gradients()
        adapter = self.runs.error([(again_adapter, self.adapter)]) if again_adapter.any() else 0.0
        # NaN stands for what was not compared, and max() keeps a first one
        noise = max(self.runs.error(gradients), -1.0 if math.isnan(proof.gradient_noise) else proof.gradient_noise)
        return replace(
            proof,
            value_noise=max(proof.value_noise, self.runs.error(values)),
            gradient_noise=noise,
            adapter_noise=max(proof.adapter_noise, adapter),
            noise_alone=max(proof.noise_alone, self.runs.error(alone)),
        )

    def _batches(self) -> list[list[list[int]]]:
        limits = self.runs.limits
        return [batches_of(row, each, limits) for row, each in zip(self.rows, self.plan.responses, strict=True)]


def _at_tokens(runs: dict[int, Run], row: Row) -> Tensor:
    return summed_by_token({response: run.gradient for response, run in runs.items()}, row)


def _with_reference(
    proof: Proof,
    model: nn.Module,
    rows: Sequence[Row],
    packed: Sequence[PackedRun],
    reference: ReferenceSums,
    runs_the_rows: bool,
    sharded: bool,
) -> Proof:
    """The proof with the reference's error; where it runs the rows as the policy does, rounding explains nothing."""
    sums = [reference(row) for row in rows]
    error = token_error((of, run.sums) for of, run in zip(sums, packed, strict=True))
    proof = replace(proof, reference_error=error)
    differs = error > replace(proof, reference_noise=0.0).reference_budget
    if not runs_the_rows or not _anywhere(differs, sums[0].device, sharded):
        return proof
    # without gradients other kernels may run
    likewise = [response_logps(model, row).sums for row in rows]
    return replace(
        proof,
        reference_error=token_error(zip(sums, likewise, strict=True)),
        reference_noise=token_error((of, run.sums) for of, run in zip(likewise, packed, strict=True)),
    )


def _anywhere(here: bool, device: torch.device, sharded: bool) -> bool:
    """Whether it is so in any of the processes that must run as many passes."""
    if not (sharded and torch.distributed.is_initialized()):
        return here
    flag = torch.tensor(int(here), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)
