"""One dataset row on its way from text or messages to token ids; rows are counted from 0, as ``dataset[row]`` does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flexdpo.data.columns import require_nothing_lost
from flexdpo.errors import FlexdpoError, first_line, found, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

TOKENISED_COLUMNS = ("prompt_ids", "response_ids", "edges", "row")
EMPTY_PROMPT = "empty prompt"
_EMPTY_RESPONSE = "empty response"
_IDENTICAL = "identical responses"
_PROMPT_FILLS = "prompt alone fills max_length"
_IDENTICAL_CUT = "identical responses once cut to max_length"
SKIP_REASONS = (EMPTY_PROMPT, _EMPTY_RESPONSE, _IDENTICAL, _PROMPT_FILLS, _IDENTICAL_CUT)
# raise it when the same row gives other tokens than before: `datasets` caches by settings, not by this file's code
_REVISION = 2


@dataclass(frozen=True)
class Settings:
    """All that decides, beside the tokenizer, what a row becomes; part of the cache's key.

    Attributes:
        form: One of ``READERS``.
        max_length: Most tokens of prompt and response.
        largest_id: Of the tokenizer, for rows of token ids.
        unread: Columns that the form does not read.
        prompt_like: Those of them that must hold no text of their own.
        revision: Of this file's code.
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


def note_of(column: str, rows: int, first: int) -> str:
    """Say what a status column counts, in how many rows, and where first."""
    return f"{NOTES[column]} in {rows} rows, first at row {first}"


def tokenize_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> dict[str, list[Any]]:
    """Tokenise a batch of rows; a row that cannot be used comes out empty, with the reason's number."""
    drafts = []
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        drafts.append(READERS[settings.form](index, dict(zip(batch, values, strict=True)), settings))
    if settings.form not in ID_FORMS:
        _tokenize_text([draft for draft in drafts if not draft.skip and not draft.is_chat], tokenizer)
        _tokenize_chats([draft for draft in drafts if not draft.skip and draft.is_chat], tokenizer)
    for draft in drafts:
        _settle(draft, settings.max_length)
    usable = [not draft.skip for draft in drafts]
    return {
        "prompt_ids": [draft.prompt_ids if used else [] for draft, used in zip(drafts, usable, strict=True)],
        "response_ids": [draft.response_ids if used else [] for draft, used in zip(drafts, usable, strict=True)],
        "edges": [draft.edges if used else [] for draft, used in zip(drafts, usable, strict=True)],
        "row": [draft.row for draft in drafts],
        **({LABELS_COLUMN: [draft.labels for draft in drafts]} if settings.form == LABELLED_FORM else {}),
        "_skip": [SKIP_REASONS.index(draft.skip) + 1 if draft.skip else 0 for draft in drafts],
        "_responses": [len(draft.response_ids) for draft in drafts],
        "_cut": [draft.cut for draft in drafts],
        "_whole": [draft.whole for draft in drafts],
        "_extracted": [int(draft.extracted) for draft in drafts],
        "_repeated": [int(draft.repeated) for draft in drafts],
        "_untold": [int(draft.untold) for draft in drafts],
        "_promptless": [int(draft.promptless) for draft in drafts],
        "_retokenised": [int(draft.retokenised) for draft in drafts],
        "_ties": [draft.ties for draft in drafts],
        "_longest": [draft.longest for draft in drafts],
    }


def _settle(draft: Draft, max_length: int | None) -> None:
    """Cut the responses to ``max_length`` and say why a row cannot be used, if so."""
    if draft.skip:
        return
    compared = bool(draft.edges)
    draft.whole = len(draft.prompt_ids) + max(map(len, draft.response_ids), default=0)
    if not draft.prompt_ids:
        draft.skip = EMPTY_PROMPT
    elif not draft.response_ids or not all(draft.response_ids):
        draft.skip = _EMPTY_RESPONSE
    elif _drop_ties(draft) and compared and not draft.edges:
        draft.skip = _IDENTICAL
    elif max_length is not None and len(draft.prompt_ids) >= max_length:
        draft.skip = _PROMPT_FILLS
    elif max_length is not None:
        room = max_length - len(draft.prompt_ids)
        draft.cut = sum(len(ids) > room for ids in draft.response_ids)
        draft.response_ids = [ids[:room] for ids in draft.response_ids]
        if _drop_ties(draft) and compared and not draft.edges:
            draft.skip = _IDENTICAL_CUT
    draft.longest = len(draft.prompt_ids) + max(map(len, draft.response_ids), default=0)


def _drop_ties(draft: Draft) -> int:
    """Take out preferences between equal responses, which have no gradient; return how many went."""
    edges = [edge for edge in draft.edges if draft.response_ids[edge[0]] != draft.response_ids[edge[1]]]
    dropped = len(draft.edges) - len(edges)
    draft.edges = edges
    draft.ties += dropped
    return dropped


def _read_pair(row: int, values: Mapping[str, Any], settings: Settings) -> Draft:
    return _read_texts(row, values, settings, ("chosen", "rejected"), [[0, 1]])


def _read_completion(row: int, values: Mapping[str, Any], settings: Settings) -> Draft:
    return _read_texts(row, values, settings, ("completion",), [])


def _read_labelled(row: int, values: Mapping[str, Any], settings: Settings) -> Draft:
    draft = _read_completion(row, values, settings)
    if not isinstance(values["label"], bool):
        raise FlexdpoError(f"{draft.place}, column 'label': expected true or false, found {found(values['label'])}")
    draft.labels = [values["label"]]
    return draft


def _read_texts(
    row: int, values: Mapping[str, Any], settings: Settings, columns: tuple[str, ...], edges: list[list[int]]
) -> Draft:
    """Check the types of a row of text or messages, and find its prompt."""
    draft = Draft(row, values.get("prompt"), [values[column] for column in columns], edges=edges)
    require_nothing_lost(draft.place, values, settings.unread, settings.prompt_like)
    prompt_is_chat = "prompt" in values and _is_chat(draft.prompt, draft.place, "prompt")
    chats = [_is_chat(value, draft.place, column) for value, column in zip(draft.responses, columns, strict=True)]
    if any(_says_nothing(value) for value in draft.responses):
        draft.skip = _EMPTY_RESPONSE
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


def _is_chat(value: object, place: str, column: str) -> bool:
    """Whether a value is a list of messages; raises unless it is that, text, or missing."""
    if value is None or isinstance(value, str):
        return False
    if not isinstance(value, list):
        raise FlexdpoError(f"{place}, column {column!r}: expected text or a list of messages, found {found(value)}")
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
            f"{place}, column {column!r}, message {number}: expected {{'role': 'user', 'content': 'text'}}, {why}"
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
        draft.skip = _EMPTY_RESPONSE
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
LABELLED_FORM = "prompt completion label"
# beside the other columns, only for responses that are labelled one by one
LABELS_COLUMN = "labels"
TRL_ID_FORM = "prompt_ids chosen_ids rejected_ids"
ID_FORMS = (OWN_FORM, TRL_ID_FORM)
# in order of preference: a dataset that was tokenised in place still has its text beside the ids
READERS: dict[str, Callable[[int, Mapping[str, Any], Settings], Draft]] = {
    OWN_FORM: _read_own,
    TRL_ID_FORM: _read_pair_ids,
    "chosen rejected": _read_pair,
    LABELLED_FORM: _read_labelled,
    "prompt completion": _read_completion,
}


def _tokenize_text(drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise rows of text: the prompt, and the prompt with each response and the EOS token behind it."""
    if not drafts:
        return
    eos = tokenizer.eos_token
    if eos is None:
        raise FlexdpoError(
            f"tokenizer {tokenizer_name(tokenizer)} has no EOS token, so nothing would mark the end of a "
            "response; set tokenizer.eos_token"
        )
    texts = []
    for draft in drafts:
        texts.append(draft.prompt)
        for response in draft.responses:
            texts.append(draft.prompt + (response if response.endswith(eos) else response + eos))
    _hand_out(iter(_encode(tokenizer, texts, drafts)), drafts)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], drafts: Sequence[Draft]) -> list[list[int]]:
    """Tokenise the texts of some rows in one go; look for the culprit only after a failure."""
    try:
        return cast("list[list[int]]", tokenizer(text=texts)["input_ids"])
    except Exception:  # each tokenizer has errors of its own
        each = len(texts) // len(drafts)
        for number, draft in enumerate(drafts):
            for text in texts[number * each : (number + 1) * each]:
                try:
                    tokenizer(text=[text])
                except Exception as error:
                    raise FlexdpoError(
                        f"{draft.place}: the tokenizer cannot read its text: {_why(error, text)}"
                    ) from error
        raise


def _why(error: Exception, text: str) -> str:
    """Say what is wrong with a text, or what the tokenizer says."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        return (
            f"{text[fault.start]!r} is half of a surrogate pair and no character; repair the text with "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        )
    return first_line(error)


def _tokenize_chats(drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise rows of messages with the chat template; rows that call it alike go together."""
    alike: dict[str, list[Draft]] = {}
    for draft in drafts:
        alike.setdefault(repr(draft.template_kwargs), []).append(draft)
    if drafts:
        _require_chat_template(tokenizer)
    for members in alike.values():
        kwargs = members[0].template_kwargs
        prompts = _render(
            tokenizer,
            [(draft.place, draft.prompt) for draft in members],
            {"add_generation_prompt": True, **kwargs},
        )
        whole = _render(
            tokenizer,
            [(draft.place, draft.prompt + response) for draft in members for response in draft.responses],
            kwargs,
        )
        merged = iter(whole)
        for prompt, draft in zip(prompts, members, strict=True):
            _hand_out(iter([prompt, *(next(merged) for _ in draft.responses)]), [draft])


def _require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedTokenizerBase

    # a tokenizer with a renderer of its own, such as Mistral's, needs no template
    is_stock = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    if is_stock and not tokenizer.chat_template:
        raise FlexdpoError(
            f"the data holds messages but the tokenizer {tokenizer_name(tokenizer)} has no chat template; set "
            "tokenizer.chat_template, use the tokenizer of an instruction-tuned model, or give the columns as text"
        )


def _render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[tuple[str, list[Any]]], kwargs: Mapping[str, Any]
) -> list[list[int]]:
    """Apply the chat template to ``(place, messages)`` in one go; look for the culprit only after a failure."""

    def token_ids(messages: list[Any]) -> Any:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]

    try:
        return cast("list[list[int]]", token_ids([messages for _, messages in conversations]))
    except Exception:  # a template is a program of the model's maker and may raise anything
        for place, messages in conversations:
            try:
                token_ids(messages)
            except Exception as error:
                why = _why(error, _text_of(messages))
                raise FlexdpoError(f"{place}: the chat template cannot render its messages: {why}") from error
        raise


def _text_of(value: Any) -> str:
    """All text in messages, for a look at its characters."""
    if isinstance(value, dict):
        return "".join(_text_of(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return "".join(map(_text_of, value))
    return value if isinstance(value, str) else ""


def _hand_out(token_ids: Iterator[list[int]], drafts: Sequence[Draft]) -> None:
    """Give each draft its tokens, which come as the prompt's and then those of the prompt with each response.

    The response starts where the prompt alone and the prompt with a response part: a template may render the
    prompt's end otherwise before a response, and tokens may merge across the border.
    """
    for draft in drafts:
        prompt = next(token_ids)
        wholes = [next(token_ids) for _ in draft.responses]
        border = min(_common_length(prompt, whole) for whole in wholes)
        draft.retokenised = border < len(prompt)
        draft.prompt_ids = prompt[:border]
        draft.response_ids = [whole[border:] for whole in wholes]


def _common_length(ids: list[int], others: list[int]) -> int:
    if others[: len(ids)] == ids:
        return len(ids)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """How errors call a tokenizer."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
