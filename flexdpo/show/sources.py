"""What to draw: groups from a file of lengths, from the first rows of a dataset, or from the built-in example."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexdpo.data.tokenize import group_from_row, tokenize_preferences
from flexdpo.errors import FlexdpoError, found
from flexdpo.layout.groups import Group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from flexdpo.data.report import DataReport

# more could not be told apart in a picture, and would take minutes to draw
MOST_TOKENS = 200_000
_FORM = (
    'a list of groups such as {"prompt": 12, "responses": [5, 3]}; [4, [5, 3]] in place of a response is a beginning '
    "of 4 tokens that two responses share"
)


def read_lengths(path: str | Path) -> list[Group]:
    """Read a JSON file of lengths, and give every token an id of its own.

    The file holds a list of groups, or ``{"groups": [...]}``. A group is ``{"prompt": 12, "responses": [5, 3]}``, in
    tokens. In place of a response, ``[4, [5, 3]]`` is a run of 4 tokens that goes on in two ways, to any depth.

    Raises:
        FlexdpoError: if the file is missing, no JSON, or says something else; the message names the place.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlexdpoError(f"--lengths {path}: {error.strerror}; name a JSON file") from error
    except UnicodeDecodeError as error:
        raise FlexdpoError(f"--lengths {path}: not UTF-8 text; save it as such") from error
    except json.JSONDecodeError as error:
        raise FlexdpoError(
            f"--lengths {path}, line {error.lineno}: not valid JSON ({error.msg}); mend it there"
        ) from error
    except RecursionError as error:
        raise FlexdpoError(f"--lengths {path} is nested too deeply; give {_FORM}") from error
    if isinstance(data, dict) and set(data) == {"groups"}:
        data = data["groups"]
    if not isinstance(data, list) or not data:
        raise FlexdpoError(f"--lengths {path}: expected {_FORM}; found {found(data)}")
    ids = count(1)
    return [_group(value, f"{path}, group {number}", number, ids) for number, value in enumerate(data)]


def _group(value: Any, place: str, number: int, ids: Iterator[int]) -> Group:
    if not isinstance(value, dict) or not {"prompt", "responses"} == set(value):
        raise FlexdpoError(f"{place} (counted from 0): expected {_FORM}; found {found(value)}")
    if not isinstance(value["responses"], list) or not value["responses"]:
        raise FlexdpoError(f"{place}, 'responses': expected a list of lengths, found {found(value['responses'])}")
    responses = [one for branch in value["responses"] for one in _branches(branch, f"{place}, 'responses'", ids)]
    prompt = _run(value["prompt"], f"{place}, 'prompt'", ids)
    edges = [(0, k) for k in range(1, len(responses))]
    return Group.from_lists(prompt, responses, edges, name=f"group {number}")


def _branches(value: Any, place: str, ids: Iterator[int]) -> list[list[int]]:
    """The sequences below one node: a length, or a length and what follows it."""
    if not isinstance(value, list):
        return [_run(value, place, ids)]
    if len(value) != 2 or not isinstance(value[1], list) or not value[1]:
        raise FlexdpoError(f"{place}: expected a length or [length, [branches]], found {found(value)}")
    stem = _run(value[0], place, ids)
    return [stem + rest for branch in value[1] for rest in _branches(branch, place, ids)]


def _run(value: Any, place: str, ids: Iterator[int]) -> list[int]:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
        raise FlexdpoError(f"{place}: expected a number of tokens from 1 to {MOST_TOKENS:,}, found {found(value)}")
    return [next(ids) for _ in range(value)]


def groups_of_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, first: int = 0, groups: int = 4
) -> tuple[list[Group], DataReport]:
    """Tokenise a few rows of a dataset, from row ``first`` on, as training would, and report on them.

    Raises:
        FlexdpoError: if there is no such row, or none of them can be used.
    """
    if not 0 <= first < len(dataset):
        raise FlexdpoError(f"--first {first}: the dataset has the rows 0 to {len(dataset) - 1}")
    if groups < 1:
        raise FlexdpoError(f"--groups must be at least 1, got {groups}")
    some = dataset.select(range(first, min(first + groups, len(dataset))))
    data = tokenize_preferences(some, tokenizer, max_length=max_length, name="data")
    return [group_from_row(row) for row in data.dataset], data.report


def example_groups(groups: int = 4, seed: int = 0) -> list[Group]:
    """Groups of the built-in example: code that leads up to a function, its own body, and a stranger's.

    The first group has a third body, which begins like the function's own and goes on like the stranger's: a trie of
    depth two.
    """
    from flexdpo.example.stdlib import read_standard_library
    from flexdpo.example.task import build_task

    if groups < 1:
        raise FlexdpoError(f"--groups must be at least 1, got {groups}")
    pairs = build_task(read_standard_library(progress=True), seed).train[:groups]
    found = []
    for number, pair in enumerate(pairs):
        responses = [pair.chosen_ids, pair.rejected_ids]
        if number == 0:
            half = len(pair.chosen_ids) // 2
            responses.insert(1, pair.chosen_ids[:half] + pair.rejected_ids[half:])
        edges = [(0, k) for k in range(1, len(responses))]
        found.append(Group.from_lists(pair.prompt_ids, responses, edges, name=pair.name))
    return found
