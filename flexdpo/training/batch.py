"""The groups of a micro-batch, laid out in packed rows with what is known of their reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.data.tokenize import group_from_row
from flexdpo.errors import FlexdpoError
from flexdpo.layout.packing import pack_numbered
from flexdpo.layout.row import idle_row
from flexdpo.objective.batch import BatchTotals, ReferenceLogps
from flexdpo.objective.unpaired import with_unrelated_responses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flexdpo.layout.groups import Group
    from flexdpo.layout.packing import Buckets
    from flexdpo.layout.row import Row

REFERENCE_COLUMN = "ref_response_logps"
REFERENCE_PAIR_COLUMN = "ref_pair_logps"


@dataclass(eq=False)
class PackedBatch:
    """The groups of one micro-batch, laid out in rows.

    Attributes:
        totals: Denominators of the losses over the whole batch.
        reference: Precomputed reference log-probabilities for each row, or ``None``.
        members: For each row, which example of the batch each of its groups is.
        idle_row: The smallest row there is, for processes that run out of rows before the others do.
    """

    rows: list[Row]
    totals: BatchTotals
    reference: list[ReferenceLogps] | None = None
    members: list[list[int]] | None = None
    idle_row: Row | None = None

    @classmethod
    def from_groups(
        cls,
        groups: Sequence[Group],
        *,
        reference: Sequence[Sequence[float]] | None = None,
        reference_pairs: Sequence[Sequence[Sequence[float]]] | None = None,
        **layout: Any,
    ) -> PackedBatch:
        """Pack groups, and bring their precomputed reference log-probabilities into row order.

        Args:
            groups: The examples of the batch.
            reference: For each group, one value per response.
            reference_pairs: For each group, chosen and rejected value per preference; only under ``ld_alpha``.
            layout: The fields of :class:`PackingCollator`.
        """
        return PackingCollator(**layout).packed(groups, reference, reference_pairs)

    @property
    def tokens_run(self) -> int:
        """Distinct tokens that go through the model, padding not counted."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def tokens_unshared(self) -> int:
        """Tokens that an ordinary trainer would run for the same responses, padding not counted."""
        return sum(row.unshared_tokens for row in self.rows)

    def only(
        self, kept: Sequence[bool]
    ) -> tuple[list[Group], list[list[float]] | None, list[list[list[float]]] | None]:
        """The groups of some examples and their precomputed values, as :meth:`from_groups` takes them.

        Args:
            kept: For each example of the batch, whether to keep it.
        """
        groups: dict[int, Group] = {}
        values: dict[int, list[float]] = {}
        pairs: dict[int, list[list[float]]] = {}
        for place, row in enumerate(self.rows):
            numbers = (self.members or ())[place]
            groups |= dict(zip(numbers, row.groups, strict=True))
            if self.reference is not None:
                sums, of_pairs = self.reference[place]
                counts = [len(group.response_ids) for group in row.groups]
                values |= {n: part.tolist() for n, part in zip(numbers, sums.split(counts), strict=True)}
                if of_pairs is not None:
                    edges = [len(group.edges) for group in row.groups]
                    pairs |= {n: part.tolist() for n, part in zip(numbers, of_pairs.split(edges), strict=True)}
        order = [number for number in sorted(groups) if kept[number]]
        return (
            [groups[number] for number in order],
            [values[number] for number in order] if values else None,
            [pairs[number] for number in order] if pairs else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch with all tensors on ``device``."""
        if self.rows[0].input_ids.device == torch.device(device):
            return self
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> PackedBatch:
        reference = self.reference and [
            ReferenceLogps(change(sums), None if pairs is None else change(pairs)) for sums, pairs in self.reference
        ]
        idle = None if self.idle_row is None else change(self.idle_row)
        return replace(self, rows=[change(row) for row in self.rows], reference=reference, idle_row=idle)


def _reference_of(
    row: Row,
    members: Sequence[int],
    reference: Sequence[Sequence[float]],
    pairs: Sequence[Sequence[Sequence[float]]] | None,
) -> ReferenceLogps:
    sums = torch.tensor([value for number in members for value in reference[number]], dtype=torch.float64)
    if len(sums) != row.num_responses:
        raise FlexdpoError(
            f"{row.groups[0].name} and the groups beside it have {row.num_responses} responses but {len(sums)} "
            "precomputed reference log-probabilities; compute them again"
        )
    if pairs is None:
        return ReferenceLogps(sums)
    of_pairs = [list(values) for number in members for values in pairs[number]]
    return ReferenceLogps(sums, torch.tensor(of_pairs, dtype=torch.float64).reshape(-1, 2))


@dataclass(frozen=True)
class PackingCollator:
    """Turns tokenised dataset rows into a :class:`PackedBatch`, for a ``torch.utils.data.DataLoader``.

    Attributes:
        max_tokens_per_row: Longest row in tokens, padding included; ``None`` puts a batch into one row.
        pad_to_multiple_of: Rows are padded to a multiple of this many tokens; 128 is a tile of FlexAttention.
        unrelated_responses: Run other rows' responses behind every prompt too, as the ``kto`` loss needs.
        buckets: Rows are padded to these few lengths instead, as :func:`~flexdpo.layout.packing.choose_buckets` gives.
        sharing: ``"group"`` or ``"step"``, see :func:`flexdpo.pack`.
        with_idle_row: For processes that must run equal numbers of forward passes.
        limits: As in :func:`flexdpo.pack`.
    """

    max_tokens_per_row: int | None = None
    pad_to_multiple_of: int = 1
    unrelated_responses: bool = False
    buckets: Buckets | None = None
    sharing: str = "group"
    with_idle_row: bool = False
    limits: tuple[int, ...] = ()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``{"example_rows": [B] int64, "batch": PackedBatch}``; the first names the dataset rows."""
        groups: Sequence[Group] = [group_from_row(example) for example in examples]
        if self.unrelated_responses:
            groups = with_unrelated_responses(groups)
        reference, pairs = (
            [example[column] for example in examples] if column in examples[0] else None
            for column in (REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN)
        )
        batch = self.packed(groups, reference, pairs)
        return {"example_rows": torch.tensor([int(example["row"]) for example in examples]), "batch": batch}

    def packed(
        self,
        groups: Sequence[Group],
        reference: Sequence[Sequence[float]] | None = None,
        reference_pairs: Sequence[Sequence[Sequence[float]]] | None = None,
    ) -> PackedBatch:
        """Pack groups by these settings; the arguments are those of :meth:`PackedBatch.from_groups`."""
        packed = pack_numbered(
            groups,
            self.max_tokens_per_row,
            pad_to_multiple_of=self.pad_to_multiple_of,
            buckets=self.buckets,
            sharing=self.sharing,
            limits=self.limits,
        )
        rows, members = [row for row, _ in packed], [numbers for _, numbers in packed]
        values = None
        if reference is not None:
            values = [_reference_of(row, m, reference, reference_pairs) for row, m in zip(rows, members, strict=True)]
        idle = None
        if self.with_idle_row:
            idle = idle_row(self.pad_to_multiple_of if self.buckets is None else self.buckets.lengths[0])
        return PackedBatch(rows, BatchTotals.of(groups), values, members, idle)
