"""One batch of groups, run as packed rows: forward, loss and backward of the unpacked step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.packing import pack_groups
from flexdpo.objective.logps import response_logps
from flexdpo.objective.losses import BatchTotals, Objective
from flexdpo.training.data import group_from_row

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row

ReferenceFn = Callable[["Row"], "Tensor"]
REFERENCE_COLUMN = "ref_response_logps"


@dataclass(eq=False)
class PackedBatch:
    """The groups of one micro-batch, laid out in rows.

    Attributes:
        rows: Packed rows; every group stands in exactly one of them.
        totals: Denominators of the losses over the whole batch.
        reference: Precomputed reference log-probabilities per response for each row, or ``None``.
        pair_examples: For each row, which example of the batch each of its pairs belongs to.
    """

    rows: list[Row]
    totals: BatchTotals
    reference: list[Tensor] | None = None
    pair_examples: list[list[int]] | None = None

    @classmethod
    def from_groups(
        cls,
        groups: Sequence[Group],
        *,
        max_tokens_per_row: int | None = None,
        pad_to_multiple_of: int = 1,
        reference: Sequence[Sequence[float]] | None = None,
    ) -> PackedBatch:
        """Pack groups, and bring their precomputed reference log-probabilities (one list per group) into row order."""
        rows = pack_groups(groups, max_tokens_per_row, pad_to_multiple_of=pad_to_multiple_of)
        values = None
        if reference is not None:
            of_group = {id(group): numbers for group, numbers in zip(groups, reference, strict=True)}
            values = [
                torch.tensor([x for group in row.groups for x in of_group[id(group)]], dtype=torch.float64)
                for row in rows
            ]
            for row, value in zip(rows, values, strict=True):
                if len(value) != row.num_responses:
                    raise FlexdpoError(
                        f"{row.groups[0].name} and the groups beside it have {row.num_responses} responses but "
                        f"{len(value)} precomputed reference log-probabilities; compute them again"
                    )
        number_of = {id(group): number for number, group in enumerate(groups)}
        pair_examples = [[number_of[id(group)] for group in row.groups for _ in group.edges] for row in rows]
        return cls(rows, BatchTotals.of(groups), values, pair_examples)

    @property
    def tokens_run(self) -> int:
        """Distinct tokens that go through the model, padding not counted."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def tokens_unshared(self) -> int:
        """Tokens that an ordinary trainer would run for the same responses, padding not counted."""
        return sum(row.unshared_tokens for row in self.rows)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch with all tensors on ``device``."""
        reference = None
        if self.reference is not None:
            reference = [value.to(device, non_blocking=non_blocking) for value in self.reference]
        rows = [row.to(device, non_blocking) for row in self.rows]
        return replace(self, rows=rows, reference=reference)

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory."""
        reference = None if self.reference is None else [value.pin_memory() for value in self.reference]
        return replace(self, rows=[row.pin_memory() for row in self.rows], reference=reference)


@dataclass(frozen=True)
class PackingCollator:
    """Turns tokenised dataset rows into a :class:`PackedBatch`, for a ``torch.utils.data.DataLoader``.

    Attributes:
        max_tokens_per_row: Longest row in tokens, padding included; ``None`` puts a batch into one row.
        pad_to_multiple_of: Rows are padded to a multiple of this many tokens; 128 is a tile of FlexAttention.
    """

    max_tokens_per_row: int | None = None
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``{"example_rows": [B] int64, "batch": PackedBatch}``; the first names the dataset rows."""
        groups = [group_from_row(example) for example in examples]
        reference = None
        if REFERENCE_COLUMN in examples[0]:
            reference = [example[REFERENCE_COLUMN] for example in examples]
        batch = PackedBatch.from_groups(
            groups,
            max_tokens_per_row=self.max_tokens_per_row,
            pad_to_multiple_of=self.pad_to_multiple_of,
            reference=reference,
        )
        return {"example_rows": torch.tensor([int(example["row"]) for example in examples]), "batch": batch}


@dataclass(eq=False)
class BatchLoss:
    """The loss of a batch and what is logged of it.

    Attributes:
        loss: Detached scalar, the unpacked batch's loss.
        metrics: Values of all rows by name, one per pair.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def run_batch(
    model: nn.Module,
    batch: PackedBatch,
    objective: Objective,
    *,
    reference: ReferenceFn | None = None,
    backward: Callable[[Tensor], None] | None = None,
    no_sync: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> BatchLoss:
    """Run the rows of a batch one after another; their losses and gradients add up to the unpacked batch's.

    Args:
        model: A prepared causal LM, wrapped or not.
        batch: On the model's device.
        objective: The losses.
        reference: Gives the reference log-probability of each response of a row, ``[R]``, without gradients; not called
            where the batch brings precomputed ones.
        backward: Called with each row's share of the loss, so that one row's activations are freed before the next;
            ``None`` computes values only.
        no_sync: Entered around every backward but the last, to keep gradient synchronisation for the end.
        autocast: Entered around the forward passes.
    """
    losses, metrics = [], []
    for number, row in enumerate(batch.rows):
        last = number == len(batch.rows) - 1
        with contextlib.nullcontext() if last or backward is None else no_sync():
            with autocast():
                sums = _reference_sums(batch, number, objective, reference)
                policy = response_logps(model, row)
            result = objective.row_loss(policy, sums, row, batch.totals)
            if backward is not None:
                backward(result.loss)
        losses.append(result.loss.detach())
        metrics.append(result.metrics)
    names = metrics[0].keys()
    return BatchLoss(torch.stack(losses).sum(), {name: torch.cat([m[name] for m in metrics]) for name in names})


def _reference_sums(
    batch: PackedBatch, number: int, objective: Objective, reference: ReferenceFn | None
) -> Tensor | None:
    if batch.reference is not None:
        return batch.reference[number]
    if not objective.needs_reference:
        return None
    if reference is None:
        raise FlexdpoError(f"loss_type {', '.join(objective.loss_type)} needs a reference model or precomputed values")
    with torch.no_grad():
        return reference(batch.rows[number])
