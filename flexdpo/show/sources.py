"""What to draw: groups from a file of lengths, or from the built-in example."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from flexdpo.errors import FlexdpoError, found
from flexdpo.layout.groups import Group
from flexdpo.layout.sequences import is_count

# more could not be told apart in a picture, and would take minutes to draw
MOST_TOKENS = 200_000
_FORM = (
    'a list of groups such as {"prompt": 12, "responses": [5, 3]}; [4, [5, 3]] in place of a response is a beginning '
    "of 4 tokens that two responses share"
)


def read_lengths(path: str | Path) -> list[Group]:
    """Read a JSON file of lengths, and give every token an id of its own; ``FlexdpoError`` names what is wrong.

    The file holds a list of groups, or ``{"groups": [...]}``. A group is ``{"prompt": 12, "responses": [5, 3]}``, in
    tokens. In place of a response, ``[4, [5, 3]]`` is a run of 4 tokens that goes on in two ways, to any depth.
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
    groups, ids = [], count(1)
    for number, value in enumerate(data):
        place = f"{path}, group {number}"
        if not isinstance(value, dict) or not {"prompt", "responses"} == set(value):
            raise FlexdpoError(f"{place} (counted from 0): expected {_FORM}; found {found(value)}")
        lengths = value["responses"]
        if not isinstance(lengths, list) or not lengths:
            raise FlexdpoError(f"{place}, 'responses': expected a list of lengths, found {found(lengths)}")
        responses = [one for branch in lengths for one in _branches(branch, f"{place}, 'responses'", ids)]
        prompt = _run(value["prompt"], f"{place}, 'prompt'", ids)
        groups.append(_first_is_best(prompt, responses, f"group {number}"))
    return groups


def _first_is_best(prompt: Sequence[int], responses: Sequence[Sequence[int]], name: str) -> Group:
    return Group.from_lists(prompt, responses, [(0, k) for k in range(1, len(responses))], name)


def _branches(value: Any, place: str, ids: Iterator[int]) -> list[list[int]]:
    """The sequences below one node: a length, or a length and what follows it."""
    if not isinstance(value, list):
        return [_run(value, place, ids)]
    if len(value) != 2 or not isinstance(value[1], list) or not value[1]:
        raise FlexdpoError(f"{place}: expected a length or [length, [branches]], found {found(value)}")
    stem = _run(value[0], place, ids)
    return [stem + rest for branch in value[1] for rest in _branches(branch, place, ids)]


def _run(value: Any, place: str, ids: Iterator[int]) -> list[int]:
    if not is_count(value) or value > MOST_TOKENS:
        raise FlexdpoError(f"{place}: expected a number of tokens from 1 to {MOST_TOKENS:,}, found {found(value)}")
    return [next(ids) for _ in range(value)]


def example_groups(groups: int = 4, seed: int = 0) -> list[Group]:
    """Groups of the built-in example: code that leads up to a function, its own body, and a stranger's.

    The first has a third body, which begins like the one and goes on like the other: a trie of depth two.
    """
    from flexdpo.example.stdlib import read_standard_library
    from flexdpo.example.task import build_task

    first, *others = build_task(read_standard_library(progress=True), seed).train[:groups]
    half = len(first.chosen_ids) // 2
    mixed = first.chosen_ids[:half] + first.rejected_ids[half:]
    return [
        _first_is_best(first.prompt_ids, [first.chosen_ids, mixed, first.rejected_ids], first.name),
        *(_first_is_best(each.prompt_ids, [each.chosen_ids, each.rejected_ids], each.name) for each in others),
    ]
