"""The groups of a micro-batch, laid out in packed rows with what is known of their reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from flexdpo.data.draft import IMAGES_COLUMN, LABELS_COLUMN, TOKENISED_COLUMNS
from flexdpo.data.tokenize import group_from_row
from flexdpo.errors import FlexdpoError, quoted
from flexdpo.layout.packing import SHARING, pack
from flexdpo.layout.row import idle_row
from flexdpo.layout.sequences import require_count
from flexdpo.objective.batch import BatchTotals, ReferenceLogps
from flexdpo.objective.unpaired import with_unrelated_responses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from accelerate import Accelerator
    from transformers import TrainingArguments

    from flexdpo.data.images import ImageReader
    from flexdpo.layout.groups import Group
    from flexdpo.layout.packing import Buckets
    from flexdpo.layout.row import Row

_Values: TypeAlias = "Sequence[Sequence[float]]"  # for each group, one value per response
_Pairs: TypeAlias = "Sequence[Sequence[Sequence[float]]]"  # and chosen and rejected value per preference
REFERENCE_COLUMN = "ref_response_logps"
REFERENCE_PAIR_COLUMN = "ref_pair_logps"
# what of a dataset is collated
COLUMNS = (*TOKENISED_COLUMNS, IMAGES_COLUMN, LABELS_COLUMN, REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN)


@dataclass(eq=False)
class PackedBatch:
    """The groups of one micro-batch, laid out in rows."""

    rows: list[Row]
    totals: BatchTotals  # denominators of the losses over the whole batch
    reference: list[ReferenceLogps] | None = None  # precomputed log-probabilities of each row
    idle_row: Row | None = None  # the smallest there is, for processes that run out of rows before the others do
    # groups and precomputed values, one per example, as :meth:`PackingCollator.packed` was given them
    examples: tuple[Sequence[Any] | None, ...] = ((), None, None)

    @property
    def tokens_run(self) -> int:
        """Distinct tokens that go through the model, padding not counted."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def tokens_unshared(self) -> int:
        """Tokens that an ordinary trainer would run for the same responses, padding not counted."""
        return sum(row.unshared_tokens for row in self.rows)

    @property
    def images_run(self) -> int:
        """Distinct images of each row, which are encoded once."""
        return sum(len(row.layout.images.counts) for row in self.rows if row.layout.images is not None)

    @property
    def images_unshared(self) -> int:
        """Images that an ordinary trainer would encode: each prompt's for each of its responses."""
        return sum(len(group.images) * len(group.response_ids) for row in self.rows for group in row.groups)

    def only(self, numbers: Sequence[int]) -> tuple[Any, ...]:
        """Some of the examples, as :meth:`PackingCollator.packed` takes them."""
        return tuple(part and [part[number] for number in numbers] for part in self.examples)

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
        idle = self.idle_row and change(self.idle_row)
        return replace(self, rows=[change(row) for row in self.rows], reference=reference, idle_row=idle)


@dataclass(frozen=True)
class PackingCollator:
    """Makes a :class:`PackedBatch` of tokenised rows, in a ``DataLoader``, by the settings of :func:`flexdpo.pack`."""

    max_tokens_per_row: int | None = None  # padding included; ``None`` puts a batch into one row
    pad_to_multiple_of: int = 1  # tokens; 128 is a tile of FlexAttention
    unrelated_responses: bool = False  # run other rows' responses behind every prompt too, as the ``kto`` loss needs
    buckets: Buckets | None = None  # the lengths that rows are padded to instead
    sharing: str = "group"
    with_idle_row: bool = False  # for processes that must run equal numbers of forward passes
    limits: tuple[int, ...] = ()
    images: ImageReader | None = None
    in_pieces: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens_per_row is not None:
            require_count("max_tokens_per_row", self.max_tokens_per_row)
        require_count("pad_to_multiple_of", self.pad_to_multiple_of)
        if self.sharing not in SHARING:
            raise FlexdpoError(f"sharing must be one of {SHARING}, got {self.sharing!r}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``{"example_rows": [B] int64, "batch": PackedBatch}``; the first names the dataset rows."""
        if not examples:
            raise FlexdpoError("a batch needs one tokenised row at least, got none")
        if missing := [column for column in TOKENISED_COLUMNS if column not in examples[0]]:
            raise FlexdpoError(
                f"a batch is made of tokenised rows, and these have no {quoted(missing)}; pass the data through "
                "tokenize_preferences first"
            )
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
        self, groups: Sequence[Group], reference: _Values | None = None, reference_pairs: _Pairs | None = None
    ) -> PackedBatch:
        """Pack groups, and bring precomputed values (per response, under ``ld_alpha`` also per pair) into row order."""
        names = ("pad_to_multiple_of", "buckets", "sharing", "limits", "in_pieces")
        rows = pack(groups, self.max_tokens_per_row, **{name: getattr(self, name) for name in names})
        # gradients are synchronised at the last row, where what encodes images should take part
        rows.sort(key=lambda row: row.layout.images is not None)
        values = None if reference is None else [_reference_of(row, reference, reference_pairs) for row in rows]
        idle = None
        if self.with_idle_row or any(row.pieces for row in rows):
            idle = idle_row(self.pad_to_multiple_of if self.buckets is None else self.buckets.lengths[0])
        return PackedBatch(rows, BatchTotals.of(groups), values, idle, (groups, reference, reference_pairs))


def _reference_of(row: Row, reference: _Values, pairs: _Pairs | None) -> ReferenceLogps:
    of_responses = [value for number in row.numbers for value in reference[number]]
    sums = torch.tensor(of_responses, dtype=torch.float64, device="cpu")
    if len(sums) != row.num_responses:
        raise FlexdpoError(
            f"{row.groups[0].name} and the groups beside it have {row.num_responses} responses but {len(sums)} "
            "precomputed reference log-probabilities; compute them again"
        )
    if pairs is None:
        return ReferenceLogps(sums)
    of_pairs = [list(values) for number in row.numbers for values in pairs[number]]
    return ReferenceLogps(sums, torch.tensor(of_pairs, dtype=torch.float64, device="cpu").reshape(-1, 2))


def distinct_examples(example_rows: torch.Tensor, args: TrainingArguments, accelerator: Accelerator) -> list[int]:
    """Which examples of an evaluation batch count: all but repeats that fill up the last batch of some ranks."""
    state, count = accelerator.gradient_state, len(example_rows)
    if (example_rows < 0).any():
        # a stream marks its repeats itself, for nobody knows its length
        return [number for number, row in enumerate(example_rows.tolist()) if row >= 0]
    if args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
        count = min(count, max(0, state.remainder - args.process_index * args.eval_batch_size))
    return list(range(count))
