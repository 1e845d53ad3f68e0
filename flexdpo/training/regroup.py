"""Pairs with the same prompt, brought together into groups, so that each of their responses is run once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE_ROWS = "source_rows"


@dataclass
class _Gathered:
    """What rows with one prompt add up to."""

    prompt_ids: list[int]
    number_of: dict[tuple[int, ...], int] = field(default_factory=dict)
    edges: list[tuple[int, int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def new_responses(self, example: Mapping[str, Any]) -> int:
        return len({tuple(response) for response in example["response_ids"]} - self.number_of.keys())

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
    brings all of its preferences along.

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
    from datasets import Dataset, Features, List, Value

    _check(dataset.column_names, max_responses)
    groups: list[_Gathered] = []
    open_group: dict[tuple[int, ...], _Gathered] = {}
    for example in dataset:
        prompt = tuple(example["prompt_ids"])
        group = open_group.get(prompt)
        full = (
            group is not None
            and max_responses is not None
            and (len(group.number_of) + group.new_responses(example) > max_responses)
        )
        if group is None or full:
            group = open_group[prompt] = _Gathered(list(prompt))
            groups.append(group)
        group.add(example)

    def rows() -> Iterator[dict[str, Any]]:
        return (group.as_row() for group in groups)

    number = Value("int64")
    features = Features(
        {
            "prompt_ids": List(number),
            "response_ids": List(List(number)),
            "edges": List(List(number)),
            "row": number,
            SOURCE_ROWS: List(number),
        }
    )
    return Dataset.from_list(list(rows()), features=features)


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
    if max_responses is not None and max_responses < 2:
        raise FlexdpoError(f"max_responses must be at least 2, since a pair has two responses; got {max_responses}")
