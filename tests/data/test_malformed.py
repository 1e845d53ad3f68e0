"""Ten thousand malformed and odd rows: each is used, or skipped and counted, or refused by its number; nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexdpo.data.report import DataReport
from flexdpo.data.stream import StreamedPreferences
from flexdpo.data.tokenize import group_from_row, tokenize_preferences
from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import Group

ROWS_AT_ONCE = 12
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# --- values ----------------------------------------------------------------------------------------------------------

TEXTS = st.sampled_from(
    [
        "why is the sky blue? ", "rain", "rain and sun", "", " ", "\n\t ", "\u200b", "<eos>", "rain<eos>", "x" * 3000,
        "\x00", "\ufeff", "e\u0301", "\u202eabc", "\U0001f9d1\u200d\U0001f680", "\ud800", "half \udfff", "\uffff",
    ]
) | st.text(max_size=12)  # fmt: skip
ODD_LEAVES = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, 0.5, math.nan, math.inf, b"bytes", b"\xff", 1j, (), set(),
        object(), print, [], {}, [[]], [None], [{}], [""], [1, "a"], {"role": "user"}, {1: 2, "a": 3}, range(3),
    ]
)  # fmt: skip
ODD = ODD_LEAVES | st.lists(ODD_LEAVES, max_size=2) | st.dictionaries(TEXTS, ODD_LEAVES, max_size=2)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "", "us er", "\ud800"])
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": TEXTS}) | st.sampled_from(
    [
        {}, {"role": "user"}, {"content": "x"}, {"role": None, "content": "x"}, {"role": 3, "content": "x"},
        {"role": "user", "content": None}, {"role": "user", "content": 7}, {"role": "user", "content": math.nan},
        {"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "user", "content": [[["deep"]]]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, {"role": "assistant", "extra": {"a": 1}},
        "why?", None, 3, [], ["user", "why?"],
    ]
)  # fmt: skip
CHATS = st.lists(MESSAGE, max_size=3)
GOOD_CHAT = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), min_size=1, max_size=2)
IDS = st.lists(st.integers(0, 30), max_size=5)
ODD_IDS = st.sampled_from(
    [
        None,
        [-1],
        [10**6],
        [2**63],
        [2**70],
        [1.0],
        [math.nan],
        ["3"],
        [True],
        [None, 3],
        [[3]],
        [[]],
        "3 4",
        7,
        {},
        b"1",
    ]
)
EDGES = st.sampled_from(
    [[[0, 1]], [[1, 0]], [], None, [[0, 1], [1, 0]], [[0, 0]], [[0, 2]], [[0]], [0], 1, "01", [["a"]]]
)
TEXT_OR_ODD = TEXTS | TEXTS | TEXTS | ODD | CHATS
EXTRA = st.sampled_from(
    [
        {}, {}, {}, {"tools": "[]"}, {"tools": "{oops"}, {"tools": [{1: 2, "a": 3}]}, {"tools": 5}, {"score": math.nan},
        {"chat_template_kwargs": {"thinking": True}}, {"chat_template_kwargs": {1: 2}}, {"row": -5}, {"row": 2**70},
        {"chat_template_kwargs": {"return_tensors": "pt"}}, {"chat_template_kwargs": {"tokenize": False}},
        {"chat_template_kwargs": [1]}, {"chat_template_kwargs": {"padding": "max_length", "max_length": 4}},
        {"_skip": "x"}, {"labels": 3}, {"": 1}, {"edges ": []}, {"ref_response_logps": [math.nan, 0.0]},
    ]
)  # fmt: skip


def one_of_its_parts(**columns: Any) -> Any:
    """Rows with these columns, of which any may be missing but in the first row."""
    return st.fixed_dictionaries({}, optional=columns)


FORMS: dict[str, Any] = {
    "text": {"prompt": TEXT_OR_ODD, "chosen": TEXT_OR_ODD, "rejected": TEXT_OR_ODD},
    "implicit": {"chosen": TEXT_OR_ODD, "rejected": TEXT_OR_ODD},
    "chat": {"prompt": GOOD_CHAT | CHATS | ODD, "chosen": GOOD_CHAT | CHATS, "rejected": GOOD_CHAT | CHATS | ODD},
    "implicit chat": {"chosen": GOOD_CHAT | CHATS, "rejected": GOOD_CHAT | CHATS | ODD},
    "completion": {"prompt": TEXT_OR_ODD, "completion": TEXT_OR_ODD},
    "labelled": {"prompt": TEXTS | GOOD_CHAT, "completion": TEXT_OR_ODD, "label": st.booleans() | ODD},
    "TRL's ids": {"prompt_ids": IDS | ODD_IDS, "chosen_ids": IDS, "rejected_ids": IDS | ODD_IDS},
    "own ids": {"prompt_ids": IDS, "response_ids": st.lists(IDS, max_size=3) | ODD_IDS | ODD, "edges": EDGES},
}


@st.composite
def tables(draw: Any, form: str) -> list[dict[str, Any]]:
    """Rows of one form; values may be of any type, equal, or each other's beginnings."""
    columns = FORMS[form]
    rows = draw(st.lists(one_of_its_parts(**columns), min_size=ROWS_AT_ONCE, max_size=ROWS_AT_ONCE))
    rows[0] = dict.fromkeys(columns) | rows[0]
    for row in rows[:: draw(st.integers(2, 5))]:
        row.update(draw(EXTRA))
    responses = [name for name in columns if name in ("chosen", "rejected", "chosen_ids", "rejected_ids")]
    for row in rows[:: draw(st.integers(2, 7))]:
        first = row.get(responses[0]) if responses else None
        if isinstance(first, (str, list)):
            row[responses[1]] = first if draw(st.booleans()) else first[: len(first) // 2]
    return rows


# a stream hands rows over as they are, where a dataset in Arrow has one type per column
HELD: list[dict[str, Any]] = []


def held_rows() -> Iterator[dict[str, Any]]:
    yield from HELD


SOURCE = IterableDataset.from_generator(held_rows)

NONE_USABLE = re.compile(r"none of the \d+ rows can be used")
# many such rows are an error of the whole table: a wrong column, whatever else is wrong with single rows
EMPTY_PROMPTS = re.compile(r"^train: (\d+) of (\d+) rows have an empty prompt")

# --- what must hold --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(alphabet | {"<eos>": len(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def check_rows(rows: list[dict[str, Any]], tokenizer: Any, max_length: int | None) -> tuple[list[Any], int]:
    """Read rows until none is refused; returns what is left of them and how many were refused."""
    refused = 0
    while True:
        HELD[:] = rows
        stream = StreamedPreferences(SOURCE, tokenizer, max_length=max_length, endless=False)
        said = ""
        used: list[Any] = []
        try:
            for row in stream:
                used.append(row)
        except FlexdpoError as error:
            said = str(error)
        if said and not NONE_USABLE.search(said) and not EMPTY_PROMPTS.search(said):
            number = re.search(r"^train: row (\d+) \(counted from 0\)", said)
            assert number is not None, said
            assert "\n" not in said
            # the first row stands for the columns, so it loses its values instead
            at = int(number[1])
            instead = [{name: False if name == "label" else None for name in rows[0]}] if at == 0 else []
            rows = [*rows[:at], *instead, *rows[at + 1 :]]
            refused += 1
            continue
        require_account(stream.report, used, rows, max_length)
        empty = stream.report.skipped.get("empty prompt", 0)
        assert bool(EMPTY_PROMPTS.search(said)) == too_many_empty(rows, empty, len(used)), said
        require_counts(said, rows, empty)
        return rows, refused


def too_many_empty(rows: list[dict[str, Any]], empty: int, used: int) -> bool:
    """More than half where there is a prompt and some row has one, more than a tenth where it is a common beginning."""
    if any(name in rows[0] for name in ("prompt_ids", "response_ids")):
        return False
    if "prompt" in rows[0]:
        return used > 0 and empty > 0.5 * len(rows)
    return empty > 0.1 * len(rows)


def require_counts(said: str, rows: list[dict[str, Any]], empty: int | None = None) -> None:
    found = EMPTY_PROMPTS.search(said)
    if found:
        assert int(found[2]) == len(rows), said
        assert empty is None or int(found[1]) == empty, said


def require_account(report: DataReport, used: list[Any], rows: list[Any], max_length: int | None) -> None:
    assert report.rows == len(rows)
    assert report.used + sum(report.skipped.values()) == report.rows
    assert len(used) == report.used
    assert set(report.first_skipped) == set(report.skipped)
    assert report.longest == max(
        (len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in used), default=0
    )
    for row in used:
        group = group_from_row(row)
        assert isinstance(group, Group)
        assert max_length is None or max(len(sequence) for sequence in group.sequences) <= max_length


def check_dataset(rows: list[dict[str, Any]], tokenizer: Any, max_length: int | None) -> bool:
    """The same through a dataset in Arrow, where Arrow can hold such rows at all."""
    try:
        dataset = Dataset.from_list(rows)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return False
    said = ""
    try:
        tokenised = tokenize_preferences(dataset, tokenizer, max_length=max_length)
    except FlexdpoError as error:
        said = str(error)
    if EMPTY_PROMPTS.search(said):
        require_counts(said, rows)
        return True
    if said:
        # a column that holds no value anywhere may be read as another type than the rows beside it
        assert NONE_USABLE.search(said) or re.search(r"row \d+ \(counted from 0\)", said), said
        return True
    require_account(tokenised.report, list(tokenised.dataset), rows, max_length)
    return True


def read_tables(form: str, tokenizer: Any, tables_to_draw: int) -> None:
    seen = {"rows": 0, "refused": 0, "arrow": 0}

    @given(tables(form), st.sampled_from([None, 6, 64]))
    @settings(
        max_examples=tables_to_draw,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def read(rows: list[dict[str, Any]], max_length: int | None) -> None:
        left, refused = check_rows(rows, tokenizer, max_length)
        seen["rows"] += len(rows)
        seen["refused"] += refused
        seen["arrow"] += check_dataset(left, tokenizer, max_length)

    read()
    # not everything is refused, and not everything is taken
    assert 0 < seen["refused"] < seen["rows"]
    assert seen["arrow"] > 0
    assert seen["rows"] >= ROWS_AT_ONCE * tables_to_draw


# 8 forms, tables of 12 rows each: the first 2,400 rows of the 10,560
@pytest.mark.parametrize("tables_to_draw", [25, pytest.param(110, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_odd_rows_are_used_skipped_or_refused_by_number(form: str, tables_to_draw: int, tokenizer: Any) -> None:
    read_tables(form, tokenizer, tables_to_draw)
