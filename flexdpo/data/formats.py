"""A row of text or messages brought into one form: the prompt once, and every response behind it."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from flexdpo.data.columns import require_nothing_lost
from flexdpo.data.draft import EMPTY_PROMPT, EMPTY_RESPONSE, TEMPLATE_COLUMNS, TIE, Draft, Settings
from flexdpo.data.layouts import LAYOUTS
from flexdpo.data.messages import ASKING, as_messages, decoded, says_nothing, without_nulls
from flexdpo.errors import FlexdpoError, found, quoted


def read_row(row: int, values: Mapping[str, Any], settings: Settings) -> Draft:
    """Read a row as its layout says.

    Raises:
        FlexdpoError: naming the row and the column, for values that cannot be read or would be lost.
    """
    layout, draft = LAYOUTS[settings.layout], Draft(row, f"row {row} (counted from 0)")
    if layout.ids:
        layout.read(draft, values, settings.largest_id)
        return draft
    for column in settings.media:
        if values[column]:
            raise _not_read(f"{draft.place}, column {column!r}", column[:5])
    for column in settings.images or ():
        held = values[column]
        draft.pictures += held if isinstance(held, list) else [held]
    draft.pictures = [picture for picture in draft.pictures if picture is not None]
    if settings.prompt_like:
        require_nothing_lost(draft.place, values, settings)
    layout.read(draft, values)
    if settings.prompt:
        draft.prompt, values = _prompt(draft, values, settings)
    # text that holds messages as JSON counts as messages where all responses are such text
    responses = [decoded(r, draft.place, c) for r, c in zip(draft.responses, draft.columns, strict=True)]
    if responses != draft.responses and not any(isinstance(response, str) for response in responses):
        draft.decoded, draft.responses = True, responses
    draft.prompt = as_messages(draft.prompt, draft.place, (settings.prompt or ("prompt",))[0])
    draft.responses = [as_messages(r, draft.place, c) for r, c in zip(draft.responses, draft.columns, strict=True)]
    columns = [(settings.prompt or ("prompt",))[0], *draft.columns]
    for column, chat in zip(columns, (draft.prompt, *draft.responses), strict=True):
        # only messages with images are in parts
        if settings.images is None and isinstance(chat, list) and any(isinstance(m["content"], list) for m in chat):
            raise _not_read(f"{draft.place}, column {column!r}", "image")
    _leave_out(draft, [says_nothing(response) for response in draft.responses])
    if draft.skip:
        return draft
    _settle(draft, values, settings)
    for column, response in zip(draft.columns, draft.responses, strict=True):
        if isinstance(response, list) and any(isinstance(message["content"], list) for message in response):
            raise FlexdpoError(
                f"{draft.place}, column {column!r}: an image in a response; models here write text only, so put it "
                "into the prompt or leave the row out"
            )
    return draft


def _not_read(place: str, kind: str) -> FlexdpoError:
    if kind == "image":
        return FlexdpoError(
            f"{place}: images are read by a processor, and here is a tokenizer alone; give processing_class="
            "AutoProcessor.from_pretrained(...) and a model that sees, or drop the images to train on text"
        )
    return FlexdpoError(f"{place}: sound and video are not supported; drop the column to train on text")


def _prompt(draft: Draft, values: Mapping[str, Any], settings: Settings) -> tuple[Any, Mapping[str, Any]]:
    """The value of the prompt's columns, and the row's values with the tools that may stand in there."""
    first, *others = settings.prompt
    value = decoded(values[first], draft.place, first)
    draft.decoded = value is not values[first]
    if isinstance(value, dict) and isinstance(value.get("full_text"), str):
        value = value["full_text"]
    elif isinstance(value, dict) and value.get("tools"):
        values = {**values, "tools": value["tools"]}
    for column in others:
        more = values[column]
        if more and not (isinstance(more, str) and isinstance(value, str)):
            raise FlexdpoError(
                f"{draft.place}: columns {quoted(settings.prompt)} are one prompt and must be text, found "
                f"{found(value)} and {found(more)}"
            )
        value = f"{value}\n{more}" if more else value
    return value, values


def _leave_out(draft: Draft, empty: list[bool]) -> None:
    """Leave out the responses of a ranking without text or without a preference; of a pair, the row."""
    if draft.skip:
        return
    if any(empty) and len(empty) < 3:
        draft.skip = EMPTY_RESPONSE
        return
    edges = [edge for edge in draft.edges if not (empty[edge[0]] or empty[edge[1]])]
    kept = sorted({end for edge in edges for end in edge}) if draft.edges else list(range(len(empty)))
    if not kept:
        draft.skip = TIE
        return
    draft.unjudged = len(empty) - len(kept)
    draft.responses, draft.columns = [draft.responses[n] for n in kept], [draft.columns[n] for n in kept]
    draft.edges = [[kept.index(a), kept.index(b)] for a, b in edges]


def _settle(draft: Draft, values: Mapping[str, Any], settings: Settings) -> None:
    """Bring prompt and responses into one form, text or messages, with the prompt once."""
    earlier = _earlier_turns(draft, values, settings)
    chats = [isinstance(response, list) for response in draft.responses]
    prompt_is_chat = isinstance(draft.prompt, list)
    draft.is_chat = any(chats) or prompt_is_chat or earlier is not None
    asks_first = [chat and r[0]["role"] in ASKING for chat, r in zip(chats, draft.responses, strict=True)]
    if any(asks_first) and not all(chats):
        raise FlexdpoError(
            f"{draft.place}: {quoted(draft.columns)} mix text and whole conversations; use one of the two in a row"
        )
    # a text prompt beside whole conversations repeats what they begin with, so they are what counts
    if (not settings.prompt and draft.prompt is None) or (all(asks_first) and not (prompt_is_chat and draft.prompt)):
        _extract(draft, earlier)
    if draft.prompt in (None, []):
        draft.skip = EMPTY_PROMPT
    elif draft.is_chat:
        if isinstance(draft.prompt, str):
            draft.prompt = [{"role": "user", "content": draft.prompt}] if draft.prompt else []
        answers = [r if isinstance(r, list) else [{"role": "assistant", "content": r}] for r in draft.responses]
        draft.responses = answers
        _settle_messages(draft, earlier or [])
        draft.template_kwargs = _template_kwargs(values, draft.place)
    else:
        draft.promptless = not draft.prompt
        draft.echoed = bool(draft.prompt.strip()) and all(r.startswith(draft.prompt) for r in draft.responses)
        draft.untold = any(values.get(column) for column in TEMPLATE_COLUMNS)


def _earlier_turns(draft: Draft, values: Mapping[str, Any], settings: Settings) -> list[dict[str, Any]] | None:
    """What comes before the prompt in columns of its own; ``None`` where there are no such columns."""
    if settings.system is None and settings.turns is None:
        return None
    system = values[settings.system] if settings.system else None
    if system is not None and not isinstance(system, str):
        raise FlexdpoError(f"{draft.place}, column {settings.system!r}: expected text, found {found(system)}")
    messages = [{"role": "system", "content": system}] if system else []
    for turn in (values[settings.turns] or []) if settings.turns else []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise FlexdpoError(
                f"{draft.place}, column {settings.turns!r}: expected pairs of a question and its answer, found "
                f"{found(turn)}"
            )
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _extract(draft: Draft, earlier: list[dict[str, Any]] | None) -> None:
    """Take the prompt off the beginning of whole texts or conversations."""
    given, chats = draft.prompt, [isinstance(response, list) for response in draft.responses]
    if len(set(chats)) > 1 or (earlier is not None and not all(chats)):
        beside = "" if earlier is None else " beside a system prompt"
        raise FlexdpoError(
            f"{draft.place}: {quoted(draft.columns)} are text without a prompt{beside}; give the prompt a column "
            "'prompt'"
        )
    if len(draft.responses) == 1:
        [whole] = draft.responses
        if not chats[0] or len(whole) < 2 or whole[-1]["role"] in ASKING:
            raise FlexdpoError(
                f"{draft.place}, column {draft.columns[0]!r}: expected a conversation that ends with the assistant's "
                f"answer, found {found(whole)}"
            )
        draft.prompt, draft.responses = whole[:-1], [whole[-1:]]
    else:
        draft.extracted = True
        draft.prompt, draft.responses = _common_beginning(draft.responses)
    if given and isinstance(given, str):
        said = "\n".join(str(m["content"]) for part in (draft.prompt, *draft.responses) for m in part)
        if given.strip() not in said:
            raise FlexdpoError(
                f"{draft.place}: the text of 'prompt' would be lost: it stands nowhere in {quoted(draft.columns)}, "
                "which are whole conversations; put it there, or give the answers alone"
            )


def _common_beginning(wholes: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Split texts or conversations into what all begin with, and each one's rest, as TRL does.

    The rest is never empty: where one is the beginning of the others, the prompt ends one character (message) earlier.
    A space before the difference belongs to the rest.
    """
    first, shortest = wholes[0], min(map(len, wholes))
    same = bisect_left(range(1, shortest + 1), True, key=lambda n: any(w[:n] != first[:n] for w in wholes))
    if same == shortest or (same and first[same - 1] == " "):
        same -= 1
    return first[:same], [whole[same:] for whole in wholes]


def _settle_messages(draft: Draft, earlier: list[dict[str, Any]]) -> None:
    """Take out what a response repeats of the prompt, and put before it what comes earlier."""
    if draft.prompt and earlier and draft.prompt[0]["role"] == earlier[0]["role"] == "system":
        if draft.prompt[0]["content"] != earlier[0]["content"]:
            raise FlexdpoError(f"{draft.place}: the prompt's own system message differs from the system column's text")
        earlier = []
    size = len(draft.prompt)
    repeats = [len(response) > size and response[:size] == draft.prompt for response in draft.responses]
    if size and any(repeats):
        if not all(repeats):
            raise FlexdpoError(
                f"{draft.place}: response {repeats.index(True)} (counted from 0) repeats the messages of the prompt "
                f"and response {repeats.index(False)} does not; let all responses begin behind the prompt, or none"
            )
        draft.repeated = True
        draft.responses = [response[size:] for response in draft.responses]
    draft.prompt = earlier + draft.prompt
    for response, column in zip(draft.responses, draft.columns, strict=True):
        if response[0]["role"] in ("user", "system") or all(message["role"] in ASKING for message in response):
            raise FlexdpoError(
                f"{draft.place}, column {column!r}: expected the assistant's answer, or a conversation that begins "
                f"with all messages of the prompt, found {found(response)}"
            )
    draft.dialogue = any(m["role"] == "user" for response in draft.responses for m in response)
    asked = draft.prompt[-1]["content"] if draft.prompt else None
    first = [response[0]["content"] for response in draft.responses]
    if isinstance(asked, str) and asked.strip():
        draft.echoed = all(isinstance(text, str) and text.startswith(asked) for text in first)
    if not draft.prompt:
        draft.skip = EMPTY_PROMPT


def _template_kwargs(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FlexdpoError(f"{place}, column 'tools': not valid JSON ({error})") from error
    else:
        tools = without_nulls(tools)
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
    "conversation", "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
