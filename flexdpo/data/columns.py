"""Columns that nobody reads: named in the report, and an error where they hold a part of the prompt."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexdpo.data.draft import Settings
from flexdpo.errors import FlexdpoError, nearest, quoted

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


def prompt_like(unread: Sequence[str], *, has_prompt: bool) -> tuple[str, ...]:
    """Those of the unread columns that are called like the prompt, or beside one like what comes before it."""
    words = {column: {word.lower() for word in _WORD.findall(column)} for column in unread}
    like = [column for column in unread if words[column] and words[column] <= _PROMPT_WORDS]
    return tuple(column for column in like if not has_prompt or words[column] & _BEFORE_A_PROMPT)


def require_nothing_lost(place: str, values: Mapping[str, Any], settings: Settings) -> None:
    """Refuse a row with text in a column called like the prompt that stands in none of the columns that are read."""
    held = {column: list(_texts(values[column])) for column in settings.prompt_like if values[column]}
    if not any(held.values()):
        return
    read = "\n".join(text for column in values if column not in settings.unread for text in _texts(values[column]))
    lost = [column for column, texts in held.items() if any(text not in read for text in texts)]
    if not lost:
        return
    which = f"column{'s' if len(lost) > 1 else ''} {quoted(lost)}"
    if settings.prompt:
        raise FlexdpoError(
            f"{place}: {which} would be lost: this belongs before the prompt and only {quoted(settings.prompt)} is "
            "read; put its text there (with messages, as one of the role 'system' or as earlier turns), or drop it"
        )
    raise FlexdpoError(
        f"{place}: {which} would be lost: this looks like the prompt, and there is no column 'prompt'; say which "
        f"column is, as in columns={{'prompt': {lost[0]!r}}} (--columns prompt={lost[0]}), joining several into one, "
        "or drop it (dataset.remove_columns)"
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


def renamed(dataset: Any, columns: Mapping[str, str], name: str) -> Any:
    """Give columns of a dataset or a stream the names by which they are read; ``{"prompt": "question"}`` reads that.

    A column that had such a name before keeps its values under another one, which is not read.

    Raises:
        FlexdpoError: for a column that is not there.
    """
    known = dataset.column_names
    if known is None:  # a stream that nobody looked into
        known = list(next(iter(dataset), {}))
    for source in columns.values():
        if source not in known:
            raise FlexdpoError(f"{name}: no column {source!r}; found {quoted(known)}{nearest(source, known)}")
    if len(set(columns.values())) < len(columns):
        raise FlexdpoError(f"{name}: columns={dict(columns)} read one column twice; name another for each")
    aside = {
        target: f"{target} (as stored)" for target in columns if target in known and target not in columns.values()
    }
    # in two steps, since a stream cannot take a name that another column gives up
    between = {source: f"{source} (renamed)" for source in columns.values()}
    return dataset.rename_columns({**aside, **between}).rename_columns(
        {between[source]: target for target, source in columns.items()}
    )


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Read ``prompt=question,chosen=response_j``, or the same as JSON, as YAML files give it."""
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        try:
            pairs = list(json.loads(text).items())
        except json.JSONDecodeError as error:
            raise FlexdpoError(
                f"--columns {text}: not valid JSON ({error.msg}); or prompt=question,chosen=a"
            ) from error
    else:
        pairs = [part.split("=", 1) for part in text.split(",")]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(part, str) and part.strip() for part in pair):
            raise FlexdpoError(f"--columns {text}: expected pairs such as prompt=question,chosen=response_j")
    return {target.strip(): source.strip() for target, source in pairs}
