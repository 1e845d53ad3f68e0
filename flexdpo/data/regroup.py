"""Pairs with the same prompt, brought together into groups, so that each of their responses is run once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.data.cache import map_settings
from flexdpo.data.draft import IMAGES_COLUMN, LABELS_COLUMN
from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE_ROWS = "source_rows"
_MEMBERS = "members"


@dataclass
class _Gathered:
    """What rows with one prompt add up to."""

    prompt_ids: list[int]
    images: list[dict[str, Any]] | None = None
    number_of: dict[tuple[int, ...], int] = field(default_factory=dict)
    edges: list[tuple[int, int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, example: Mapping[str, Any]) -> None:
        numbers = [self.number_of.setdefault(tuple(r), len(self.number_of)) for r in example["response_ids"]]
        for chosen, rejected in example["edges"]:
            if numbers[chosen] == numbers[rejected]:
                raise FlexdpoError(
                    f"row {example['row']}: chosen and rejected are the same tokens; tokenize_preferences leaves such "
                    "rows out, so tokenise the dataset again or drop the row"
                )
            self.edges.append((numbers[chosen], numbers[rejected]))
        self.rows.append(int(example["row"]))

    def as_row(self) -> dict[str, Any]:
        return {
            **({} if self.images is None else {IMAGES_COLUMN: self.images}),
            "prompt_ids": self.prompt_ids,
            "response_ids": [list(response) for response in self.number_of],
            "edges": [list(edge) for edge in self.edges],
            "row": self.rows[0],
            SOURCE_ROWS: self.rows,
        }


def regroup_by_prompt(dataset: Dataset, *, max_responses: int | None = None) -> Dataset:
    """Merge the rows of a tokenised dataset that have the same prompt into one group each.

    Equal responses become one, and every preference is kept: one that occurs twice counts twice, and two that
    contradict each other both stay. The sum over preferences of any pairwise loss, and its gradient, are those of the
    separate rows. What changes is which preferences meet in an optimizer step: a batch counts groups, and a group
    brings all of its preferences along. The result is written to the cache; of a dataset larger than memory only row
    numbers and digests are held.

    Args:
        dataset: With the columns ``prompt_ids``, ``response_ids``, ``edges`` and ``row``.
        max_responses: Start another group for a prompt when one would have more distinct responses than this; a row
            that has more by itself stays whole.

    Returns:
        A dataset in the order of each prompt's first row, with the same columns and ``source_rows``, the rows that each
        group was made of; ``row`` is the first of them. Columns other than these are dropped.

    Raises:
        FlexdpoError: if columns are missing, precomputed reference values would no longer fit, ``max_responses`` is
            below 2, or a row prefers a response to itself.
    """
    from datasets import Dataset, Features, Value

    _check(dataset.column_names, max_responses)
    dataset = dataset.with_format(None)
    ids, number = Value("int32"), Value("int64")
    features = {
        "prompt_ids": [ids],
        "response_ids": [[ids]],
        "edges": [[ids]],
        "row": number,
        SOURCE_ROWS: [number],
        **{column: dataset.features[column] for column in (IMAGES_COLUMN,) if column in dataset.column_names},
    }
    return Dataset.from_dict({_MEMBERS: _members(dataset, max_responses)}).map(
        _merge,
        batched=True,
        batch_size=256,
        fn_kwargs={"dataset": dataset},
        remove_columns=[_MEMBERS],
        features=Features(features),
        desc="Regrouping by prompt",
        **map_settings(dataset, ("regrouped", max_responses), "regrouped"),
    )


def _members(dataset: Dataset, max_responses: int | None) -> list[list[int]]:
    """The indices of the rows of each group, in the order of the groups' first rows."""
    groups: list[list[int]] = []
    responses: list[set[bytes]] = []
    open_group: dict[bytes, int] = {}
    for index, (prompt, own) in enumerate(_digests(dataset, with_responses=max_responses is not None)):
        number = open_group.get(prompt)
        if number is None or (max_responses is not None and len(responses[number] | own) > max_responses):
            number = open_group[prompt] = len(groups)
            groups.append([])
            responses.append(set())
        groups[number].append(index)
        responses[number] |= own
    return groups


def _digests(dataset: Dataset, *, with_responses: bool) -> Iterator[tuple[bytes, set[bytes]]]:
    """Stand-ins for each row's prompt and, where asked for, its distinct responses."""
    columns = ["prompt_ids", "response_ids"] if with_responses else ["prompt_ids"]
    columns += [IMAGES_COLUMN] if IMAGES_COLUMN in dataset.column_names else []
    nothing: list[Any] = [()] * 1024
    for batch in dataset.select_columns(columns).iter(batch_size=1024):
        rows = zip(
            batch["prompt_ids"], batch.get("response_ids", nothing), batch.get(IMAGES_COLUMN, nothing), strict=False
        )
        for prompt, own, images in rows:
            # equal tokens with another image are another prompt
            pictured = "".join(image["digest"] for image in images).encode()
            yield _digest(prompt) + pictured, {_digest(response) for response in own}


def _digest(ids: list[int]) -> bytes:
    return blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def _merge(batch: dict[str, list[list[int]]], *, dataset: Dataset) -> dict[str, list[Any]]:
    """Read the rows of some groups and make one row of each group."""
    columns = ["prompt_ids", "response_ids", "edges", "row"]
    columns += [IMAGES_COLUMN] if IMAGES_COLUMN in dataset.column_names else []
    values = dataset.select_columns(columns)[[index for members in batch[_MEMBERS] for index in members]]
    examples = (dict(zip(columns, row, strict=True)) for row in zip(*(values[c] for c in columns), strict=True))
    merged: dict[str, list[Any]] = {column: [] for column in (*columns, SOURCE_ROWS)}
    for members in batch[_MEMBERS]:
        group: _Gathered | None = None
        for _ in members:
            example = next(examples)
            group = group or _Gathered(example["prompt_ids"], example.get(IMAGES_COLUMN))
            group.add(example)
        assert group is not None
        for column, value in group.as_row().items():
            merged[column].append(value)
    return merged


def _check(columns: list[str], max_responses: int | None) -> None:
    missing = [name for name in ("prompt_ids", "response_ids", "edges", "row") if name not in columns]
    if missing:
        raise FlexdpoError(
            f"regrouping needs a tokenised dataset; column {missing[0]!r} is missing among {', '.join(columns)}; pass "
            "the data through tokenize_preferences first"
        )
    reference = [name for name in columns if name.startswith("ref_")]
    if reference:
        raise FlexdpoError(
            f"column {reference[0]!r} holds reference values of the rows as they are; regroup before precomputing them"
        )
    if LABELS_COLUMN in columns:
        raise FlexdpoError(
            f"column {LABELS_COLUMN!r} holds a label for each response, and equal responses may be labelled otherwise "
            "in another row; leave regroup_prompts out"
        )
    if max_responses is not None and max_responses < 2:
        raise FlexdpoError(f"max_responses must be at least 2, since a pair has two responses; got {max_responses}")
