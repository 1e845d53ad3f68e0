"""Rows with images to token ids: the prompt through the processor, once for all its responses.

As TRL's trainer does it: the template renders the prompt alone and with each response, the responses are what follows
the text that all have in common, and only the prompt goes through the processor with the images.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from flexdpo.data.draft import Draft
from flexdpo.data.images import ImageReader, tokenizer_of
from flexdpo.data.messages import image_parts
from flexdpo.data.pictures import as_stored
from flexdpo.errors import FlexdpoError, first_line

Messages = list[dict[str, Any]]


def tokenize_with_images(draft: Draft, reader: ImageReader) -> None:
    """Give a draft its tokens, and its pictures as ``IMAGES_COLUMN`` holds them.

    Raises:
        FlexdpoError: naming the row, for what :meth:`ImageReader.read` refuses and for an image in a response.
    """
    tokenizer = tokenizer_of(reader.processor)
    if draft.is_chat:
        prompt, responses, pictures = _rendered(draft, reader)
        # a template writes the special tokens itself
        special = False
    else:
        prompt, pictures, special = draft.prompt, draft.pictures, True
        responses = draft.responses
    stored = [as_stored(picture, draft.place) for picture in pictures]
    read = reader.read(prompt, stored, draft.place, add_special_tokens=special)
    draft.prompt_ids = read.ids
    draft.response_ids = [_ids_of(tokenizer, text, draft.place) for text in responses]
    if special:
        _end_texts(draft, tokenizer)
    forbidden = read.token_id if stored else tokenizer.convert_tokens_to_ids(reader.placeholder)
    for column, ids in zip(draft.columns, draft.response_ids, strict=True):
        if forbidden in ids:
            raise FlexdpoError(
                f"{draft.place}, column {column!r}: an image in a response, as {reader.placeholder!r}; models here "
                "write text only, so put it into the prompt or leave the row out"
            )
    draft.pictures = [
        {**each, "digest": image.digest, "tokens": image.tokens, "token_id": read.token_id, "processor": reader.digest}
        for each, image in zip(stored, read.images, strict=True)
    ]


def _end_texts(draft: Draft, tokenizer: Any) -> None:
    """One EOS token behind each response, and none behind the prompt, whatever tokenizer and data put there."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise FlexdpoError("the processor's tokenizer has no EOS token to end a text with; set tokenizer.eos_token")
    while draft.prompt_ids[-1:] == [eos]:
        draft.prompt_ids.pop()
    for ids in draft.response_ids:
        while ids[-1:] == [eos]:
            ids.pop()
        ids.append(eos)


def _ids_of(tokenizer: Any, text: str, place: str) -> list[int]:
    try:
        [ids] = tokenizer(text=[text], add_special_tokens=False)["input_ids"]
    except Exception as error:  # each tokenizer has errors of its own
        raise FlexdpoError(f"{place}: the tokenizer cannot read its text: {first_line(error)}") from error
    return list(ids)


# --- messages --------------------------------------------------------------------------------------------------------


def _rendered(draft: Draft, reader: ImageReader) -> tuple[str, list[str], list[Any]]:
    """The texts of the prompt and of each response behind it, and the pictures in the order of their places."""
    prompt = _with_parts(_with_places(draft.prompt, len(draft.pictures)))
    pictures = _in_order(prompt, draft)
    goes_on = prompt[-1]["role"] == "assistant"
    ending = {"continue_final_message" if goes_on else "add_generation_prompt": True}
    wholes = [
        _render(draft, reader, _joined(prompt, _with_parts(response)) if goes_on else prompt + _with_parts(response))
        for response in draft.responses
    ]
    alone = _render(draft, reader, prompt, ending)
    draft.prefilled = goes_on
    # some templates write the prompt's end otherwise before a response
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(alone, *wholes, strict=False))
    text = "".join(letters[0] for letters in same)
    draft.retokenised = len(text) < len(alone)
    return text, [whole[len(text) :] for whole in wholes], pictures


def _with_places(messages: Messages, images: int) -> Messages:
    """Messages with a place for each image: without any, all stand before the text of the first turn of the user."""
    waiting = [part for part in image_parts(messages) if "image" not in part]
    first = next((n for n, m in enumerate(messages) if m["role"] == "user" and isinstance(m["content"], str)), None)
    if waiting or first is None or not images:
        return messages
    asked = messages[first]
    parts = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": asked["content"]}]
    return [*messages[:first], {**asked, "content": parts}, *messages[first + 1 :]]


def _with_parts(messages: Messages) -> Messages:
    """Messages whose every text is a part, as templates of models that see expect it."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


def _in_order(prompt: Messages, draft: Draft) -> list[Any]:
    """Pictures that stand in messages, and those of the columns for the places without one."""
    parts = image_parts(prompt)
    waiting = sum("image" not in part for part in parts)
    given = len(draft.pictures)
    if waiting != given:
        raise FlexdpoError(
            f"{draft.place}: {given} image{'s' * (given != 1)} and {waiting} part{'s' * (waiting != 1)} "
            "{'type': 'image'} in its messages; give each image one, or none at all: then they come first in the first "
            "turn of the user"
        )
    held = iter(draft.pictures)
    return [part["image"] if "image" in part else next(held) for part in parts]


def _joined(prompt: Messages, response: Messages) -> Messages:
    """A response that goes on with the assistant's turn that the prompt ends with, where both are text."""
    begun, more = prompt[-1], response[0]
    if more["role"] != "assistant" or not (begun["content"] and more["content"]):
        return prompt + response
    content = [*begun["content"][:-1], {**begun["content"][-1]}]
    if content[-1]["type"] != "text":
        return prompt + response
    content[-1]["text"] += "".join(part["text"] for part in more["content"])
    return [*prompt[:-1], {**more, "content": content}, *response[1:]]


def _render(draft: Draft, reader: ImageReader, messages: Messages, ending: Mapping[str, bool] | None = None) -> str:
    bare = [{**message, "content": _bare(message["content"])} for message in messages]
    try:
        text = reader.processor.apply_chat_template(bare, tokenize=False, **(ending or {}), **draft.template_kwargs)
    except Exception as error:  # a template is a program of the model's maker and may raise anything
        raise FlexdpoError(
            f"{draft.place}: the chat template cannot render its messages: {first_line(error)}"
        ) from error
    return str(text)


def _bare(content: Any) -> Any:
    """Parts without their pictures, which are no template's business."""
    if not isinstance(content, list):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]
