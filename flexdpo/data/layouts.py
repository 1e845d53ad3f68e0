"""The layouts that preferences come in: each is recognised by its columns and read into responses and preferences."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

from flexdpo.data.columns import prompt_like
from flexdpo.data.draft import TEMPLATE_COLUMNS, TIE, Draft, Settings
from flexdpo.data.ids import read_own_ids, read_pair_ids
from flexdpo.data.messages import as_messages, decoded
from flexdpo.errors import FlexdpoError, found, nearest, quoted

Values = Mapping[str, Any]
Verdicts = Mapping[str, int | None]


@dataclass(frozen=True)
class Layout:
    """How rows with certain columns are read.

    Attributes:
        name: How the report calls it.
        read: Fills a draft's ``responses`` and ``columns``, and its ``edges`` or ``labels``, from a row's values; token
            ids are given the tokenizer's largest id too.
        whole: The responses may be whole texts or conversations, whose common beginning is the prompt.
        labelled: Each response is good or bad by itself.
        ids: The columns hold token ids.
    """

    name: str
    read: Callable[..., None]
    whole: bool = False
    labelled: bool = False
    ids: bool = False


# --- two responses ---------------------------------------------------------------------------------------------------


def _take(draft: Draft, values: Values, *columns: str) -> None:
    draft.columns, draft.responses = list(columns), [values[column] for column in columns]


def _pair(draft: Draft, values: Values, chosen: str, rejected: str) -> None:
    _take(draft, values, chosen, rejected)
    draft.edges = [[0, 1]]


def _alone(draft: Draft, values: Values, column: str) -> None:
    _take(draft, values, column)


def _answered(draft: Draft, values: Values) -> None:
    """The whole chosen conversation, and another answer to its last question as text."""
    whole = as_messages(decoded(values["messages"], draft.place, "messages"), draft.place, "messages")
    if not isinstance(whole, list) or len(whole) < 2 or whole[-1]["role"] != "assistant":
        raise FlexdpoError(
            f"{draft.place}, column 'messages': expected a conversation that ends with the assistant's chosen answer, "
            f"found {found(values['messages'])}"
        )
    draft.prompt, draft.columns = whole[:-1], ["messages", "rejected_response"]
    draft.responses, draft.edges = [whole[-1:], values["rejected_response"]], [[0, 1]]


def _better(draft: Draft, values: Values, first: str, second: str, which: int | None) -> None:
    """The better one of two responses is chosen, ``which`` says 0 or 1, or ``None`` for neither."""
    _pair(draft, values, *((second, first) if which else (first, second)))
    if which is None:
        draft.skip = TIE


def _judged(draft: Draft, values: Values, first: str, second: str, column: str, verdicts: Verdicts) -> None:
    """Two responses, and a verdict in a word."""
    said = _word(values[column])
    if said and said not in verdicts:
        known = quoted(verdicts)
        raise FlexdpoError(f"{draft.place}, column {column!r}: expected one of {known}, found {found(values[column])}")
    _better(draft, values, first, second, verdicts.get(said))


def _signed(draft: Draft, values: Values, first: str, second: str, column: str) -> None:
    """Two responses and a number, which is negative where the first is better and 0 at a tie."""
    strength = _number(draft, values[column], column)
    _better(draft, values, first, second, int(strength > 0) if strength else None)


def _scored(draft: Draft, values: Values, first: str, second: str, scores: tuple[str, str]) -> None:
    """Two responses, and the score of each."""
    one, other = (_number(draft, values[column], column) for column in scores)
    tie = one is None or other is None or one == other
    _better(draft, values, first, second, None if tie else int(other > one))  # type: ignore[operator]


# --- many responses --------------------------------------------------------------------------------------------------


def _listed(draft: Draft, values: Values, responses: str, numbers: str, sign: int) -> None:
    """A list of responses beside a list of their scores (``sign`` 1) or ranks (-1)."""
    texts, given = _list(draft, values, responses), _list(draft, values, numbers)
    if len(texts) != len(given):
        raise FlexdpoError(
            f"{draft.place}: {len(texts)} values in column {responses!r} and {len(given)} in {numbers!r}; give each "
            "response one"
        )
    draft.responses, draft.columns = texts, [f"{responses}[{n}]" for n in range(len(texts))]
    _prefer(draft, [_number(draft, value, numbers) for value in given], sign)


_ANSWERS = ("response", "completion", "answer", "generation", "output", "text")
_SIGN_OF = {"overall_score": 1, "score": 1, "rating": 1, "reward": 1, "rank": -1}


def _dicts(draft: Draft, values: Values, column: str) -> None:
    """A list of dicts, each with a response and its score or rank."""
    entries = _list(draft, values, column)
    keys: list[str] = [key for entry in entries if isinstance(entry, dict) for key in entry]
    answer = next((key for key in _ANSWERS if key in keys), None)
    number = next((key for key in _SIGN_OF if key in keys), None)
    if answer is None or number is None or not all(isinstance(entry, dict) for entry in entries):
        raise FlexdpoError(
            f"{draft.place}, column {column!r}: expected a list of dicts with a response ({quoted(_ANSWERS)}) and its "
            f"score or rank ({quoted(_SIGN_OF)}), found {found(entries)}"
        )
    draft.responses, draft.columns = [e.get(answer) for e in entries], [f"{column}[{n}]" for n in range(len(entries))]
    _prefer(draft, [_number(draft, entry.get(number), f"{column}.{number}") for entry in entries], _SIGN_OF[number])


def _best_first(draft: Draft, values: Values, column: str) -> None:
    """A list of two responses, the better one first."""
    texts = _list(draft, values, column)
    if len(texts) != 2:
        raise FlexdpoError(
            f"{draft.place}, column {column!r}: expected two responses, the better one first, found {found(texts)}"
        )
    draft.responses, draft.columns, draft.edges = texts, [f"{column}[0]", f"{column}[1]"], [[0, 1]]


def _prefer(draft: Draft, numbers: Sequence[float | None], sign: int) -> None:
    """Prefer every response to those whose number is smaller (larger, for ranks); equal ones make no preference."""
    known = {n: sign * number for n, number in enumerate(numbers) if number is not None}
    draft.edges = [[a, b] for a, b in permutations(known, 2) if known[a] > known[b]]
    if not draft.edges:
        draft.skip = TIE


# --- labels ----------------------------------------------------------------------------------------------------------

_LABELS = {
    **dict.fromkeys(("true", "1", "yes", "good", "desirable", "chosen", "accepted"), True),
    **dict.fromkeys(("false", "0", "-1", "no", "bad", "undesirable", "rejected"), False),
}


def _labelled(draft: Draft, values: Values, column: str, label: str) -> None:
    said = _word(values[label])
    if said not in _LABELS:
        raise FlexdpoError(
            f"{draft.place}, column {label!r}: expected true or false (also {quoted(_LABELS)}), found "
            f"{found(values[label])}"
        )
    _take(draft, values, column)
    draft.labels = [_LABELS[said]]


# --- values ----------------------------------------------------------------------------------------------------------


def _word(value: Any) -> str:
    """A label or a verdict as one word: 1, 1.0, "1" and "1.0" are the same, and so are True and "true"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = "" if value is None else str(value).strip().lower()
    return word[:-2] if word.endswith(".0") and word[:-2].lstrip("-").isdigit() else word


def _number(draft: Draft, value: Any, column: str) -> float | None:
    """A score or rank, which CSV files hold as text; ``None`` where there is none."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "none", "null")):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise FlexdpoError(f"{draft.place}, column {column!r}: expected a number, found {found(value)}") from None
    return None if math.isnan(number) else number


def _list(draft: Draft, values: Values, column: str) -> list[Any]:
    value = values[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            value = values[column]
    if value is not None and not isinstance(value, list):
        raise FlexdpoError(f"{draft.place}, column {column!r}: expected a list, found {found(value)}")
    return value or []


# --- the registry ----------------------------------------------------------------------------------------------------

_FIRST_OF = {"a": 0, "model_a": 0, "response_a": 0, "b": 1, "model_b": 1, "response_b": 1}
_VERDICTS = {**_FIRST_OF, **dict.fromkeys(("tie", "tie (bothbad)", "bothbad", "both_bad"))}


def _pairs(chosen: str, rejected: str, name: str = "preferences", **more: Any) -> dict[str, Layout]:
    read = partial(_pair, chosen=chosen, rejected=rejected)
    return {f"{chosen} {rejected}": Layout(name, read, whole=True, **more)}


def _verdicts(first: str, second: str, column: str, name: str, verdicts: Verdicts) -> dict[str, Layout]:
    read = partial(_judged, first=first, second=second, column=column, verdicts=verdicts)
    return {f"{first} {second} {column}": Layout(name, read, whole=first == "conversation_a")}


def _strengths(first: str, second: str, column: str, name: str) -> dict[str, Layout]:
    return {f"{first} {second} {column}": Layout(name, partial(_signed, first=first, second=second, column=column))}


OWN_LAYOUT = "prompt_ids response_ids edges"
# the first whose columns are all there: a dataset that was tokenised in place still has its text beside the ids
LAYOUTS: dict[str, Layout] = {
    OWN_LAYOUT: Layout("token ids", read_own_ids, ids=True),
    "prompt_ids chosen_ids rejected_ids": Layout("TRL's token ids", read_pair_ids, ids=True),
    **_pairs("chosen", "rejected"),
    **_pairs("chosen_messages", "rejected_messages"),
    **_pairs("chosen_response", "rejected_response"),
    **_pairs("accepted", "rejected"),
    **_pairs("preferred_output", "non_preferred_output", "OpenAI's preferences"),
    **_pairs("messages", "rejected_messages", "ms-swift preferences"),
    "messages rejected_response": Layout("ms-swift preferences", _answered),
    **_verdicts(
        "response_0", "response_1", "better_response_id", "preferences by the better one's id", {"0": 0, "1": 1}
    ),
    **_verdicts("human_ref_A", "human_ref_B", "labels", "SHP preferences", {"1": 0, "0": 1}),
    **_verdicts("conversation_a", "conversation_b", "winner", "Chatbot Arena battles", _VERDICTS),
    **_verdicts("response_a", "response_b", "winner", "battles", _VERDICTS),
    **_strengths("response_1", "response_2", "preference_strength", "HelpSteer2 preferences"),
    **_strengths("response1", "response2", "overall_preference", "HelpSteer3 preferences"),
    **{
        f"{first} {second} {a} {b}": Layout(name, partial(_scored, first=first, second=second, scores=(a, b)))
        for first, second, a, b, name in (
            ("answer_0", "answer_1", "score_0", "score_1", "WebGPT comparisons"),
            ("response_a", "response_b", "score_a", "score_b", "scored pairs"),
            ("response_1", "response_2", "score_1", "score_2", "scored pairs"),
        )
    },
    **{
        f"{responses} {numbers}": Layout(
            f"{'rank' if sign < 0 else 'scor'}ed responses",
            partial(_listed, responses=responses, numbers=numbers, sign=sign),
        )
        for responses in ("responses", "generations", "completions", "answers", "candidates")
        for numbers, sign in (("ranks", -1), ("scores", 1), ("ratings", 1), ("rating", 1))
    },
    **{
        f"{column} {label}": Layout(
            "labelled responses", partial(_labelled, column=column, label=label), labelled=True, whole=column[-1] == "s"
        )
        for column in ("completion", "response", "output", "messages", "conversations")
        for label in ("label", "kto_tag")
    },
    **{
        column: Layout("responses with scores or ranks", partial(_dicts, column=column))
        for column in ("completions", "answers", "responses", "generations")
    },
    "completion": Layout("prompts and completions", partial(_alone, column="completion")),
    "output": Layout("comparisons, the better one first,", partial(_best_first, column="output")),
}

# where a prompt stands if there is no column of the first name, and how data are called that have it there; behind
# it, columns whose text goes on with it
PROMPTS: dict[tuple[str, ...], str] = {
    ("prompt",): "",
    ("conversations",): "ShareGPT ",
    ("conversation",): "conversation ",
    ("trajectory",): "UltraInteract ",
    ("messages",): "",
    ("instruction", "input"): "Alpaca ",
    ("question",): "",
    ("query",): "",
    ("problem",): "",
    ("input",): "",
    ("context",): "",
    ("history",): "",
}
_SYSTEM = ("system", "system_prompt", "system_message")
_IMAGES = ("images", "image")
_MEDIA = ("videos", "video", "audios", "audio")


def settings_for(
    columns: Sequence[str], largest_id: int | None, max_length: int | None, name: str, *, images: bool = False
) -> Settings:
    """Find how rows with these columns are read; ``images`` says whether a processor is there for those of prompts.

    Raises:
        FlexdpoError: if no known set of columns is among them, or nothing says which is the prompt.
    """
    key = _find(columns, name)
    layout, own = LAYOUTS[key], key.split()
    if layout.ids:
        # our own rows keep all that stands beside them
        unread = () if key == OWN_LAYOUT else tuple(column for column in columns if column not in own)
        return Settings(key, max_length, largest_id, unread=unread)
    prompt = next((p for p in PROMPTS if p[0] in columns and p[0] not in own), ())
    prompt = tuple(column for column in prompt if column in columns)
    if not prompt and not layout.whole and layout.read is not _answered:
        raise FlexdpoError(
            f"{name}: {layout.name} in {quoted(own)}, and no column is known to hold their prompt among "
            f"{quoted(columns)}; say which one does, as in columns={{'prompt': 'question'}} (--columns prompt=question)"
        )
    free = [column for column in columns if column not in (*own, *prompt)]
    system = next((column for column in _SYSTEM if column in free), None)
    turns = "history" if "history" in free and prompt[:1] == ("instruction",) else None
    pictures = tuple(column for column in _IMAGES if column in free)
    read = (system, turns, *TEMPLATE_COLUMNS, *(pictures if images else ()))
    unread = tuple(column for column in free if column not in read)
    like = prompt_like(unread, has_prompt=prompt[:1] == ("prompt",))
    media = tuple(column for column in (*(() if images else _IMAGES), *_MEDIA) if column in columns)
    return Settings(
        key,
        max_length,
        prompt=prompt,
        system=system,
        turns=turns,
        images=pictures if images else None,
        media=media,
        unread=unread,
        prompt_like=like,
    )


def described(settings: Settings) -> str:
    """How the report says what was recognised."""
    layout = LAYOUTS[settings.layout]
    prefix = next((called for p, called in PROMPTS.items() if p[:1] == settings.prompt[:1]), "")
    before = [column for column in (settings.system, settings.turns) if column]
    return f"{prefix}{layout.name}: {', '.join([*before, *settings.prompt, *settings.layout.split()])}"


def _find(columns: Sequence[str], name: str) -> str:
    """Name the first layout whose columns are all there."""
    for key in LAYOUTS:
        if set(key.split()) <= set(columns):
            return key
    wanted = ("prompt", "chosen", "rejected", "completion", "label", "prompt_ids", "response_ids", "edges")
    hints = [f"; {c!r}:{hint[1:]}" for c in columns if c not in wanted and (hint := nearest(c, wanted))]
    raise FlexdpoError(
        f"{name}: no preference columns; found {quoted(columns)}; wanted 'prompt' (or none, if the others begin with "
        "it), 'chosen', 'rejected'; or 'prompt', 'completion', 'label'; or 'prompt', 'responses', 'ranks' or 'scores'; "
        "or another layout of README's list; say which column is which, as in columns={'prompt': 'question', "
        f"'chosen': 'response_j'}} (--columns prompt=question,chosen=response_j){''.join(hints)}"
    )
