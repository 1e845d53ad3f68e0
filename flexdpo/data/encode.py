"""Examples to token ids: text and messages through the tokenizer, and what cannot be learned from left out."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

from flexdpo.data.draft import (
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    IDENTICAL,
    IDENTICAL_CUT,
    LABELS_COLUMN,
    NOTES,
    PROMPT_FILLS,
    SKIP_REASONS,
    Draft,
    Settings,
)
from flexdpo.data.formats import read_row
from flexdpo.data.layouts import LAYOUTS
from flexdpo.errors import FlexdpoError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase


def tokenize_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> dict[str, list[Any]]:
    """Tokenise a batch of rows; a row that cannot be used comes out empty, with the reason's number."""
    rows = zip(indices, zip(*batch.values(), strict=True), strict=True)
    drafts = [read_row(index, dict(zip(batch, values, strict=True)), settings) for index, values in rows]
    layout = LAYOUTS[settings.layout]
    if not layout.ids:
        texts = [draft for draft in drafts if not draft.skip and not draft.is_chat]
        chats = [draft for draft in drafts if not draft.skip and draft.is_chat]
        if texts:
            _tokenize_text(texts, tokenizer)
        if chats:
            _tokenize_chats(chats, tokenizer)
    for draft in drafts:
        _settle(draft, settings.max_length)
    return {
        "prompt_ids": [[] if draft.skip else draft.prompt_ids for draft in drafts],
        "response_ids": [[] if draft.skip else draft.response_ids for draft in drafts],
        "edges": [[] if draft.skip else draft.edges for draft in drafts],
        "row": [draft.row for draft in drafts],
        **({LABELS_COLUMN: [draft.labels for draft in drafts]} if layout.labelled else {}),
        "_skip": [SKIP_REASONS.index(draft.skip) + 1 if draft.skip else 0 for draft in drafts],
        "_responses": [len(draft.response_ids) for draft in drafts],
        "_cut": [draft.cut for draft in drafts],
        "_whole": [draft.whole for draft in drafts],
        "_longest": [draft.longest for draft in drafts],
        **{name: [int(getattr(draft, name[1:])) for draft in drafts] for name in NOTES},
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
        draft.skip = EMPTY_RESPONSE
    elif _drop_ties(draft) and compared and not draft.edges:
        draft.skip = IDENTICAL
    elif max_length is not None and len(draft.prompt_ids) >= max_length:
        draft.skip = PROMPT_FILLS
    elif max_length is not None:
        room = max_length - len(draft.prompt_ids)
        draft.cut = sum(len(ids) > room for ids in draft.response_ids)
        draft.response_ids = [ids[:room] for ids in draft.response_ids]
        if _drop_ties(draft) and compared and not draft.edges:
            draft.skip = IDENTICAL_CUT
    draft.longest = len(draft.prompt_ids) + max(map(len, draft.response_ids), default=0)


def _drop_ties(draft: Draft) -> int:
    """Take out preferences between equal responses, which have no gradient; return how many went."""
    edges = [edge for edge in draft.edges if draft.response_ids[edge[0]] != draft.response_ids[edge[1]]]
    dropped = len(draft.edges) - len(edges)
    draft.edges = edges
    draft.ties += dropped
    return dropped


def _tokenize_text(drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise rows of text: the prompt, and the prompt with each response and the EOS token behind it."""
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
        border = len(prompt)
        for whole in wholes:
            if whole[:border] != prompt[:border]:
                border = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        draft.retokenised = border < len(prompt)
        draft.prompt_ids = prompt[:border]
        draft.response_ids = [whole[border:] for whole in wholes]


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """How errors call a tokenizer."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
