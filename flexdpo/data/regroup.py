"""Pairs with the same prompt, brought together into groups, so that each of their responses is run once."""

from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, Value

from flexdpo.data.cache import map_settings
from flexdpo.data.draft import IMAGES_COLUMN, LABELS_COLUMN, column_types
from flexdpo.errors import FlexdpoError, found
from flexdpo.layout.sequences import is_count

_COLUMNS = ["prompt_ids", "response_ids", "edges", "row"]


def regroup_by_prompt(dataset: Dataset, *, max_responses: int | None = None) -> Dataset:
    """Merge the rows of a tokenised dataset that have the same prompt into one group each.

    Equal responses become one, and every preference is kept, also one that occurs twice or contradicts another. The sum
    over preferences of any pairwise loss, and its gradient, are those of the separate rows. What changes is which
    preferences meet in an optimizer step: a batch counts groups, and a group brings all of its preferences along. Of a
    dataset larger than memory only row numbers and digests are held.

    Args:
        dataset: Of :func:`tokenize_preferences`, whose columns are kept.
        max_responses: Start another group for a prompt when one would have more distinct responses than this.

    Returns:
        A dataset in the order of each prompt's first row, ``row``, with all rows of each group in ``source_rows``.

    Raises:
        FlexdpoError: for missing columns, reference values that would no longer fit, or a row without two responses.
    """
    if not isinstance(dataset, Dataset):
        raise FlexdpoError(
            f"regrouping needs the dataset that tokenize_preferences returns (.dataset), got {found(dataset)}"
        )
    columns = dataset.column_names
    missing = [name for name in _COLUMNS if name not in columns]
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
    if max_responses is not None and (not is_count(max_responses) or max_responses < 2):
        raise FlexdpoError(f"max_responses must be at least 2, since a pair has two responses; got {max_responses!r}")
    dataset = dataset.with_format(None)
    pictured = [column for column in (IMAGES_COLUMN,) if column in columns]
    more = {"source_rows": [Value("int64")], **{column: dataset.features[column] for column in pictured}}
    return Dataset.from_dict({"members": _members(dataset, pictured, max_responses)}).map(
        _merge,
        batched=True,
        batch_size=256,
        fn_kwargs={"dataset": dataset.select_columns([*_COLUMNS, *pictured])},
        remove_columns=["members"],
        features=column_types(more),
        desc="Regrouping by prompt",
        **map_settings(dataset, ("regrouped", max_responses), "regrouped"),
    )


def _members(dataset: Dataset, pictured: list[str], max_responses: int | None) -> list[list[int]]:
    """The indices of the rows of each group, in the order of the groups' first rows."""
    groups: list[list[int]] = []
    responses: list[set[bytes]] = []
    open_group: dict[bytes, int] = {}
    columns = ["prompt_ids", *pictured, *(["response_ids"] if max_responses is not None else [])]
    for index, row in enumerate(dataset.select_columns(columns)):
        # equal tokens with another image are another prompt
        seen = "".join(image["digest"] for image in row.get(IMAGES_COLUMN, ())).encode()
        prompt, own = _digest(row["prompt_ids"]) + seen, {_digest(ids) for ids in row.get("response_ids", ())}
        number = open_group.get(prompt)
        if number is None or (max_responses is not None and len(responses[number] | own) > max_responses):
            number = open_group[prompt] = len(groups)
            groups.append([])
            responses.append(set())
        groups[number].append(index)
        responses[number] |= own
    return groups


def _digest(ids: list[int]) -> bytes:
    return blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def _merge(batch: dict[str, list[list[int]]], *, dataset: Dataset) -> dict[str, list[Any]]:
    """Read the rows of some groups and make one row of each group."""
    values = dataset[[index for members in batch["members"] for index in members]]
    examples = (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))
    groups = [_merged(list(islice(examples, len(members)))) for members in batch["members"]]
    return {column: [group[column] for group in groups] for column in groups[0]}


def _merged(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows with one prompt as one."""
    number_of: dict[tuple[int, ...], int] = {}
    edges = []
    for example in examples:
        numbers = [number_of.setdefault(tuple(response), len(number_of)) for response in example["response_ids"]]
        for chosen, rejected in example["edges"]:
            if numbers[chosen] == numbers[rejected]:
                raise FlexdpoError(
                    f"row {example['row']}: chosen and rejected are the same tokens; tokenize_preferences leaves such "
                    "rows out, so tokenise the dataset again or drop the row"
                )
            edges.append([numbers[chosen], numbers[rejected]])
    rows = [example["row"] for example in examples]
    return {**examples[0], "response_ids": [*map(list, number_of)], "edges": edges, "source_rows": rows}
