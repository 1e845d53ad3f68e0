"""Examples to token ids: text and messages through the tokenizer, and what cannot be learned from left out."""

from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from flexdpo.data import draft as reasons
from flexdpo.data.draft import IMAGES_COLUMN, LABELS_COLUMN, NOTES, SKIP_REASONS, Draft, Settings
from flexdpo.data.encode_images import tokenize_with_images
from flexdpo.data.formats import read_row
from flexdpo.data.images import reader_of, tokenizer_of
from flexdpo.data.layouts import LAYOUTS
from flexdpo.data.pictures import with_undecoded
from flexdpo.errors import FlexdpoError, first_line


def tokenize_batch(
    batch: dict[str, list[Any]], indices: list[int], *, tokenizer: Any, settings: Settings
) -> dict[str, list[Any]]:
    """Tokenise a batch of rows; a row that cannot be used comes out empty, with the reason's number."""
    if settings.images:
        batch = with_undecoded(batch, settings.images)
    rows = zip(indices, zip(*batch.values(), strict=True), strict=True)
    drafts = [read_row(index, dict(zip(batch, values, strict=True)), settings) for index, values in rows]
    layout = LAYOUTS[settings.layout]
    # a prompt that is to keep its end is tokenised to it
    bound = None if settings.max_prompt_length else settings.max_length
    if not layout.ids:
        used = [draft for draft in drafts if not draft.skip]
        # a processor's template takes messages in parts, with and without images
        seen = [draft for draft in used if settings.images or (settings.images is not None and draft.is_chat)]
        texts = [draft for draft in used if draft not in seen and not draft.is_chat]
        chats = [draft for draft in used if draft not in seen and draft.is_chat]
        for draft in seen:
            tokenize_with_images(draft, reader_of(tokenizer))
        if settings.images is not None:
            tokenizer = tokenizer_of(tokenizer)
        if texts:
            _tokenize_text(texts, tokenizer, bound)
        if chats:
            _tokenize_chats(chats, tokenizer, bound)
    for draft in drafts:
        _settle(draft, settings.max_length, settings.max_prompt_length)
    return {
        "prompt_ids": [[] if draft.skip else draft.prompt_ids for draft in drafts],
        "response_ids": [[] if draft.skip else draft.response_ids for draft in drafts],
        "edges": [[] if draft.skip else draft.edges for draft in drafts],
        "row": [draft.row for draft in drafts],
        **({LABELS_COLUMN: [draft.labels for draft in drafts]} if layout.labelled else {}),
        **({IMAGES_COLUMN: [draft.pictures for draft in drafts]} if settings.images is not None else {}),
        "_skip": [SKIP_REASONS.index(draft.skip) + 1 if draft.skip else 0 for draft in drafts],
        "_responses": [len(draft.response_ids) for draft in drafts],
        "_cut": [draft.cut for draft in drafts],
        "_whole": [draft.whole for draft in drafts],
        "_longest": [draft.longest for draft in drafts],
        **{name: [int(getattr(draft, name[1:])) for draft in drafts] for name in NOTES},
    }


def _settle(draft: Draft, max_length: int | None, max_prompt_length: int | None) -> None:
    """Cut the prompt to its end and the responses to ``max_length``, and say why a row cannot be used, if so."""
    if draft.skip:
        return
    if draft.pictures and _cuts_an_image(draft, max_length, max_prompt_length):
        draft.skip = reasons.IMAGE_CUT
        return
    if max_prompt_length is not None and len(draft.prompt_ids) > max_prompt_length:
        # one cut for all responses, so that they go on sharing the prompt
        draft.prompt_ids, draft.shortened = draft.prompt_ids[-max_prompt_length:], True
    draft.whole = len(draft.prompt_ids) + max(map(len, draft.response_ids), default=0)
    if not draft.prompt_ids:
        draft.skip = reasons.EMPTY_PROMPT
    elif max_length is not None and len(draft.prompt_ids) >= max_length:
        draft.skip = reasons.PROMPT_FILLS
    elif not draft.response_ids or not all(draft.response_ids):
        draft.skip = reasons.EMPTY_RESPONSE
    elif _left_in_ties(draft):
        draft.skip = reasons.IDENTICAL
    elif max_length is not None:
        room = max_length - len(draft.prompt_ids)
        draft.cut = sum(len(ids) > room for ids in draft.response_ids)
        draft.response_ids = [ids[:room] for ids in draft.response_ids]
        if _left_in_ties(draft):
            draft.skip = reasons.IDENTICAL_CUT
    draft.longest = len(draft.prompt_ids) + max(map(len, draft.response_ids), default=0)


def _cuts_an_image(draft: Draft, max_length: int | None, max_prompt_length: int | None) -> bool:
    """Whether fewer image tokens are left than the images have."""
    kept = draft.prompt_ids[-max_prompt_length:] if max_prompt_length is not None else draft.prompt_ids
    tokens: int = sum(picture["tokens"] for picture in draft.pictures)
    return kept[:max_length].count(draft.pictures[0]["token_id"]) < tokens


def _left_in_ties(draft: Draft) -> bool:
    """Take out preferences between equal responses, which have no gradient; say whether these were all."""
    edges = [edge for edge in draft.edges if draft.response_ids[edge[0]] != draft.response_ids[edge[1]]]
    draft.ties += (dropped := len(draft.edges) - len(edges))
    draft.edges = edges
    return dropped > 0 and not edges


def _tokenize_text(drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    """Tokenise rows of text: the prompt, and the prompt with each response and one EOS token behind it."""
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    if eos is None:
        raise FlexdpoError(
            f"tokenizer {tokenizer_name(tokenizer)} has no EOS token, so nothing would mark the end of a "
            "response; set tokenizer.eos_token"
        )
    # a tokenizer may take the text of a special token apart
    spelled = _encode_all(tokenizer, [eos], add_special_tokens=False) == [[eos_id]]
    texts = []
    for draft in drafts:
        texts.append(draft.prompt)
        for response in draft.responses:
            # white space behind the EOS token would have another one follow it
            bare = response.rstrip()
            ended = bare if spelled and bare.endswith(eos) else response + eos if spelled else response
            texts.append(draft.prompt + ended)
    encoded = _encode(tokenizer, texts, drafts, max_length)
    added_eos = encoded and _encode_all(tokenizer, ["a"])[0][-1] == eos_id
    token_ids = iter(encoded)
    for draft in drafts:
        prompt, wholes = next(token_ids), [next(token_ids) for _ in draft.responses]
        if added_eos and prompt[-1:] == [eos_id]:
            prompt = prompt[:-1]
        # a tokenizer puts its BOS token before a text that begins with one, too
        twice = tokenizer.bos_token is not None and draft.prompt.startswith(tokenizer.bos_token)
        if twice and prompt[:2] == [tokenizer.bos_token_id] * 2:
            prompt, wholes, draft.doubled = prompt[1:], [whole[1:] for whole in wholes], True
        _hand_out(prompt, wholes, draft)
        draft.response_ids = [_with_one(ids, eos_id) for ids in draft.response_ids]


def _with_one(ids: list[int], eos_id: int) -> list[int]:
    """A response with one EOS token at its end, whoever put how many there."""
    while ids[-2:] == [eos_id, eos_id]:
        ids = ids[:-1]
    return ids if ids[-1:] == [eos_id] or not ids else [*ids, eos_id]


def _encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str], **kwargs: Any) -> list[list[int]]:
    return cast("list[list[int]]", tokenizer(text=texts, **kwargs)["input_ids"])


# characters beyond which a text is not tokenised as a whole for its first few tokens, at least, and for each of these
_LONG, _LONG_FOR_A_TOKEN = 100_000, 64


def _is_long(text: str, max_length: int | None) -> bool:
    return max_length is not None and len(text) > max(_LONG, _LONG_FOR_A_TOKEN * max_length)


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, **kwargs: Any) -> list[int]:
    """More than the first ``max_length`` tokens of a long text: those that two of its beginnings have in common."""
    size, before = max(_LONG, _LONG_FOR_A_TOKEN * max_length) // 2, list[int]()
    while True:
        [ids] = _encode_all(tokenizer, [text[:size]], **kwargs)
        same = _common(before, ids)
        if size >= len(text):
            return ids
        if same > max_length:
            return ids[:same]
        before, size = ids, 2 * size


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], drafts: Sequence[Draft], max_length: int | None
) -> list[list[int]]:
    """Tokenise the texts of some rows in one go; look for the culprit only after a failure."""
    try:
        whole = iter(_encode_all(tokenizer, [text for text in texts if not _is_long(text, max_length)] or [""]))
        return [_beginning(tokenizer, t, max_length) if _is_long(t, max_length) else next(whole) for t in texts]  # type: ignore[arg-type]
    except Exception:  # each tokenizer has errors of its own
        own = iter(texts)
        for draft in drafts:
            for text in islice(own, 1 + len(draft.responses)):
                try:
                    tokenizer(text=[text])
                except Exception as error:
                    why = _why(error, text)
                    raise FlexdpoError(f"{draft.place}: the tokenizer cannot read its text: {why}") from error
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


def _tokenize_chats(drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    """Tokenise rows of messages with the chat template; rows that call it alike go together."""
    alike: dict[str, list[Draft]] = {}
    for draft in drafts:
        draft.prefilled = _is_prefilled(draft)
        alike.setdefault(repr((draft.prefilled, draft.template_kwargs)), []).append(draft)
    if _renders_text(tokenizer) and not tokenizer.chat_template:
        raise FlexdpoError(
            f"the data holds messages but the tokenizer {tokenizer_name(tokenizer)} has no chat template; set "
            "tokenizer.chat_template, use the tokenizer of an instruction-tuned model, or give the columns as text"
        )
    for members in alike.values():
        kwargs = members[0].template_kwargs
        asked = [(draft.place, draft.prompt) for draft in members]
        ending = "continue_final_message" if members[0].prefilled else "add_generation_prompt"
        prompts = _render(tokenizer, asked, {ending: True, **kwargs}, max_length)
        answered = [(draft.place, _with_response(draft, response)) for draft in members for response in draft.responses]
        wholes = iter(_render(tokenizer, answered, kwargs, max_length))
        for prompt, draft in zip(prompts, members, strict=True):
            _hand_out(prompt, [next(wholes) for _ in draft.responses], draft)
            if tokenizer.eos_token_id is not None:
                room = (max_length or 2**63) - len(draft.prompt_ids)
                ends = [ids for ids in draft.response_ids if len(ids) <= room]
                draft.endless = any(tokenizer.eos_token_id not in ids for ids in ends)


def _is_prefilled(draft: Draft) -> bool:
    """Whether the prompt ends with a turn of the assistant that all responses go on with, and not with a call."""
    turns = [draft.prompt[-1:], *(response[:1] for response in draft.responses)]
    return all(
        turn and turn[0].keys() == {"role", "content"} and turn[0]["role"] == "assistant" and turn[0]["content"]
        for turn in turns
    )


def _with_response(draft: Draft, response: list[Any]) -> list[Any]:
    if not draft.prefilled:
        return cast("list[Any]", draft.prompt + response)
    whole = {**response[0], "content": draft.prompt[-1]["content"] + response[0]["content"]}
    return [*draft.prompt[:-1], whole, *response[1:]]


def _renders_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template makes text of messages; a renderer of its own, such as Mistral's, gives token ids."""
    return type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template


def _render(
    tokenizer: Any, conversations: Sequence[tuple[str, list[Any]]], kwargs: Mapping[str, Any], max_length: int | None
) -> list[list[int]]:
    """Apply the chat template to ``(place, messages)`` in one go; look for the culprit only after a failure."""

    def token_ids(messages: list[Any]) -> Any:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]

    if _renders_text(tokenizer) and any(_is_long(_text_of(messages), max_length) for _, messages in conversations):
        return [ids for each in conversations for ids in _render_long(tokenizer, each, kwargs, max_length)]
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


def _render_long(
    tokenizer: PreTrainedTokenizerBase, each: tuple[str, list[Any]], kwargs: Mapping[str, Any], max_length: int | None
) -> list[list[int]]:
    """One conversation, of whose text no more is tokenised than needed."""
    place, messages = each
    if not _is_long(_text_of(messages), max_length):
        return _render(tokenizer, [each], kwargs, max_length)
    try:
        text = cast("str", tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
        return [_beginning(tokenizer, text, max_length or 0, add_special_tokens=False)]
    except Exception as error:  # as in _render
        why = _why(error, _text_of(messages))
        raise FlexdpoError(f"{place}: the chat template cannot render its messages: {why}") from error


def _text_of(value: Any) -> str:
    """All text in messages, for a look at its characters."""
    if isinstance(value, dict):
        return "".join(_text_of(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return "".join(map(_text_of, value))
    return value if isinstance(value, str) else ""


def _hand_out(prompt: list[int], wholes: Sequence[list[int]], draft: Draft) -> None:
    """Give a draft its tokens: those of the prompt, and those of the prompt with each response.

    The response starts where the prompt alone and the prompt with a response part: a template may render the
    prompt's end otherwise before a response, and tokens may merge across the border.
    """
    border = len(prompt)
    for whole in wholes:
        if whole[:border] != prompt[:border]:
            border = _common(prompt, whole)
    draft.retokenised = border < len(prompt)
    draft.prompt_ids = prompt[:border]
    draft.response_ids = [whole[border:] for whole in wholes]


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """How errors call a tokenizer."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
