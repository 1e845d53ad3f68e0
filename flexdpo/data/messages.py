"""Messages in the ways people write them, as the lists of role and content that chat templates read."""

import json
from typing import Any

from flexdpo.errors import FlexdpoError, found, quoted

# names of other trainers' roles; what is not known goes to the template as it is
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# behind the key 'from' stand names that must be translated, so an unknown one cannot be passed on
_SPEAKERS = {**_ROLES, **{role: role for role in ("user", "assistant", "system", "tool")}, "observation": "tool"}
# who asks; a response needs somebody else's message
ASKING = frozenset({"user", "system", "developer", "tool"})
_CONTENT_KEYS = ("content", "value", "text")


def as_messages(value: Any, place: str, column: str) -> Any:
    """Text and ``None`` as they are, and a message, a list of messages or a dict with one as a list of messages.

    Raises:
        FlexdpoError: naming the place, for anything else.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = value["messages"] if isinstance(value.get("messages"), list) else [value]
    if not isinstance(value, list):
        raise FlexdpoError(f"{place}, column {column!r}: expected text or a list of messages, found {found(value)}")
    return [_message(message, f"{place}, column {column!r}, message {n}") for n, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise FlexdpoError(f"{place}: expected {{'role': 'user', 'content': 'text'}}, found {found(message)}")
    told = without_nulls({key: value for key, value in message.items() if isinstance(key, str)})
    key = "role" if "role" in told or "from" not in told else "from"
    role = told.pop(key, None)
    if not isinstance(role, str):
        why = f"its 'role' is {found(role)}"
        raise FlexdpoError(f"{place}: expected {{'role': 'user', 'content': 'text'}}, {why}")
    if key == "from" and role.lower() not in _SPEAKERS:
        raise FlexdpoError(f"{place}: 'from' is {role!r}; known are {quoted(_SPEAKERS)}; write it as role and content")
    role = _SPEAKERS[role.lower()] if key == "from" else _ROLES.get(role.lower(), role)
    name = next((name for name in _CONTENT_KEYS if told.get(name) is not None), "content")
    content = _content(told.pop(name, None), place)
    return {**told, "role": role, "content": content}


def _content(value: Any, place: str) -> Any:
    """Text, and parts of text as one: a template made for text would print a list of parts.

    Where images stand between them, a list of parts: ``{"type": "text", "text": ...}`` and ``{"type": "image"}``, the
    latter with its picture under ``"image"`` if the part brings one.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise FlexdpoError(f"{place}: expected {{'role': 'user', 'content': 'text'}}, its 'content' is {found(value)}")
    texts = [part if isinstance(part, str) else _text_of_part(part) for part in value]
    images = [_image_part(part) for part in value]
    for text, image, part in zip(texts, images, value, strict=True):
        if text is None and image is None:
            raise FlexdpoError(
                f"{place}: expected text, or parts such as {{'type': 'text', 'text': 'why?'}} and {{'type': 'image'}}, "
                f"found {found(part)}; sound and video are not supported"
            )
    if any(images):
        return [image or {"type": "text", "text": text} for text, image in zip(texts, images, strict=True)]
    return "".join(text for text in texts if text is not None)


def _image_part(part: Any) -> dict[str, Any] | None:
    if not isinstance(part, dict) or part.get("type") != "image":
        return None
    picture = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
    return {"type": "image"} if picture is None else {"type": "image", "image": picture}


def image_parts(messages: Any) -> list[dict[str, Any]]:
    """The parts of messages that are images, in their order; none of text."""
    if not isinstance(messages, list):
        return []
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] == "image"]


def _text_of_part(part: Any) -> str | None:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        return None
    return next((part[key] for key in ("text", *_CONTENT_KEYS) if isinstance(part.get(key), str)), None)


def without_nulls(value: Any) -> Any:
    """A message or a tool without the fields that are null: Arrow gives every row the fields of all others."""
    if isinstance(value, dict):
        # a message that only calls tools has a content, which is null
        return {key: without_nulls(part) for key, part in value.items() if part is not None or key == "content"}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def decoded(value: Any, place: str, column: str) -> Any:
    """Messages that a text holds as JSON, as cells of CSV files do; any other value as it is.

    Raises:
        FlexdpoError: for a list of messages written by Python's ``str``, which is no JSON.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[{", "{")):
        return value
    try:
        read = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        if value.lstrip().startswith(("[{'role'", "[{'content'", "[{'from'", "{'role'", "{'content'", "{'from'")):
            raise FlexdpoError(
                f"{place}, column {column!r}: a list of messages written by Python's str(), which is no JSON; write "
                "it with json.dumps"
            ) from None
        return value
    if isinstance(read, dict) and isinstance(read.get("messages"), list):
        return read
    messages = read if isinstance(read, list) else [read]
    speaks = [
        isinstance(m, dict) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in messages
    ]
    return read if messages and all(speaks) else value


def says_nothing(response: Any) -> bool:
    """Whether a response is missing, or text or messages without any content: the end token alone is no answer."""
    if isinstance(response, list):
        return not any(value for message in response for key, value in message.items() if key != "role")
    return not response
