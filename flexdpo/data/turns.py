"""Conversations that begin alike as a tree of turns, and a preference at every turn where it parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from flexdpo.data.messages import as_messages
from flexdpo.errors import FlexdpoError, first_line, found, quoted

if TYPE_CHECKING:
    from datasets import Dataset

    Message = dict[str, Any]

logger = logging.get_logger(__name__)
_MADE = ("prompt", "chosen", "rejected", "row")


def step_preferences(dataset: Any, *, conversations: str = "conversations", scores: str = "scores") -> Dataset:
    """Make step-level preferences of rows that hold conversations of one task, and scores of them.

    Turns that several conversations begin with are one. Wherever the assistant went on differently from there, each of
    its turns is preferred to those that are worth less: a turn is worth the mean score of the conversations it is part
    of, or, where ``scores`` holds a list for each conversation, the mean of the scores that it was given itself, one
    for each turn of the assistant. Turns of the user and of tools are read and never learned.

    The histories share their tokens in training with ``sharing="step"``, at any depth, and siblings theirs once
    :func:`flexdpo.regroup_by_prompt` has made them one group. Pairs of one row follow each other.

    Args:
        dataset: Rows with both columns, as a ``Dataset`` or a list of dicts.
        conversations: The column of lists of ``messages``.
        scores: The column of numbers, or lists of numbers.

    Returns:
        ``prompt``, ``chosen`` and ``rejected`` as messages, and ``row``, the row that each came from, with that row's
        other columns (``tools``); of those called like one of these four a warning tells that they are replaced.

    Raises:
        FlexdpoError: naming the row, if a column is missing, scores do not fit the conversations or nothing is
            preferred in any row.
    """
    if isinstance(dataset, Mapping | str) or not hasattr(dataset, "__iter__"):
        raise FlexdpoError(f"expected a Dataset or a list of rows with {conversations!r}, got {found(dataset)}")
    made: list[dict[str, Any]] = []
    for row, values in enumerate(dataset):
        place = f"row {row}"
        for column in (conversations, scores):
            if not isinstance(values, Mapping) or column not in values:
                shown = f"columns {quoted(values)}" if isinstance(values, Mapping) else found(values)
                raise FlexdpoError(f"{place}: no column {column!r}, found {shown}")
        paths = _paths(values, place, conversations, scores)
        others = {column: value for column, value in values.items() if column not in (conversations, scores)}
        made += [{**others, **pair, "row": row} for pair in _pairs(paths, 0)]
        if replaced := [column for column in _MADE if column in others]:
            logger.warning_once(
                f"step_preferences makes the columns {quoted(_MADE)}, so {quoted(replaced)} of the data are replaced; "
                "rename them to keep them"
            )
    if not made:
        raise FlexdpoError("no turn is preferred to another: no conversations of a row part at turns of other scores")
    return _as_dataset(made, getattr(dataset, "features", None) or {})


def _as_dataset(rows: list[dict[str, Any]], types: Mapping[str, Any]) -> Dataset:
    """The rows with all their columns; ``types`` are those of the columns that were given, where they are known."""
    from datasets import Dataset, Features, concatenate_datasets
    from pyarrow import ArrowException

    # Dataset.from_list takes the columns of the first row and drops those that only others have
    columns = []
    for name in dict.fromkeys((*_MADE, *(column for row in rows for column in row))):
        features = Features({name: types[name]}) if name in types and name not in _MADE else None
        try:
            columns.append(Dataset.from_dict({name: [row.get(name) for row in rows]}, features=features))
        except (ArrowException, TypeError, OverflowError) as error:
            raise FlexdpoError(
                f"column {name!r} of the rows has values of more than one type ({first_line(error)}); give them one, "
                "or leave the column out"
            ) from error
    return concatenate_datasets(columns, axis=1)


class _Path:
    """One conversation, with the worth of each of its turns."""

    def __init__(self, messages: list[Message], worth: Sequence[float]) -> None:
        self.messages, self.worth = messages, worth
        self.names = [json.dumps(message, sort_keys=True) for message in messages]


def _paths(values: Any, place: str, conversations: str, scores: str) -> list[_Path]:
    given, numbers = values[conversations], values[scores]
    if not (isinstance(given, list) and isinstance(numbers, list) and len(given) == len(numbers)):
        raise FlexdpoError(
            f"{place}: expected a list of conversations in {conversations!r} and a score for each in {scores!r}, found "
            f"{found(given)} and {found(numbers)}"
        )
    paths = []
    for number, (value, score) in enumerate(zip(given, numbers, strict=True)):
        messages = as_messages(value, place, f"{conversations}[{number}]")
        if not isinstance(messages, list) or not messages:
            raise FlexdpoError(f"{place}, column {conversations!r}: expected messages, found {found(value)}")
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        worth = score if isinstance(score, list) else [score] * len(turns)
        if len(worth) != len(turns) or not all(isinstance(each, int | float) and math.isfinite(each) for each in worth):
            raise FlexdpoError(
                f"{place}, column {scores!r}: conversation {number} has {len(turns)} turns of the assistant; give it "
                f"one score, or one for each of these turns, found {found(score)}"
            )
        of_turn = dict(zip(turns, map(float, worth), strict=True))
        paths.append(_Path(messages, [of_turn.get(n, 0.0) for n in range(len(messages))]))
    return paths


def _pairs(paths: list[_Path], depth: int) -> Iterator[dict[str, list[Message]]]:
    """The preferences among conversations that are the same before message ``depth``, depth first."""
    branches: dict[str, list[_Path]] = {}
    for path in paths:
        if depth < len(path.messages):
            branches.setdefault(path.names[depth], []).append(path)
    answers = [branch for branch in branches.values() if branch[0].messages[depth]["role"] == "assistant"]
    for better, worse in permutations(answers, 2):
        if fmean(path.worth[depth] for path in better) > fmean(path.worth[depth] for path in worse):
            turns = {"chosen": better[0].messages[depth], "rejected": worse[0].messages[depth]}
            yield {"prompt": paths[0].messages[:depth], **{name: [turn] for name, turn in turns.items()}}
    for branch in branches.values():
        yield from _pairs(branch, depth + 1)
