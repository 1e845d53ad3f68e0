"""The forms that preferences come in, each read into a draft; rows are counted from 0, as ``dataset[row]`` does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flexdpo.data.columns import require_nothing_lost
from flexdpo.errors import FlexdpoError, found, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


TOKENISED_COLUMNS = ("prompt_ids", "response_ids", "edges", "row")
EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
IDENTICAL = "identical responses"
PROMPT_FILLS = "prompt alone fills max_length"
IDENTICAL_CUT = "identical responses once cut to max_length"
SKIP_REASONS = (EMPTY_PROMPT, EMPTY_RESPONSE, IDENTICAL, PROMPT_FILLS, IDENTICAL_CUT)
# raise it when the same row gives other tokens than before: `datasets` caches by settings, not by this file's code
_REVISION = 2


@dataclass(frozen=True)
class Settings:
    """All that decides, beside the tokenizer, what a row becomes; part of the cache's key.

    Attributes:
        form: One of ``READERS``.
        largest_id: Of the tokenizer, for rows of token ids.
        unread: Columns that the form does not read.
        prompt_like: Those of them that must hold no text of their own.
    """

    form: str
    max_length: int | None
    largest_id: int | None = None
    unread: tuple[str, ...] = ()
    prompt_like: tuple[str, ...] = ()
    revision: int = _REVISION


@dataclass
class Draft:
    """One row on its way from text to token ids."""

    row: int
    prompt: Any = None
    responses: list[Any] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    is_chat: bool = False
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[list[int]] = field(default_factory=list)
    edges: list[list[int]] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    skip: str = ""
    cut: int = 0
    whole: int = 0
    extracted: bool = False
    repeated: bool = False
    retokenised: bool = False
    untold: bool = False
    promptless: bool = False
    ties: int = 0
    longest: int = 0

    @property
    def place(self) -> str:
        """How errors call this row."""
        return f"row {self.row} (counted from 0)"


# `_cut` of `_responses` were cut to max_length; `_whole` tokens had the longest, its prompt included, before that
STATUS_COLUMNS = (
    "_skip", "_responses", "_cut", "_whole", "_extracted", "_repeated", "_retokenised", "_untold", "_promptless",
    "_ties", "_longest",
)  # fmt: skip
# what happened to rows that are used all the same
NOTES = {
    "_extracted": "prompt taken from the common beginning of chosen and rejected",
    "_repeated": "prompt taken off the beginning of responses that repeat its messages",
    "_untold": "tools and chat_template_kwargs left out, since text goes through no chat template,",
    "_promptless": "empty prompt, before which the tokenizer puts a token of its own,",
    "_retokenised": "prompt end re-tokenised, because it renders or merges otherwise before a response,",
    "_ties": "preferences between identical responses left out",
}


def _read_labelled(row: int, values: Mapping[str, Any], settings: Settings) -> Draft:
    draft = _read_texts(row, values, settings)
    if not isinstance(values["label"], bool):
        raise FlexdpoError(f"{draft.place}, column 'label': expected true or false, found {found(values['label'])}")
    draft.labels = [values["label"]]
    return draft


def _read_texts(row: int, values: Mapping[str, Any], settings: Settings) -> Draft:
    """Check the types of a row of text or messages, and find its prompt."""
    columns = ("chosen", "rejected") if settings.form == PAIR_FORM else ("completion",)
    draft = Draft(row, values.get("prompt"), [values[column] for column in columns])
    if len(columns) == 2:
        draft.edges = [[0, 1]]
    if settings.prompt_like:
        require_nothing_lost(draft.place, values, settings.unread, settings.prompt_like)
    prompt_is_chat = "prompt" in values and _is_chat(draft, draft.prompt, "prompt")
    chats = [_is_chat(draft, value, column) for value, column in zip(draft.responses, columns, strict=True)]
    if any(_says_nothing(value) for value in draft.responses):
        draft.skip = EMPTY_RESPONSE
        return draft
    if draft.prompt == []:
        draft.skip = EMPTY_PROMPT
        return draft
    draft.is_chat = chats[0]
    if len(set(chats)) > 1 or (prompt_is_chat and not draft.is_chat):
        raise FlexdpoError(
            f"{draft.place}: {quoted(c for c in values if c in ('prompt', *columns))} mix text and lists of messages; "
            "use one of the two in a row"
        )
    # a text prompt beside whole conversations repeats what they begin with, so they are what counts
    implicit = "prompt" not in values or (draft.is_chat and not prompt_is_chat and draft.prompt is not None)
    if implicit and len(columns) < 2:
        raise FlexdpoError(
            f"{draft.place}: 'prompt' is text but 'completion' is a list of messages; use one of the two"
        )
    if implicit:
        draft.extracted = True
        draft.prompt, *draft.responses = _split_common_beginning(*draft.responses)
    if draft.prompt is None or draft.prompt == []:
        draft.skip = EMPTY_PROMPT
    elif draft.is_chat:
        _settle_messages(draft, values)
    else:
        draft.promptless = not draft.prompt
        draft.untold = any(values.get(column) for column in TEMPLATE_COLUMNS)
    return draft


def _settle_messages(draft: Draft, values: Mapping[str, Any]) -> None:
    """Take out what a response repeats of the prompt and what Arrow has put in, and read the template's variables."""
    draft.prompt, *draft.responses = ([_without_nulls(m) for m in part] for part in (draft.prompt, *draft.responses))
    size = len(draft.prompt)
    repeats = [len(response) > size and response[:size] == draft.prompt for response in draft.responses]
    if any(repeats) and not all(repeats):
        raise FlexdpoError(
            f"{draft.place}: response {repeats.index(True)} (counted from 0) repeats the messages of the prompt and "
            f"response {repeats.index(False)} does not; let all responses begin behind the prompt, or none"
        )
    if repeats[0]:
        draft.repeated = True
        draft.responses = [response[size:] for response in draft.responses]
    draft.template_kwargs = _template_kwargs(values, draft.place)


def _without_nulls(value: Any) -> Any:
    """A message or a tool without the fields that are null: Arrow gives every row the fields of all others."""
    if isinstance(value, dict):
        # a message that only calls tools has a content, which is null
        return {key: _without_nulls(part) for key, part in value.items() if part is not None or key == "content"}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _is_chat(draft: Draft, value: object, column: str) -> bool:
    """Whether a value is a list of messages; raises unless it is that, text, or missing."""
    if value is None or isinstance(value, str):
        return False
    if not isinstance(value, list):
        raise FlexdpoError(
            f"{draft.place}, column {column!r}: expected text or a list of messages, found {found(value)}"
        )
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            why = f"found {found(message)}"
        elif not isinstance(message.get("role"), str):
            why = f"its 'role' is {found(message.get('role'))}"
        elif not isinstance(message.get("content"), (str, list, type(None))):
            why = f"its 'content' is {found(message['content'])}"
        else:
            continue
        raise FlexdpoError(
            f"{draft.place}, column {column!r}, message {number}: expected {{'role': 'user', 'content': 'text'}}, {why}"
        )
    return True


def _says_nothing(response: Any) -> bool:
    """Whether a response is missing, or text or messages without any content: the end token alone is no answer."""
    if isinstance(response, list):
        return not any(value for message in response for key, value in message.items() if key != "role")
    return not response


def _split_common_beginning(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two texts or conversations into what both begin with, and each one's rest, as TRL does.

    The rest is never empty: where one is the beginning of the other, the prompt ends one character (message) earlier.
    A space before the difference belongs to the rest.
    """
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if same == min(len(chosen), len(rejected)) or (same and chosen[same - 1] == " "):
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


def _template_kwargs(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FlexdpoError(f"{place}, column 'tools': not valid JSON ({error})") from error
    else:
        tools = _without_nulls(tools)
    more = values.get("chat_template_kwargs") or {}
    for column, value, kind in (("tools", tools, list), ("chat_template_kwargs", more, dict)):
        if value is not None and not isinstance(value, kind):
            raise FlexdpoError(f"{place}, column {column!r}: expected a {kind.__name__}, found {found(value)}")
    for name in more:
        if not isinstance(name, str) or name in _NOT_FOR_THE_TEMPLATE:
            raise FlexdpoError(
                f"{place}, column 'chat_template_kwargs': {name!r} is no variable of a chat template; leave it out"
            )
    return {"tools": tools, **more}


# arguments of apply_chat_template that decide what comes back, which is not the data's to say
_NOT_FOR_THE_TEMPLATE = (
    "conversation",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


def _read_pair_ids(row: int, values: Mapping[str, Any], settings: Settings) -> Draft:
    draft = Draft(row, edges=[[0, 1]])
    ids = [_token_ids(values[c], draft.place, c, settings.largest_id) for c in TRL_ID_FORM.split()]
    draft.prompt_ids, draft.response_ids = ids[0], ids[1:]
    return draft


def _read_own(row: int, values: Mapping[str, Any], settings: Settings) -> Draft:
    # a dataset that went through here before keeps the row numbers of its source
    own = values.get("row")
    draft = Draft(own if isinstance(own, int) and 0 <= own < 2**63 else row)
    draft.prompt_ids = _token_ids(values["prompt_ids"], draft.place, "prompt_ids", settings.largest_id)
    responses, edges = (_as_lists(values[column]) or [] for column in ("response_ids", "edges"))
    for column, value in (("response_ids", responses), ("edges", edges)):
        if not isinstance(value, list):
            raise FlexdpoError(f"{draft.place}, column {column!r}: expected a list of lists, found {found(value)}")
    draft.response_ids = [_token_ids(ids, draft.place, "response_ids", settings.largest_id) for ids in responses]
    if not responses:
        draft.skip = EMPTY_RESPONSE
        return draft
    for edge in edges:
        known = isinstance(edge, list) and len(edge) == 2 and all(_is_index(end, len(responses)) for end in edge)
        if not known or edge[0] == edge[1]:
            raise FlexdpoError(
                f"{draft.place}, column 'edges': {edge} must name two different responses among 0 to "
                f"{len(responses) - 1}"
            )
    draft.edges = edges
    return draft


def _as_lists(value: Any) -> Any:
    """Arrays, of which a stream may be made, as lists."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _is_index(value: object, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size


def _token_ids(value: Any, place: str, column: str, largest_id: int | None) -> list[int]:
    """Check a list of token ids; ``None`` is an empty one."""
    if value is None:
        return []
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of unequal length inside
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise FlexdpoError(f"{place}, column {column!r}: expected a list of token ids, found {found(value)}")
    if ids.size and not 0 <= ids.min() <= ids.max() <= (largest_id or 0):
        raise FlexdpoError(
            f"{place}, column {column!r}: token ids reach from {ids.min()} to {ids.max()}, the tokenizer's from 0 to "
            f"{largest_id}; was the dataset tokenised with another tokenizer?"
        )
    return value if isinstance(value, list) else cast("list[int]", ids.tolist())


# read beside text or messages of any form
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
OWN_FORM = "prompt_ids response_ids edges"
PAIR_FORM = "chosen rejected"
LABELLED_FORM = "prompt completion label"
# beside the other columns, only for responses that are labelled one by one
LABELS_COLUMN = "labels"
TRL_ID_FORM = "prompt_ids chosen_ids rejected_ids"
ID_FORMS = (OWN_FORM, TRL_ID_FORM)
# in order of preference: a dataset that was tokenised in place still has its text beside the ids
READERS: dict[str, Callable[[int, Mapping[str, Any], Settings], Draft]] = {
    OWN_FORM: _read_own,
    TRL_ID_FORM: _read_pair_ids,
    PAIR_FORM: _read_texts,
    LABELLED_FORM: _read_labelled,
    "prompt completion": _read_texts,
}
