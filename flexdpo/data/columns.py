"""Columns that nobody reads: named in the report, and an error where they hold a part of the prompt."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from flexdpo.errors import FlexdpoError, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# a column whose name has no other words is called like a prompt or a part of one: system_prompt, userInput, Question
_PROMPT_WORDS = frozenset({
    "article", "body", "context", "conversation", "conversations", "dialog", "dialogue", "document", "full", "history",
    "human", "input", "inputs", "instruction", "instructions", "message", "messages", "original", "passage", "persona",
    "post", "problem", "prompt", "prompts", "queries", "query", "question", "questions", "request", "statement",
    "system", "text", "title", "turns", "user",
})  # fmt: skip
# what comes before a prompt even where there is one
_BEFORE_A_PROMPT = frozenset({"system", "context", "history"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
# more rows without a prompt than this are no oversight: of a column, and of common beginnings
_MOST_EMPTY = {True: 0.5, False: 0.1}
# too few rows of a stream to judge by
FEWEST_ROWS = 64


def prompt_like(unread: Sequence[str], *, has_prompt: bool) -> tuple[str, ...]:
    """Those of the unread columns that are called like the prompt, or beside one like what comes before it."""
    words = {column: {word.lower() for word in _WORD.findall(column)} for column in unread}
    like = [column for column in unread if words[column] and words[column] <= _PROMPT_WORDS]
    return tuple(column for column in like if not has_prompt or words[column] & _BEFORE_A_PROMPT)


def require_nothing_lost(place: str, values: Mapping[str, Any], unread: Sequence[str], like: Sequence[str]) -> None:
    """Refuse a row with text in a column called like the prompt that stands in none of the columns that are read."""
    held = {column: list(_texts(values[column])) for column in like if values[column]}
    if not any(held.values()):
        return
    read = "\n".join(text for column in values if column not in unread for text in _texts(values[column]))
    lost = [column for column, texts in held.items() if any(text not in read for text in texts)]
    if not lost:
        return
    which = f"column{'s' if len(lost) > 1 else ''} {quoted(lost)}"
    if "prompt" in values:
        raise FlexdpoError(
            f"{place}: {which} would be lost: this belongs before the prompt and only 'prompt' is read; put its text "
            "into 'prompt' (with messages, as one of the role 'system' or as earlier turns), or drop it"
        )
    raise FlexdpoError(
        f"{place}: {which} would be lost: this looks like the prompt, and there is no column 'prompt'; rename it to "
        "'prompt' (dataset.rename_column), joining several into one, or drop it (dataset.remove_columns)"
    )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value that has a letter, without the names of fields and roles."""
    if isinstance(value, str):
        if any(character.isalpha() for character in value):
            yield value.strip()
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("role", "from"):
                yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def require_prompts(name: str, rows: int, without: int, *, has_prompt: bool, unread: Sequence[str]) -> None:
    """Refuse a dataset of which many rows have no prompt.

    Raises:
        FlexdpoError: with the counts, the columns that are not read and the way out.
    """
    if without <= _MOST_EMPTY[has_prompt] * rows:
        return
    why = "column 'prompt' is empty" if has_prompt else "there is no column 'prompt' and the responses begin otherwise"
    others = f" (not read: {quoted(unread)})" if unread else ""
    raise FlexdpoError(
        f"{name}: {without} of {rows} rows have an empty prompt: {why} there; give every row its prompt in a column "
        f"'prompt'{others}"
    )


def unread_note(unread: Sequence[str]) -> list[str]:
    """Name the columns that are not read, in a sentence, if there are any."""
    return [f"not read: {quoted(unread)}"] if unread else []
