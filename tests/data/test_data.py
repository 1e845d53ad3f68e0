"""Preference data: loading, tokenisation equal to a plain loop, and an account of every row."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import os
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets.table import MemoryMappedTable
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flexdpo.data import file_formats
from flexdpo.data.cache import tokenizer_digest
from flexdpo.data.draft import SKIP_REASONS, TOKENISED_COLUMNS
from flexdpo.data.ids import longest_if_usable
from flexdpo.data.lengths import token_counts
from flexdpo.data.load import load_preference_dataset
from flexdpo.data.regroup import regroup_by_prompt
from flexdpo.data.report import DataReport
from flexdpo.data.tokenize import group_from_row, require_special_tokens, tokenize_preferences
from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import Group

TEMPLATE = (
    "{{ '<think>' if thinking }}{% if tools %}[tools {{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# the prompt alone ends in a token that the whole conversation does not have there
PROMPT_ENDS_OTHERWISE = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
WORDS = ["the", "sky", "is", "blue", "and", "green", "what", "has", "grass", "why", "not", "of", "rain", "sun", "42"]


def text_of(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"{text_of(rng, rng.integers(3, 9))}? ",
            "chosen": f"yes {text_of(rng, rng.integers(1, 9))}",
            "rejected": f"no {text_of(rng, rng.integers(1, 9))}",
        }
        for _ in range(count)
    ]


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in text_rows(count, seed)
    ]


@pytest.fixture(scope="module")
def byte_pairs() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(row.values()) for row in text_rows(200)], trainer)
    return bpe


def build_tokenizer(
    bpe: Tokenizer, *, bos: bool = False, eos: bool = True, template: str | None = TEMPLATE
) -> PreTrainedTokenizerFast:
    own = Tokenizer.from_str(bpe.to_str())
    if bos:
        own.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = {"bos_token": "<bos>"} | ({"eos_token": "<eos>"} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(byte_pairs: Tokenizer) -> PreTrainedTokenizerFast:
    return build_tokenizer(byte_pairs)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keep the datasets of these tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def plain_loop(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_length: int | None = None) -> list[Any]:
    """Tokenise one row with explicit prompt, by the definition: ``[prompt_ids, chosen_ids, rejected_ids]``."""
    answers = [row[column] for column in ("chosen", "rejected") if column in row]
    if isinstance(row["prompt"], str):
        ends = [a if a.endswith(tokenizer.eos_token) else a + tokenizer.eos_token for a in answers]
        prompt = tokenizer(row["prompt"])["input_ids"]
        wholes = [tokenizer(row["prompt"] + end)["input_ids"] for end in ends]
    else:
        kwargs = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **kwargs)["input_ids"]
        wholes = [tokenizer.apply_chat_template(row["prompt"] + a, **kwargs)["input_ids"] for a in answers]
    border = len(prompt)
    while any(whole[:border] != prompt[:border] for whole in wholes):
        border -= 1
    return [prompt[:border], *(whole[border:max_length] for whole in wholes)]


def token_rows(dataset: Dataset) -> list[list[Any]]:
    return [[row["prompt_ids"], *row["response_ids"]] for row in dataset]


# --- loading ---------------------------------------------------------------------------------------------------------


def write_jsonl(path: Any, rows: list[Any]) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save(rows: list[dict[str, Any]], folder: Any, ending: str) -> Any:
    path, lines = folder / f"pairs{ending}", "".join(json.dumps(row) + "\n" for row in rows)
    writers = {
        ".jsonl": lambda: path.write_text(lines),
        ".jsonl.gz": lambda: path.write_bytes(gzip.compress(lines.encode())),
        ".jsonl.bz2": lambda: path.write_bytes(bz2.compress(lines.encode())),
        ".json": lambda: path.write_text(json.dumps(rows, indent=2)),
        ".parquet": lambda: Dataset.from_list(rows).to_parquet(path),
        ".arrow": lambda: Dataset.from_list(rows).save_to_disk(folder / "saved"),
        ".csv": lambda: Dataset.from_list(rows).to_csv(path),
        ".csv.gz": lambda: Dataset.from_list(rows).to_pandas().to_csv(path, index=False),
        ".tsv": lambda: Dataset.from_list(rows).to_csv(path, sep="\t"),
    }
    writers[ending]()
    return next((folder / "saved").glob("*.arrow")) if ending == ".arrow" else path


FILE_ENDINGS = [".jsonl", ".jsonl.gz", ".jsonl.bz2", ".json", ".parquet", ".arrow", ".csv", ".csv.gz", ".tsv"]


@pytest.mark.parametrize("ending", FILE_ENDINGS)
def test_every_file_format_gives_the_rows_back(tmp_path: Any, ending: str) -> None:
    rows = text_rows(5)
    assert load_preference_dataset(str(save(rows, tmp_path, ending))).to_list() == rows


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_messages_survive_the_file(tmp_path: Any, ending: str) -> None:
    rows = chat_rows(4)
    assert load_preference_dataset(str(save(rows, tmp_path, ending))).to_list() == rows


def test_messages_of_unlike_keys_survive_jsonl(tmp_path: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = chat_rows(3)
    rows[1]["chosen"][0]["tool_calls"] = [{"name": "f", "arguments": {"x": 1}}]
    rows[2]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    dataset = load_preference_dataset(str(save(rows, tmp_path, ".jsonl")))
    tokenised = tokenize_preferences(dataset, tokenizer, max_length=None).dataset
    assert token_rows(tokenised) == [plain_loop(row, tokenizer) for row in rows]


def test_csv_cells_are_text_as_written(tmp_path: Any) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("\ufeff,prompt,chosen,rejected\n0,1+1?,2,None\n1,NA,nan,\n", encoding="utf-8")
    dataset = load_preference_dataset(str(path))
    assert dataset["prompt"][:] == ["1+1?", "NA"]
    assert dataset["chosen"][:] == ["2", "nan"]
    assert dataset["rejected"][:] == ["None", ""]


def test_saved_dataset_folder(tmp_path: Any) -> None:
    rows = text_rows(4)
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(rows[:3]), dev=Dataset.from_list(rows[3:])).save_to_disk(tmp_path / "two")
    assert load_preference_dataset(str(tmp_path / "one")).to_list() == rows
    assert load_preference_dataset(str(tmp_path / "two")).to_list() == rows[:3]
    assert load_preference_dataset(str(tmp_path / "two"), split="dev").to_list() == rows[3:]
    with pytest.raises(FlexdpoError, match=r"two: no split 'test'; found 'train', 'dev'"):
        load_preference_dataset(str(tmp_path / "two"), split="test")
    with pytest.raises(FlexdpoError, match=r"one: no split 'test'; the folder holds a single one, 'train'"):
        load_preference_dataset(str(tmp_path / "one"), split="test")


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_folder_of_data_files(tmp_path: Any, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = text_rows(5)
    folder = tmp_path / "json"  # also the name of one of the library's readers
    for split, part in (("train", rows[:3]), ("test", rows[3:])):
        (folder / split).mkdir(parents=True)
        save(part, folder / split, ending)
    monkeypatch.chdir(tmp_path)
    assert load_preference_dataset("json").to_list() == rows[:3]
    assert load_preference_dataset(str(folder), split="test").to_list() == rows[3:]
    with pytest.raises(FlexdpoError, match=r"json: no split 'dev'; by their names its files are 'train', 'test'"):
        load_preference_dataset(str(folder), split="dev")


def test_a_folder_says_which_of_its_files_it_leaves_out(tmp_path: Any, caplog: Any, monkeypatch: Any) -> None:
    rows = text_rows(4)
    for name, part in (("train", rows[:1]), ("test", rows[1:2]), ("more", rows[2:])):
        save(part, tmp_path, ".jsonl").rename(tmp_path / f"{name}.jsonl")
    # beside pictures, all files were once taken for one split, those to test on too
    (tmp_path / "train.png").touch()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for streaming in (False, True):
        assert list(load_preference_dataset(str(tmp_path), streaming=streaming)) == rows[:1]
        assert "'more.jsonl' is left out: its name says no split, where those of others do" in caplog.text
        caplog.clear()


def test_names_of_pictures_say_no_split(tmp_path: Any) -> None:
    save(text_rows(2), tmp_path, ".jsonl")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "one.png").touch()
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".hidden.csv").touch()
    assert load_preference_dataset(str(tmp_path)).to_list() == text_rows(2)


def test_a_folder_of_links_as_in_the_cache_of_the_hub(tmp_path: Any) -> None:
    (tmp_path / "snapshot").mkdir()
    for split, rows in (("train", text_rows(2)), ("test", text_rows(1))):
        save(rows, tmp_path, ".jsonl").rename(tmp_path / f"blob-{split}")
        (tmp_path / "snapshot" / f"{split}.jsonl").symlink_to(tmp_path / f"blob-{split}")
    assert load_preference_dataset(str(tmp_path / "snapshot")).to_list() == text_rows(2)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_read_whole_or_not_at_all(tmp_path: Any, streaming: bool) -> None:
    for kinds in ((".jsonl", ".csv"), (".jsonl", ".parquet"), (".csv", ".tsv")):
        folder = tmp_path / "".join(kinds)
        folder.mkdir()
        for kind in kinds:
            save(text_rows(2), folder, kind)
        with pytest.raises(FlexdpoError, match=r"'pairs\.\w+', 'pairs\.\w+' are of different formats, .*load_mixture"):
            load_preference_dataset(str(folder), streaming=streaming)


OTHER_COLUMNS = {
    ".csv": [{"system": "x"}, {"question": "x", "prompt": None}],
    ".jsonl": [{"system": "x"}, {"question": "x", "prompt": None}, {"prompt": [{"role": "user", "content": "x"}]}],
    ".parquet": [{"system": "x"}, {"question": "x", "prompt": None}],
}


@pytest.mark.parametrize(("ending", "change"), [(end, each) for end in OTHER_COLUMNS for each in OTHER_COLUMNS[end]])
def test_the_file_with_other_columns_is_named(tmp_path: Any, ending: str, change: dict[str, Any]) -> None:
    one, *_ = rows = text_rows(2)
    other = {key: value for key, value in {**one, **change}.items() if value is not None}
    for name, part in (("a", rows), ("b", rows), ("c", [other])):
        save(part, tmp_path, ending).rename(tmp_path / f"{name}{ending}")
    message = rf"c\{ending}: (has the|the) column.*, where a\{ending} (has|holds) .*; give all"
    with pytest.raises(FlexdpoError, match=message):
        load_preference_dataset(str(tmp_path))


def test_tsv_files_and_json_documents_of_a_folder_are_read_as_they_are_alone(tmp_path: Any) -> None:
    rows = [{"prompt": "NA", "chosen": "42", "rejected": "007"}]
    for name, ending in (("lines", ".tsv"), ("within", ".json")):
        (tmp_path / name).mkdir()
        save(rows, tmp_path / name, ending)
    (tmp_path / "within" / "pairs.json").write_text(json.dumps({"data": rows}))
    assert load_preference_dataset(str(tmp_path / "lines")).to_list() == rows
    assert load_preference_dataset(str(tmp_path / "within")).to_list() == rows


def test_slices_and_unknown_splits_of_a_file(tmp_path: Any) -> None:
    path = str(save(text_rows(6), tmp_path, ".jsonl"))
    assert load_preference_dataset(path, split="train[:2]").to_list() == text_rows(6)[:2]
    with pytest.raises(FlexdpoError, match=r"Unknown split \"test\".*\['train'\]"):
        load_preference_dataset(path, split="test")
    with pytest.raises(FlexdpoError, match=r"split='train\[:2\]' takes parts of a split, .*; name one split"):
        load_preference_dataset(path, split="train[:2]", streaming=True)


def test_a_folder_of_several_configurations(tmp_path: Any) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, rows in (("one", text_rows(1)), ("two", text_rows(2))):
        save(rows, tmp_path, ".jsonl").rename(tmp_path / f"{name}.jsonl")
    assert load_preference_dataset(str(tmp_path), config_name="two").to_list() == text_rows(2)
    for name in (None, "three"):
        with pytest.raises(FlexdpoError, match=r"'one', 'two'.*; name one with config_name \(--dataset_config\)"):
            load_preference_dataset(str(tmp_path), config_name=name)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(FlexdpoError, match=r"README\.md: its header cannot be read .*; mend or remove it"):
        load_preference_dataset(str(tmp_path))


@pytest.mark.parametrize(("ending", "sep"), [(".csv", ","), (".tsv", "\t"), (".csv", ";")])
def test_cells_are_text_where_a_folder_declares_its_files(tmp_path: Any, ending: str, sep: str) -> None:
    """And each configuration has columns of its own."""
    declared = "  sep: ';'\n" if sep == ";" else ""
    configs = "".join(f"- config_name: {name}\n  data_files: {name}{ending}\n{declared}" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, more in (("one", "note"), ("two", "rating")):
        rows = [["prompt", "chosen", "rejected", more], ["p", "42", "7", "a"], ["q", "NA", "x", "1"]]
        (tmp_path / f"{name}{ending}").write_text("".join(sep.join(row) + "\n" for row in rows))
    for name, more in (("one", "note"), ("two", "rating")):
        first, second = load_preference_dataset(str(tmp_path), config_name=name).to_list()
        assert first == {"prompt": "p", "chosen": "42", "rejected": "7", more: "a"}
        assert second == {"prompt": "q", "chosen": "NA", "rejected": "x", more: "1"}


@pytest.mark.parametrize(
    "name",
    ["./pairs", "/no/where", "a/b/c", "~/no-such-thing", "sub/pairs.csv.gz"]
    + [f"pairs{ending}" for ending in file_formats.READER_OF_SUFFIX]
    + [f"pairs.json{ending}" for ending in file_formats.OPENER_OF_SUFFIX if ending],
)
def test_missing_path_is_said_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(FlexdpoError, match=r"^" + name + ": no such file or folder"):
        load_preference_dataset(name)


def test_missing_file_suggests_its_neighbour(tmp_path: Any) -> None:
    save(text_rows(1), tmp_path, ".jsonl")
    with pytest.raises(FlexdpoError, match=r"no such file or folder; did you mean 'pairs\.jsonl'\?"):
        load_preference_dataset(str(tmp_path / "pair.jsonl"))


BAD_LINES = {
    '{"prompt": "a", ': r"not valid JSON \(Expecting property name enclosed in double quotes, column 1\d\)",
    "prompt,chosen": r"not valid JSON \(Expecting value, column 1\)",
    "[1, 2]": r"expected a JSON object, found list \(\[1, 2\]\)",
    '"text"': r"expected a JSON object, found str \('text'\)",
    b'{"prompt": "\xe9"}': r"not UTF-8 text; convert the file to UTF-8",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=repr)
@pytest.mark.parametrize("place", [0, 16])
def test_unreadable_line_is_named(tmp_path: Any, bad: str | bytes, place: int, caplog: Any) -> None:
    lines: list[bytes] = [json.dumps(row).encode() for row in text_rows(20)]
    lines[place] = bad.encode() if isinstance(bad, str) else bad
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    # the library's loggers do not propagate to the root
    logging.getLogger("datasets").addHandler(caplog.handler)
    with pytest.raises(FlexdpoError, match=rf"pairs\.jsonl, line {place + 1}: {BAD_LINES[bad]}"):
        load_preference_dataset(str(path))
    logging.getLogger("datasets").removeHandler(caplog.handler)
    assert not caplog.messages


def test_unreadable_line_in_other_places(tmp_path: Any) -> None:
    broken = "".join(json.dumps(row) + "\n" for row in text_rows(3)) + "{oops\n"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.jsonl").write_text(broken)
    save(text_rows(3), tmp_path / "folder", ".jsonl")
    with pytest.raises(FlexdpoError, match=r"folder/b\.jsonl, line 4: not valid JSON"):
        load_preference_dataset(str(tmp_path / "folder"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(broken.encode()))
    with pytest.raises(FlexdpoError, match=r"b\.jsonl\.gz, line 4: not valid JSON"):
        load_preference_dataset(str(tmp_path / "b.jsonl.gz"))
    (tmp_path / "cut.json").write_text(json.dumps(text_rows(3), indent=1)[:-30])
    with pytest.raises(FlexdpoError, match=r"cut\.json, line 15: not valid JSON"):
        load_preference_dataset(str(tmp_path / "cut.json"))
    (tmp_path / "lines.json").write_text(broken)
    with pytest.raises(FlexdpoError, match=r"lines\.json, line 4: not valid JSON"):
        load_preference_dataset(str(tmp_path / "lines.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n\n", "there are no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "there are no rows"),
        ("a.json", b"[]", "there are no rows"),
        ("a.csv", b"prompt,chosen,rejected\n", "there are no rows|has no rows"),
        ("a.csv", b"prompt,chosen,chosen\nx,y,z\n", "the header names a column twice"),
        ("a.csv", b"prompt,chosen\na,b,c\na,b,c\n", r"cannot be loaded \(ParserWarning: Length of header"),
        ("a.csv", b"prompt,chosen\na,b\na,b,c\n", r"cannot be loaded \(ParserError: .*line 3, saw 3"),
        ("a.csv", b"prompt,ch\xf6sen\na,b\n", "cannot be read as CSV .*can't decode"),
        ("a.parquet", b"PAR1 not really", r"cannot be loaded \(ArrowInvalid: .*[Pp]arquet"),
        ("a.jsonl.gz", b"not gzip", "cannot be read .*[Nn]ot a gzipped file"),
        ("a.txt", b"hello", r"cannot tell the format from the name; known endings are \.jsonl"),
    ],
)
def test_unusable_files(tmp_path: Any, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlexdpoError, match=rf"{name}: ({message})"):
        load_preference_dataset(str(tmp_path / name))


def test_unusable_folders(tmp_path: Any) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FlexdpoError, match=r"neither a saved dataset nor files ending in \.jsonl"):
        load_preference_dataset(str(tmp_path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_dict.json").write_text("{}")
    with pytest.raises(FlexdpoError, match=r"broken: the saved dataset cannot be read"):
        load_preference_dataset(str(tmp_path / "broken"))
    Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(FlexdpoError, match=r"none: there are no rows; give a dataset with at least one"):
        load_preference_dataset(str(tmp_path / "none"))
    with pytest.raises(FlexdpoError, match="config_name='x' has no meaning for a single file"):
        load_preference_dataset(str(save(text_rows(1), tmp_path, ".jsonl")), config_name="x")


def test_hub_names_go_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs, datasets.config.HF_HUB_OFFLINE))
        return Dataset.from_list(text_rows(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    loaded = load_preference_dataset("owner/pairs", split="dev", config_name="small")
    assert loaded.to_list() == text_rows(2)
    assert asked == [(("owner/pairs",), {"name": "small", "split": "dev", "streaming": False}, False)]


@pytest.mark.parametrize("name", ["flexdpo-no-such-owner/no-such-dataset", "no-such-dataset"])
def test_unreachable_hub_is_one_quick_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # nothing listens on port 9, so the connection is refused
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(FlexdpoError, match=rf"'{name}' is no file or folder here, and .* \(the hub cannot be reached"):
        load_preference_dataset(name)
    assert time.monotonic() - start < 8
    assert datasets.config.HF_HUB_OFFLINE is False


def test_name_that_no_hub_can_have() -> None:
    with pytest.raises(FlexdpoError, match=r"'my pairs' is no file or folder here, and .*Repo id must use"):
        load_preference_dataset("my pairs")


# --- tokenising: the same ids as the plain loop ----------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("rows", [text_rows(40), chat_rows(40)], ids=["text", "chat"])
def test_tokens_equal_the_plain_loop(byte_pairs: Tokenizer, bos: bool, rows: list[dict[str, Any]]) -> None:
    tokenizer = build_tokenizer(byte_pairs, bos=bos)
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None)
    assert tokenised.dataset.column_names == list(TOKENISED_COLUMNS)
    assert token_rows(tokenised.dataset) == [plain_loop(row, tokenizer) for row in rows]
    assert tokenised.dataset["edges"][:] == [[[0, 1]]] * 40
    assert tokenised.dataset["row"][:] == list(range(40))
    longest = max(len(ids[0]) + max(map(len, ids[1:])) for ids in token_rows(tokenised.dataset))
    report = tokenised.report
    assert report == DataReport("train", 40, 40, longest=longest, notes=report.notes, layout=report.layout)
    assert report.layout == "preferences: prompt, chosen, rejected"
    starts_with_bos = tokenised.dataset[0]["prompt_ids"][0] == tokenizer.bos_token_id
    assert starts_with_bos == (bos and isinstance(rows[0]["prompt"], str))


def test_text_responses_end_with_one_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "why?", "chosen": " rain<eos>", "rejected": " sun"}]
    [ids] = token_rows(tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None).dataset)
    assert tokenizer.decode(ids[1]) == " rain<eos>"
    assert tokenizer.decode(ids[2]) == " sun<eos>"


def test_implicit_prompt_of_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"chosen": "why is grass green? yes", "rejected": "why is grass green? no rain"},
        {"chosen": "the wind", "rejected": "the wind and rain"},
        {"chosen": "same start sun", "rejected": "same start rain"},
    ]
    # the space before the difference belongs to the response; a response is never empty
    splits = [
        ("why is grass green?", " yes", " no rain"),
        ("the win", "d", "d and rain"),
        ("same start", " sun", " rain"),
    ]
    explicit = [dict(zip(("prompt", "chosen", "rejected"), split, strict=True)) for split in splits]
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None)
    assert token_rows(tokenised.dataset) == [plain_loop(row, tokenizer) for row in explicit]
    tokenised = tokenize_preferences(Dataset.from_list(rows[::2]), tokenizer, max_length=None)
    assert tokenised.report.notes == (
        "prompt taken from the common beginning of chosen and rejected in 2 rows, first at row 0",
    )


@pytest.mark.parametrize("with_text_prompt", [False, True])
def test_implicit_prompt_of_conversations(tokenizer: PreTrainedTokenizerFast, with_text_prompt: bool) -> None:
    rows = chat_rows(6)
    implicit = [
        {column: row["prompt"] + row[column] for column in ("chosen", "rejected")}
        # some datasets repeat the first question as text beside whole conversations
        | ({"prompt": row["prompt"][1]["content"]} if with_text_prompt else {})
        for row in rows
    ]
    tokenised = tokenize_preferences(Dataset.from_list(implicit), tokenizer, max_length=None)
    assert token_rows(tokenised.dataset) == [plain_loop(row, tokenizer) for row in rows]


def test_tools_and_template_kwargs_reach_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = chat_rows(4)
    tools = [{"type": "function", "function": {"name": "wind"}}]
    for number, row in enumerate(rows):
        row["tools"] = tools if number % 2 else []
        row["chat_template_kwargs"] = {"thinking": number >= 2}
    want = [plain_loop(row, tokenizer) for row in rows]
    assert len({json.dumps(ids[0][:3]) for ids in want}) == 4
    as_text = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    for given in (rows, as_text):
        tokenised = tokenize_preferences(Dataset.from_list(given), tokenizer, max_length=None)
        assert token_rows(tokenised.dataset) == want


def test_prompt_end_that_changes_before_a_response(byte_pairs: Tokenizer) -> None:
    tokenizer = build_tokenizer(byte_pairs, template=PROMPT_ENDS_OTHERWISE)
    rows = chat_rows(3)
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None)
    assert token_rows(tokenised.dataset) == [plain_loop(row, tokenizer) for row in rows]
    assert tokenizer.convert_tokens_to_ids("<think>") not in tokenised.dataset[0]["prompt_ids"]
    [note] = tokenised.report.notes
    assert note.startswith("prompt end re-tokenised")
    assert note.endswith("in 3 rows, first at row 0")


def test_response_that_merges_with_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    # only one of the two responses changes how the prompt's end is tokenised; both must start at the same place
    rows = [
        {"prompt": "why? the gra", "chosen": "ss is green", "rejected": " sky"},
        {"prompt": "why? the gra", "chosen": " sky", "rejected": "ss is green"},
    ]
    alone = {"prompt": "why? the gra", "chosen": " sky", "rejected": " sky"}
    assert len(plain_loop(alone, tokenizer)[0]) > len(plain_loop(rows[0], tokenizer)[0])
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None)
    assert token_rows(tokenised.dataset) == [plain_loop(row, tokenizer) for row in rows]
    [note] = tokenised.report.notes
    assert note.endswith("in 2 rows, first at row 0")


def test_completion_is_plain_supervision(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in text_rows(3)]
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None).dataset
    want = [plain_loop({"prompt": row["prompt"], "chosen": row["completion"]}, tokenizer) for row in rows]
    assert token_rows(tokenised) == want
    assert tokenised["edges"][:] == [[], [], []]
    assert group_from_row(tokenised[1]).edges == ()


def test_token_ids_pass_through(tokenizer: PreTrainedTokenizerFast) -> None:
    want = [plain_loop(row, tokenizer) for row in text_rows(3)]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    # the text from which they were made may stand beside them
    rows = [dict(zip(columns, ids, strict=True)) | row for ids, row in zip(want, text_rows(3), strict=True)]
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None).dataset
    assert token_rows(tokenised) == want
    assert tokenised.column_names == list(TOKENISED_COLUMNS)


def test_own_output_passes_through_with_its_extra_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = text_rows(4)
    rows[1]["chosen"] = ""
    once = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None).dataset
    carrying = once.add_column("ref_response_logps", [[float(n), -1.0] for n in range(3)])
    twice = tokenize_preferences(carrying, tokenizer, max_length=None)
    assert sorted(twice.dataset.column_names) == sorted(carrying.column_names)
    assert twice.dataset.to_list() == carrying.select_columns(twice.dataset.column_names).to_list()
    assert twice.dataset["row"][:] == [0, 2, 3]
    # values that were computed on longer responses must not survive the cut
    cut = tokenize_preferences(carrying, tokenizer, max_length=twice.report.longest - 1)
    assert cut.dataset.column_names == list(TOKENISED_COLUMNS)
    whole = twice.report.longest
    assert cut.report.notes == (
        f"1 of 6 responses cut to max_length={whole - 1}, and without the token that ends them; max_length={whole} "
        "would keep 95 % of the rows whole",
        "dropped 'ref_response_logps', which belonged to the responses before they were cut",
    )


def test_group_of_many_responses(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt_ids": [3, 4], "response_ids": [[5], [5], [6, 7]], "edges": [[0, 1], [0, 2], [2, 1]]},
        {"prompt_ids": [3, 4], "response_ids": [[5], [8]], "edges": []},
    ]
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None)
    assert tokenised.report.notes == ("preferences between identical responses left out in 1 rows, first at row 0",)
    group = group_from_row(tokenised.dataset[0])
    want = Group.from_lists([3, 4], [[5], [5], [6, 7]], [(0, 2), (2, 1)], name="row 0")
    assert (group.edges, group.name) == (want.edges, want.name)
    np.testing.assert_array_equal(group.prompt_ids, want.prompt_ids)
    for ids, others in zip(group.response_ids, want.response_ids, strict=True):
        np.testing.assert_array_equal(ids, others)


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_equal_trl(byte_pairs: Tokenizer, bos: bool) -> None:
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    tokenizer = build_tokenizer(byte_pairs, bos=bos)
    implicit = [{c: row["prompt"] + row[c] for c in ("chosen", "rejected")} for row in text_rows(9)]
    implicit_chat = [{c: row["prompt"] + row[c] for c in ("chosen", "rejected")} for row in chat_rows(9)]
    for rows in (text_rows(9), chat_rows(9), implicit, implicit_chat):
        for max_length in (None, 24):
            args = SimpleNamespace(max_length=max_length, truncation_mode="keep_start", dataset_num_proc=None)
            want = trainer.DPOTrainer._prepare_dataset(
                SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, args, "train"
            )
            columns = ("prompt_ids", "chosen_ids", "rejected_ids")
            theirs = [[row[c] for c in columns] for row in want]
            # TRL cuts later, in its collator
            theirs = [[p, *(r[: max_length and max_length - len(p)] for r in responses)] for p, *responses in theirs]
            got = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=max_length).dataset
            assert token_rows(got) == theirs


# --- tokenising: length, skips and the report ------------------------------------------------------------------------


def test_max_length_cuts_responses_and_skips_full_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = text_rows(60)
    whole = [plain_loop(row, tokenizer) for row in rows]
    limit = int(np.median([len(prompt) for prompt, *_ in whole])) + 3
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=limit)
    kept = [n for n, ids in enumerate(whole) if len(ids[0]) < limit]
    cut = [plain_loop(rows[n], tokenizer, limit) for n in kept]
    for ids in cut:
        assert ids[1] != ids[2]
    assert token_rows(tokenised.dataset) == cut
    assert tokenised.dataset["row"][:] == kept
    report = tokenised.report
    assert 0 < len(kept) < 60
    assert report.skipped == {"prompt alone fills max_length": 60 - len(kept)}
    assert report.first_skipped == {"prompt alone fills max_length": min(set(range(60)) - set(kept))}
    assert report.truncated == sum(ids != whole[n] for n, ids in zip(kept, cut, strict=True)) > 0
    assert report.longest == limit


@pytest.mark.parametrize(
    ("row", "max_length", "reason"),
    [
        ({"chosen": ""}, None, "empty response"),
        ({"rejected": None}, None, "empty response"),
        ({"rejected": " yes"}, None, "identical responses"),
        ({"rejected": " yes<eos>"}, None, "identical responses"),
        ({"prompt": None}, None, "empty prompt"),
        ({"prompt": ""}, None, "empty prompt"),
        ({"prompt": "why " * 30}, 20, "prompt alone fills max_length"),
        ({"chosen": " rain" * 40, "rejected": " rain" * 50}, 20, "identical responses once cut to max_length"),
    ],
)
def test_unusable_text_rows_are_counted(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], max_length: int | None, reason: str
) -> None:
    good = {"prompt": "why?", "chosen": " yes", "rejected": " no"}
    rows = [good, good | row, good, good | row]
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=max_length)
    assert tokenised.dataset["row"][:] == [0, 2]
    report = tokenised.report
    assert reason in SKIP_REASONS
    assert (report.rows, report.used, report.skipped, report.first_skipped) == (4, 2, {reason: 2}, {reason: 1})
    assert report.summary() == (
        f"train: 2 of 4 rows used; skipped 2 ({reason}, first at row 1)\n"
        "  read as preferences: prompt, chosen, rejected"
    )
    alone = Dataset.from_list(rows[1:2], features=Features(dict.fromkeys(good, Value("string"))))
    message = rf"eval: none of the 1 rows can be used: 1 skipped \({reason}, first at row 0"
    with pytest.raises(FlexdpoError, match=message):
        tokenize_preferences(alone, tokenizer, max_length=max_length, name="eval")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": []}, "empty response"),
        ({"chosen": None}, "empty response"),
        ({"rejected": [{"role": "assistant", "content": ""}]}, "empty response"),
        ({"rejected": [{"role": "assistant", "content": None}]}, "empty response"),
        ({"rejected": [{"role": "assistant", "content": "yes"}]}, "identical responses"),
        ({"prompt": []}, "empty prompt"),
        ({"prompt": None}, "empty prompt"),
    ],
)
def test_unusable_chat_rows_are_counted(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], reason: str) -> None:
    good = {
        "prompt": [{"role": "user", "content": "why?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    tokenised = tokenize_preferences(Dataset.from_list([good, good | row]), tokenizer, max_length=None)
    assert tokenised.report.skipped == {reason: 1}
    assert tokenised.dataset["row"][:] == [0]


def test_implicit_prompt_that_is_not_there(byte_pairs: Tokenizer) -> None:
    with_prompt = [{"chosen": f"{word}? yes", "rejected": f"{word}? no"} for word in WORDS[:9]]
    texts = Dataset.from_list([{"chosen": "yes ", "rejected": "no"}, *with_prompt])
    question = [{"role": "user", "content": "why?"}]
    answers = {column: [{"role": "assistant", "content": column}] for column in ("chosen", "rejected")}
    chats = Dataset.from_list([answers, *[{column: question + answer for column, answer in answers.items()}] * 9])
    tokenizer = build_tokenizer(byte_pairs)
    for dataset in (texts, chats):
        assert tokenize_preferences(dataset, tokenizer, max_length=None).report.skipped == {"empty prompt": 1}
    # a BOS token is prompt enough to predict the first token of a response
    with_bos = tokenize_preferences(texts, build_tokenizer(byte_pairs, bos=True), max_length=None).dataset
    assert with_bos[0]["prompt_ids"] == [tokenizer.bos_token_id]
    for dataset in (texts.select(range(9)), chats.select(range(9))):
        with pytest.raises(FlexdpoError, match=r"1 of 9 rows have an empty prompt: there is no column 'prompt' and"):
            tokenize_preferences(dataset, tokenizer, max_length=None)
    with pytest.raises(FlexdpoError, match=r"1 of 9 rows have an empty prompt: there is no column 'prompt' and"):
        tokenize_preferences(texts.select(range(9)), build_tokenizer(byte_pairs, bos=True), max_length=None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt_ids": []}, "empty prompt"),
        ({"prompt_ids": None}, "empty prompt"),
        ({"chosen_ids": []}, "empty response"),
        ({"rejected_ids": [5, 6]}, "identical responses"),
        ({"prompt_ids": [3, 4, 5, 6]}, "prompt alone fills max_length"),
        ({"prompt_ids": [3, 4, 5]}, None),
        ({"prompt_ids": [3, 4, 5], "rejected_ids": [5, 8]}, "identical responses once cut to max_length"),
    ],
)
def test_unusable_token_rows_are_counted(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], reason: str | None
) -> None:
    good = {"prompt_ids": [3], "chosen_ids": [5, 6], "rejected_ids": [7]}
    report = tokenize_preferences(Dataset.from_list([good, good | row]), tokenizer, max_length=4).report
    assert report.skipped == ({reason: 1} if reason else {})
    own = [
        {"prompt_ids": ids["prompt_ids"], "response_ids": [ids["chosen_ids"], ids["rejected_ids"]], "edges": [[0, 1]]}
        for ids in (good, good | row)
    ]
    same = tokenize_preferences(Dataset.from_list(own), tokenizer, max_length=4).report
    assert replace(same, layout=report.layout) == report


def test_report_counts_every_row_once(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(3)
    rows = text_rows(300)
    for row in rows:
        fates = [{}, {}, {"chosen": ""}, {"rejected": row["chosen"]}, {"prompt": ""}, {"prompt": "why " * 40}]
        row.update(fates[rng.integers(6)])
    tokenised = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=30)
    report = tokenised.report
    assert set(report.skipped) >= set(SKIP_REASONS[:4])
    assert report.used + sum(report.skipped.values()) == report.rows == 300
    assert report.used == len(tokenised.dataset)
    assert set(report.first_skipped) == set(report.skipped)


def test_summary_is_short_and_complete() -> None:
    report = DataReport(
        "eval", 10, 7, {"empty response": 3}, {"empty response": 4}, 2, 99, ("it happened",), "pairs: a, b"
    )
    assert report.summary() == (
        "eval: 7 of 10 rows used; 2 of them cut to max_length; skipped 3 (empty response, first at row 4)\n"
        "  read as pairs: a, b\n"
        "  note: it happened"
    )


# --- tokenising: scale -----------------------------------------------------------------------------------------------


def test_processes_give_the_same_rows_and_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = text_rows(50)
    rows[37]["chosen"] = ""
    alone = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=30)
    shared = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=30, num_proc=2)
    assert shared.dataset.to_list() == alone.dataset.to_list()
    assert shared.report == alone.report
    assert shared.report.first_skipped["empty response"] == 37
    rows[41]["chosen"] = None
    numbers = [row | {"chosen": [1]} if n == 41 else row | {"chosen": []} for n, row in enumerate(rows)]
    with pytest.raises(FlexdpoError, match=r"train: row 41 \(counted from 0\), column 'chosen', message 0"):
        tokenize_preferences(Dataset.from_list(numbers), tokenizer, max_length=30, num_proc=2)


def test_second_run_comes_from_the_cache(tmp_path: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = load_preference_dataset(str(save(text_rows(20), tmp_path, ".jsonl")))
    first = tokenize_preferences(dataset, tokenizer, max_length=30).dataset
    written = {file["filename"] for file in first.cache_files}
    assert written
    # neither another name nor a freshly loaded dataset changes what the cache finds
    again = load_preference_dataset(str(tmp_path / "pairs.jsonl"))
    second = tokenize_preferences(again, tokenizer, max_length=30, name="other").dataset
    assert {file["filename"] for file in second.cache_files} == written
    third = tokenize_preferences(again, tokenizer, max_length=29).dataset
    assert {file["filename"] for file in third.cache_files}.isdisjoint(written)


CACHED = """
import json, os, sys
from datasets import Dataset
from transformers import AutoTokenizer
from flexdpo.data.load import load_preference_dataset
from flexdpo.data.tokenize import tokenize_preferences
from flexdpo.data.regroup import regroup_by_prompt
file, model, used = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
if used == "used":
    tokenizer(["the sky", "the"], padding="max_length", truncation=True, max_length=3)
rows = [json.loads(line) for line in open(file)]
for dataset, num_proc in [(load_preference_dataset(file), None), (Dataset.from_list(rows), None),
                          (load_preference_dataset(file), 2), (Dataset.from_list(rows).select(range(9)), None)]:
    tokens = tokenize_preferences(dataset, tokenizer, max_length=30, num_proc=num_proc).dataset
    for made in (tokens, regroup_by_prompt(tokens)):
        print([(file["filename"], os.stat(file["filename"]).st_mtime_ns) for file in made.cache_files])
"""


def test_another_process_finds_the_tokens(
    tmp_path: Any, byte_pairs: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer(byte_pairs)
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = save(text_rows(40), tmp_path, ".jsonl")
    arguments = [str(path), str(tmp_path / "tokenizer")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE), "PYTHONHASHSEED": "1"}
    monkeypatch.setattr(sys, "argv", ["", *arguments, "new"])
    exec(CACHED, {})
    another = subprocess.run(
        [sys.executable, "-c", CACHED, *arguments, "used"], env=environment, capture_output=True, text=True, check=True
    )
    found = [printed.splitlines() for printed in (capsys.readouterr().out, another.stdout)]
    # not one file was written anew, though the second process had used its tokenizer otherwise before
    assert found[0] == found[1]
    # several processes take what one has written
    assert found[0][:2] == found[0][4:6]
    assert len(set(found[0])) == 6
    assert all(line.startswith("[('") for line in found[0])


def test_the_digest_of_a_tokenizer_sees_what_matters(byte_pairs: Tokenizer) -> None:
    tokenizer = build_tokenizer(byte_pairs)
    before = tokenizer_digest(tokenizer)
    tokenizer.pad_token = "<eos>"
    padding = tokenizer_digest(tokenizer)
    tokenizer(["the sky", "the"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == padding
    others = [build_tokenizer(byte_pairs, bos=True), build_tokenizer(byte_pairs, template="{{ messages }}")]
    others.append(build_tokenizer(byte_pairs))
    others[-1].eos_token = "<think>"
    assert len({before, padding, *map(tokenizer_digest, others)}) == 5


def test_tokens_stay_on_the_disk(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(0)
    rows = 3000
    ids = rng.integers(6, 300, (rows, 3, 400), dtype=np.int32)
    ids[rows // 2 :, 0] = ids[: rows // 2, 0]
    source = Dataset.from_dict(
        {name: ids[:, k] for k, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids"))} | {"score": [0] * rows}
    )
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    tokenised = tokenize_preferences(source, tokenizer, max_length=700).dataset
    regrouped = regroup_by_prompt(tokenised)
    counted = token_counts(tokenised, shared=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(regrouped) == rows // 2
    assert counted.tolist() == [400 + 300 + 300] * rows
    for made in (tokenised, regrouped):
        assert isinstance(made.data, MemoryMappedTable)
    # of 14 MB of tokens nothing but row numbers and digests is held, and a batch at a time
    assert pa.total_allocated_bytes() - arrow_before < 1_000_000
    assert peak < 60_000_000


def test_source_folder_that_nobody_may_write_to(
    tmp_path: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_list(text_rows(5)).save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    monkeypatch.setattr("flexdpo.data.cache.os.access", lambda *_: False)
    tokenised = tokenize_preferences(load_preference_dataset(str(tmp_path / "saved")), tokenizer, max_length=None)
    assert token_rows(tokenised.dataset) == [plain_loop(row, tokenizer) for row in text_rows(5)]
    assert sorted((tmp_path / "saved").iterdir()) == before


def test_tokens_are_not_gone_through_again(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = text_rows(40)
    rows[4]["chosen"] = ""
    once = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None)
    monkeypatch.setattr(Dataset, "map", lambda *_, **__: pytest.fail("gone through again"))
    again = tokenize_preferences(once.dataset.with_format("numpy"), tokenizer, max_length=once.report.longest)
    assert again.dataset.to_list() == once.dataset.to_list()
    assert (again.report.rows, again.report.used, again.report.longest) == (39, 39, once.report.longest)


GOOD_IDS = {"prompt_ids": [3, 4], "response_ids": [[5, 6], [7], [5, 7]], "edges": [[0, 1], [2, 0]], "row": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": []}, {"prompt_ids": [3] * 9}, {"prompt_ids": [10**6]}, {"prompt_ids": [-1]}, {"row": -1},
        {"response_ids": [[5, 6], [], [5]]}, {"response_ids": []}, {"response_ids": [[5, 6], [7], [5, 10**6]]},
        {"response_ids": [[5, 6], [7], [5, 6]]}, {"response_ids": [[5] * 9, [7], [5]]}, {"edges": [[0, 3]]},
        {"edges": [[-1, 0]]}, {"edges": [[0]]}, {"edges": [[1, 1]]}, {"prompt_ids": None}, {"edges": None},
        {"row": None},
    ],
)  # fmt: skip
def test_tokens_that_need_a_look_are_seen(change: dict[str, Any]) -> None:
    ids = Value("int32")
    kinds = Features({"prompt_ids": [ids], "response_ids": [[ids]], "edges": [[ids]], "row": Value("int64")})
    assert longest_if_usable(Dataset.from_list([GOOD_IDS] * 3, features=kinds), 9, 300) == 4
    assert longest_if_usable(Dataset.from_list([GOOD_IDS, GOOD_IDS | {"edges": []}], features=kinds), 9, 300) == 4
    rows = [GOOD_IDS, GOOD_IDS | change, GOOD_IDS]
    assert longest_if_usable(Dataset.from_list(rows, features=kinds), 9, 300) is None
    # another way to write the same numbers is brought into this one
    assert longest_if_usable(Dataset.from_list([GOOD_IDS]), 9, 300) is None


def test_formatted_dataset_is_read_as_plain(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = Dataset.from_list([{"prompt_ids": [3], "chosen_ids": [5, 6], "rejected_ids": [7]}])
    tokenised = tokenize_preferences(ids.with_format("torch"), tokenizer, max_length=None).dataset
    assert tokenised[0] == {"prompt_ids": [3], "response_ids": [[5, 6], [7]], "edges": [[0, 1]], "row": 0}


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "choosen"], r"found 'prompt', 'choosen'; wanted .*; 'choosen': did you mean 'chosen'\?"),
        (["text"], r"found 'text'; wanted 'prompt' .*, 'chosen', 'rejected'; or 'prompt', 'completion', 'label'; or"),
        (["prompt_ids", "response_ids"], r"found 'prompt_ids', 'response_ids'; wanted .*columns="),
        (["prompt", "chosen", "rejected", "images"], r"row 0 .*column 'images': images are read by a processor"),
        (["answers", "winner"], r"ranked|no column is known to hold their prompt among 'answers', 'winner'; say which"),
    ],
)
def test_missing_columns(tokenizer: PreTrainedTokenizerFast, columns: list[str], message: str) -> None:
    dataset = Dataset.from_list([dict.fromkeys(columns, "x")])
    with pytest.raises(FlexdpoError, match=rf"^eval: .*{message}"):
        tokenize_preferences(dataset, tokenizer, max_length=None, name="eval")


MESSAGE = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3}, r"column 'prompt': expected text or a list of messages, found int \(3\)"),
        ({"chosen": 0.5}, r"column 'chosen': expected text or a list of messages, found float \(0\.5\)"),
        (
            {"chosen": MESSAGE, "rejected": [*MESSAGE, *MESSAGE]},
            "of 'prompt' would be lost: it stands nowhere in 'chos",
        ),
        ({"prompt": ["why?"]}, r"column 'prompt', message 0: expected \{'role'.*, found str \('why\?'\)"),
        ({"prompt": [{"content": "x"}]}, r"column 'prompt', message 0: .*'role' is NoneType \(None\)"),
        ({"prompt": [{"role": 1, "content": "x"}]}, r"column 'prompt', message 0: .*'role' is int \(1\)"),
        ({"prompt": [{"role": "user", "content": 7}]}, r"column 'prompt', message 0: .*'content' is int \(7\)"),
        ({"prompt": MESSAGE, "chosen": MESSAGE}, r"'chosen', 'rejected' mix text and whole conversations"),
    ],
)
def test_values_of_the_wrong_type(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str) -> None:
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"} | row])
    with pytest.raises(FlexdpoError, match=rf"^train: row 0 \(counted from 0\).*{message}"):
        tokenize_preferences(dataset, tokenizer, max_length=None)


def test_one_number_among_texts_is_found_by_its_row(tmp_path: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[Any] = text_rows(12)
    rows[7]["chosen"] = 5
    dataset = load_preference_dataset(str(save(rows, tmp_path, ".jsonl")))
    with pytest.raises(FlexdpoError, match=r"train: row 7 .*column 'chosen': expected text .* found int \(5\)"):
        tokenize_preferences(dataset, tokenizer, max_length=None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "{oops"}, r"column 'tools': not valid JSON"),
        ({"tools": '{"a": 1}'}, r"column 'tools': expected a list, found dict"),
        ({"chat_template_kwargs": "thinking"}, r"column 'chat_template_kwargs': expected a dict, found str"),
        ({"prompt": [*MESSAGE, {"role": "system", "content": "x"}]}, r"cannot render its messages: system comes first"),
    ],
)
def test_conversations_that_cannot_be_rendered(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    # a list of rows has the columns of its first
    rows = [*(dict.fromkeys(row) | good for good in chat_rows(2)), chat_rows(1)[0] | row]
    with pytest.raises(FlexdpoError, match=rf"^train: row 2 \(counted from 0\).*{message}"):
        tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None)


def test_text_prompt_with_a_conversation_as_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([{"prompt": "x", "completion": MESSAGE}])
    with pytest.raises(FlexdpoError, match=r"row 0 .*'completion': expected a conversation that ends with the assist"):
        tokenize_preferences(dataset, tokenizer, max_length=None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [3.5]}, r"column 'prompt_ids': expected a list of token ids, found list \(\[3\.5\]\)"),
        ({"prompt_ids": "3 4"}, r"column 'prompt_ids': expected a list of token ids, found str"),
        ({"prompt_ids": [-1, 4]}, r"token ids reach from -1 to 4, the tokenizer's from 0 to \d+"),
        ({"prompt_ids": [70000]}, r"was the dataset tokenised with another tokenizer\?"),
        ({"response_ids": [5, 6]}, r"column 'response_ids': expected a list of token ids, found int \(5\)"),
        ({"response_ids": "5"}, r"column 'response_ids': expected a list of lists, found str"),
        ({"edges": 1}, r"column 'edges': expected a list of lists, found int \(1\)"),
        ({"edges": [[0, 2]]}, r"\[0, 2\] must name two different responses among 0 to 1"),
        ({"edges": [[1, 1]]}, r"\[1, 1\] must name two different responses among 0 to 1"),
        ({"edges": [[1]]}, r"\[1\] must name two different responses among 0 to 1"),
        ({"edges": [0, 1]}, r"column 'edges': 0 must name two different responses"),
    ],
)
def test_token_ids_that_cannot_be(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str) -> None:
    good = {"prompt_ids": [3], "response_ids": [[5, 6], [7]], "edges": [[0, 1]]}
    with pytest.raises(FlexdpoError, match=rf"^train: row 0 \(counted from 0\).*{message}"):
        tokenize_preferences(Dataset.from_list([good | row]), tokenizer, max_length=None)


def test_datasets_that_cannot_be_tokenised(tokenizer: PreTrainedTokenizerFast) -> None:
    none = Dataset.from_dict({"prompt": []})
    with pytest.raises(FlexdpoError, match="train: the dataset has no rows"):
        tokenize_preferences(none, tokenizer, max_length=None)
    with pytest.raises(FlexdpoError, match=r"train: expected a datasets\.Dataset, found DatasetDict; pick one split"):
        tokenize_preferences(DatasetDict(train=none), tokenizer, max_length=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation_mode": "keep_end"}, "nothing can be shared, and TRL has deprecated it; use 'keep_start'"),
        ({"truncation_mode": "keepstart"}, "unknown truncation_mode 'keepstart'; did you mean 'keep_start'"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"num_proc": 0}, "num_proc must be at least 1, got 0"),
    ],
)
def test_unusable_settings(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        tokenize_preferences(Dataset.from_list(text_rows(2)), tokenizer, **{"max_length": None, **settings})


def test_tokenizer_without_eos(byte_pairs: Tokenizer) -> None:
    tokenizer = build_tokenizer(byte_pairs, eos=False)
    with pytest.raises(FlexdpoError, match=r"has no EOS token, .* set tokenizer\.eos_token"):
        tokenize_preferences(Dataset.from_list(text_rows(2)), tokenizer, max_length=None)


def test_tokenizer_without_chat_template(byte_pairs: Tokenizer) -> None:
    tokenizer = build_tokenizer(byte_pairs, template=None)
    with pytest.raises(FlexdpoError, match=r"has no chat template; set tokenizer\.chat_template, use the tokenizer of"):
        tokenize_preferences(Dataset.from_list(chat_rows(2)), tokenizer, max_length=None)


def test_pad_token_falls_back_to_eos(byte_pairs: Tokenizer) -> None:
    tokenizer = build_tokenizer(byte_pairs)
    assert tokenizer.pad_token is None
    require_special_tokens(tokenizer)
    assert tokenizer.pad_token == "<eos>"
    tokenizer.pad_token = "<bos>"
    require_special_tokens(tokenizer)
    assert tokenizer.pad_token == "<bos>"
    with pytest.raises(FlexdpoError, match=r"has neither a pad nor an EOS token; set tokenizer\.eos_token"):
        require_special_tokens(build_tokenizer(byte_pairs, eos=False))
