"""One BOS before a prompt, one EOS behind a response, whoever writes them; and no more text tokenised than needed."""

from __future__ import annotations

import time
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, processors

from flexdpo.data import encode
from flexdpo.data.tokenize import tokenize_preferences
from tests.data.test_data import (
    TEMPLATE,
    build_tokenizer,
    byte_pairs,
    own_cache,
    text_rows,
    token_rows,
    tokenizer,
)

__all__ = ["byte_pairs", "own_cache", "tokenizer"]


def both_ends(byte_pairs: Tokenizer) -> Any:
    made = build_tokenizer(byte_pairs, bos=True)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return made


def ids_of(rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> tuple[list[list[Any]], Any]:
    made = tokenize_preferences(Dataset.from_list(rows), tokenizer, **{"max_length": None, **settings})
    return token_rows(made.dataset), made.report


@pytest.mark.parametrize("maker", ["bos", "both"])
def test_a_prompt_that_begins_with_bos(byte_pairs: Tokenizer, maker: str) -> None:
    tokenizer = build_tokenizer(byte_pairs, bos=True) if maker == "bos" else both_ends(byte_pairs)
    bare = text_rows(3)
    written = [{**row, "prompt": "<bos>" + row["prompt"]} for row in bare]
    want, _ = ids_of(bare, tokenizer)
    got, report = ids_of(written, tokenizer)
    assert got == want
    assert [ids[0][:2].count(tokenizer.bos_token_id) for ids in got] == [1, 1, 1]
    assert "a second BOS token before a prompt whose text begins with one left out in 3 rows, first at row 0" in (
        report.notes
    )


def test_a_tokenizer_that_writes_both_ends(byte_pairs: Tokenizer) -> None:
    want, report = ids_of(text_rows(5), build_tokenizer(byte_pairs, bos=True))
    got, with_eos = ids_of(text_rows(5), both_ends(byte_pairs))
    assert got == want
    assert with_eos.notes == report.notes


@pytest.mark.parametrize("end", ["<eos>", "<eos>\n", "<eos> \n\n", "<eos><eos>", ""])
def test_one_eos_whatever_the_text_ends_in(byte_pairs: Tokenizer, end: str) -> None:
    for made in (build_tokenizer(byte_pairs), both_ends(byte_pairs)):
        want, _ = ids_of(text_rows(3), made)
        got, _ = ids_of([{**row, "chosen": row["chosen"] + end} for row in text_rows(3)], made)
        assert got == want
        assert {ids.count(made.eos_token_id) for _, *responses in got for ids in responses} == {1}


def test_a_tokenizer_that_takes_special_tokens_apart(byte_pairs: Tokenizer) -> None:
    tokenizer = build_tokenizer(byte_pairs)
    want, _ = ids_of(text_rows(3), tokenizer)
    tokenizer.split_special_tokens = True
    assert tokenizer("<eos>")["input_ids"] != [tokenizer.eos_token_id]
    got, _ = ids_of(text_rows(3), tokenizer)
    assert got == want


def test_a_template_without_eos_is_named(byte_pairs: Tokenizer) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "why?"}], "completion": [{"role": "assistant", "content": text}]}
        for text in ("rain", "sun")
    ]
    note = "no EOS token in a response, since the chat template writes none, in 2 rows, first at row 0"
    assert note not in ids_of(rows, build_tokenizer(byte_pairs))[1].notes
    silent = build_tokenizer(byte_pairs, template=TEMPLATE.replace("<eos>", "."))
    assert note in ids_of(rows, silent)[1].notes


def said(column: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user" if column == "prompt" else "assistant", "content": text}]


# --- long texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["prompt", "chosen", "both"])
@pytest.mark.parametrize("kind", ["text", "chat", "implicit"])
def test_long_texts_give_the_same_tokens(
    byte_pairs: Tokenizer, monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    rows = text_rows(6)
    for row, more in zip(rows[::2], text_rows(3, seed=1), strict=True):
        long = " ".join([*more.values()] * 40)
        for column in ("chosen", "rejected") if place == "both" else (place,):
            row[column] += long
    if kind == "chat":
        rows = [
            {k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in r.items()} for r in rows
        ]
    elif kind == "implicit":
        rows = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
    tokenizer = build_tokenizer(byte_pairs, bos=True)
    want, whole = ids_of(rows, tokenizer, max_length=40)
    monkeypatch.setattr(encode, "_LONG", 300)
    monkeypatch.setattr(encode, "_LONG_FOR_A_TOKEN", 1)
    seen: list[str] = []
    beginning = encode._beginning
    monkeypatch.setattr(encode, "_beginning", lambda t, text, *a, **k: seen.append(text) or beginning(t, text, *a, **k))
    # a stream has no cache that would find the tokens of before
    batch = {column: [row[column] for row in rows] for column in rows[0]}
    settings = encode_settings(rows, tokenizer, 40)
    made = encode.tokenize_batch(batch, list(range(6)), tokenizer=tokenizer, settings=settings)
    used = [number for number, skip in enumerate(made["_skip"]) if not skip]
    assert [[made["prompt_ids"][n], *made["response_ids"][n]] for n in used] == want
    assert sum(made["_cut"]) >= whole.truncated
    assert seen


def encode_settings(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> Any:
    from flexdpo.data.layouts import settings_for

    return settings_for(list(rows[0]), max(tokenizer.get_vocab().values()), max_length, "train")


def test_fifty_megabytes_in_one_row_cost_seconds(tokenizer: Any) -> None:
    words = "the sky is blue and grass is green " * 1_500_000
    rows = [
        {"prompt": "why? ", "chosen": "yes " + words, "rejected": "no"},
        {"prompt": words, "chosen": "a", "rejected": "b"},
    ]
    chat = [{k: [{"role": "assistant" if k != "prompt" else "user", "content": v}] for k, v in rows[0].items()}]
    for some in (rows, chat):
        start = time.perf_counter()
        settings = encode_settings(some, tokenizer, 256)
        batch = {column: [row[column] for row in some] for column in some[0]}
        made = encode.tokenize_batch(batch, list(range(len(some))), tokenizer=tokenizer, settings=settings)
        assert time.perf_counter() - start < 20
        assert len(made["prompt_ids"][0]) + max(map(len, made["response_ids"][0])) == 256
        assert made["_cut"][0] == 1
