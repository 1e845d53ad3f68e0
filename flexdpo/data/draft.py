"""One example on its way from a row's values to token ids; rows are counted from 0, as ``dataset[row]`` does."""

from dataclasses import dataclass, field
from typing import Any

TOKENISED_COLUMNS = ("prompt_ids", "response_ids", "edges", "row")
# beside the other columns, only for responses that are labelled one by one
LABELS_COLUMN = "labels"
# beside the other columns, only of data with images: those of each prompt, in the order of their tokens
IMAGES_COLUMN = "prompt_images"
# read beside text or messages of any layout
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
IDENTICAL = "identical responses"
PROMPT_FILLS = "prompt alone fills max_length"
IDENTICAL_CUT = "identical responses once cut to max_length"
TIE = "no preference between the responses"
IMAGE_CUT = "an image cut to max_length or max_prompt_length"
SKIP_REASONS = (EMPTY_PROMPT, EMPTY_RESPONSE, IDENTICAL, PROMPT_FILLS, IDENTICAL_CUT, TIE, IMAGE_CUT)
# raise it when the same row gives other tokens than before: `datasets` caches by settings, not by this file's code
_REVISION = 5


def column_types(more: dict[str, Any]) -> Any:
    """The ``datasets.Features`` of a tokenised dataset, with those of further columns."""
    from datasets import Features, Value

    ids = Value("int32")
    return Features({"prompt_ids": [ids], "response_ids": [[ids]], "edges": [[ids]], "row": Value("int64"), **more})


@dataclass(frozen=True)
class Settings:
    """All that decides, beside the tokenizer, what a row becomes; part of the cache's key.

    Attributes:
        layout: One of ``LAYOUTS``.
        largest_id: Of the tokenizer, for rows of token ids.
        prompt: The column that holds the prompt and those that go on with it; empty where the responses begin with it.
        system: The column of a system prompt; where there is one, text becomes messages.
        turns: The column of earlier turns, as pairs of a question and its answer.
        images: Columns that hold the images of the prompt; ``None`` where no processor reads them.
        media: Columns that must be empty.
        unread: Columns that are not read.
        prompt_like: Those of them that must hold no text of their own.
        max_prompt_length: Most tokens of a prompt, which loses its beginning.
    """

    layout: str
    max_length: int | None
    largest_id: int | None = None
    prompt: tuple[str, ...] = ()
    system: str | None = None
    turns: str | None = None
    images: tuple[str, ...] | None = None
    media: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    prompt_like: tuple[str, ...] = ()
    max_prompt_length: int | None = None
    revision: int = _REVISION


@dataclass
class Draft:
    """One row on its way from text to token ids.

    Attributes:
        place: How errors call the row.
        columns: Where each response stands.
        pictures: The images of the prompt as the data hold them, and then as ``IMAGES_COLUMN`` does.
    """

    row: int
    place: str
    prompt: Any = None
    columns: list[str] = field(default_factory=list)
    responses: list[Any] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    is_chat: bool = False
    pictures: list[Any] = field(default_factory=list)
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
    decoded: bool = False
    echoed: bool = False
    dialogue: bool = False
    endless: bool = False
    doubled: bool = False
    prefilled: bool = False
    shortened: bool = False
    ties: int = 0
    unjudged: int = 0
    longest: int = 0


# what happened to rows that are used all the same
NOTES = {
    "_extracted": "prompt taken from the common beginning of chosen and rejected",
    "_repeated": "prompt taken off the beginning of responses that repeat its messages",
    "_decoded": "messages read from JSON text",
    "_echoed": "responses begin with the text of the prompt, which so stands twice,",
    "_dialogue": "responses hold turns of the user, which are learned too,",
    "_untold": "tools and chat_template_kwargs left out, since text goes through no chat template,",
    "_promptless": "empty prompt, before which the tokenizer puts a token of its own,",
    "_retokenised": "prompt end re-tokenised, because it renders or merges otherwise before a response,",
    "_endless": "no EOS token in a response, since the chat template writes none,",
    "_prefilled": "responses go on with the assistant's turn that the prompt ends with",
    "_doubled": "a second BOS token before a prompt whose text begins with one left out",
    "_shortened": "prompt cut on its left to max_prompt_length",
    "_ties": "preferences between identical responses left out",
    "_unjudged": "responses without text or without a preference left out",
}
# `_cut` of `_responses` were cut to max_length; `_whole` tokens had the longest, its prompt included, before that
STATUS_COLUMNS = ("_skip", "_responses", "_cut", "_whole", "_longest", *NOTES)
