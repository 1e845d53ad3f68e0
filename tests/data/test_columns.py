"""Columns that are not read: named, or refused where they hold a part of the prompt; files in layouts people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexdpo import DPOTrainer, FlexdpoError, load_preference_dataset, tokenize_preferences
from flexdpo.data.columns import parse_columns, prompt_like
from flexdpo.data.report import DataReport
from flexdpo.data.stream import StreamedPreferences
from tests.data.test_data import TEMPLATE
from tests.training.test_trainer import settings

FORMATS = Path(__file__).parent / "formats"
FILES = sorted(path.name for path in FORMATS.iterdir() if ".expected" not in path.name)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """One token per byte: no two texts have the same tokens."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(alphabet | {"<eos>": len(alphabet), "<bos>": len(alphabet) + 1}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>", bos_token="<bos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def report_of(dataset: Any, tokenizer: Any) -> DataReport:
    if isinstance(dataset, IterableDataset):
        return StreamedPreferences(dataset, tokenizer, max_length=None, endless=False).preview(9)
    return tokenize_preferences(dataset, tokenizer, max_length=None).report


def tokens_of(dataset: Any, tokenizer: Any) -> list[tuple[Any, ...]]:
    if isinstance(dataset, IterableDataset):
        rows: Any = StreamedPreferences(dataset, tokenizer, max_length=None, endless=False)
    else:
        rows = tokenize_preferences(dataset, tokenizer, max_length=None).dataset
    return [(row["prompt_ids"], row["response_ids"], row["edges"], row.get("labels")) for row in rows]


READ_AS = {
    "alpaca_pairs.json": "Alpaca preferences: instruction, input, chosen, rejected",
    "better_id.jsonl": "preferences by the better one's id: prompt, response_0, response_1, better_response_id",
    "chosen_messages.jsonl": "preferences: chosen_messages, rejected_messages",
    "context_completions.jsonl": "responses with scores or ranks: context, completions",
    "generations_ratings.jsonl": "Alpaca scored responses: instruction, generations, ratings",
    "helpsteer_preference.jsonl": "HelpSteer2 preferences: prompt, response_1, response_2, preference_strength",
    "human_ref.jsonl": "SHP preferences: history, human_ref_A, human_ref_B, labels",
    "label_int.jsonl": "labelled responses: prompt, completion, label",
    "label_text.csv": "labelled responses: prompt, completion, label",
    "messages_and_text.jsonl": "preferences: messages, chosen, rejected",
    "messages_label.jsonl": "labelled responses: messages, label",
    "openai_preference.jsonl": "OpenAI's preferences: input, preferred_output, non_preferred_output",
    "orca.jsonl": "preferences: system, question, chosen, rejected",
    "question_responses.jsonl": "preferences: prompt, chosen, rejected",
    "ranked_answers.jsonl": "responses with scores or ranks: prompt, answers",
    "ranking.jsonl": "ranked responses: prompt, responses, ranks",
    "scored_completions.jsonl": "Alpaca responses with scores or ranks: instruction, completions",
    "sharegpt_pairs.jsonl": "ShareGPT preferences: conversations, chosen, rejected",
    "sharegpt_system.jsonl": "ShareGPT preferences: system, conversations, chosen, rejected",
    "swift_rejected_messages.jsonl": "ms-swift preferences: messages, rejected_messages",
    "swift_rejected_response.jsonl": "ms-swift preferences: messages, rejected_response",
    "system_prompt.jsonl": "preferences: system, prompt, chosen, rejected",
}
COLUMNS = {"question_responses.jsonl": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_read_as_it_is_meant(bytewise: Any, name: str, streaming: bool) -> None:
    path = FORMATS / name
    dataset = load_preference_dataset(str(path), streaming=streaming, columns=COLUMNS.get(name))
    report = report_of(dataset, bytewise)
    assert report.layout == READ_AS.get(name, "preferences: prompt, chosen, rejected")
    assert f"\n  read as {report.layout}" in report.summary()
    got = tokens_of(dataset, bytewise)
    if name == "tools_nulls.jsonl":
        # as they stand in the file, where neither tool has the other's fields
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        want = [(bytewise.apply_chat_template(r["prompt"], tools=r["tools"], add_generation_prompt=True)) for r in rows]
        assert [prompt for prompt, *_ in got] == [ids["input_ids"] for ids in want]
    elif name == "question_responses.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        own = [{own: row[column] for own, column in COLUMNS[name].items()} for row in rows]
        assert got == tokens_of(Dataset.from_list(own), bytewise)
    else:
        want = tokens_of(load_preference_dataset(str(path.with_suffix(".expected.jsonl"))), bytewise)
        assert got == want


def test_edges_follow_ranks_and_scores(bytewise: Any) -> None:
    ranked = {"prompt": "Nile?", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 2, None]}
    [(prompt, responses, edges, _)] = tokens_of(Dataset.from_list([ranked]), bytewise)
    texts = [bytewise.decode(ids) for ids in (prompt, *responses)]
    assert (texts, edges) == (["Nile?", "a<eos>", "b<eos>", "c<eos>"], [[1, 0], [1, 2]])
    scored = {"prompt": "Nile?", "responses": ["a", "b", "c"], "scores": ["3", "2.5", "N/A"]}
    [(_, _, edges, _)] = tokens_of(Dataset.from_list([scored]), bytewise)
    assert edges == [[0, 1]]
    ties = [scored, {**scored, "scores": ["1", "1.0", "1"]}]
    report = report_of(Dataset.from_list(ties), bytewise)
    assert report.skipped == {"no preference between the responses": 1}
    assert report.notes[-1].startswith("responses without text or without a preference left out in 1 rows")


def row(**changes: Any) -> dict[str, Any]:
    return {"chosen": "A river in Egypt.", "rejected": "Ask a river.", **changes}


@pytest.mark.parametrize(
    "column", ["Question", "Query", "user_input", "systemPrompt", "title", "passage", "original_prompt", "human"]
)
@pytest.mark.parametrize("kind", ["text", "messages", "late"])
def test_a_prompt_under_another_name_is_not_lost(bytewise: Any, column: str, kind: str) -> None:
    asked = "What is the Nile?"
    value: Any = [{"role": "user", "content": asked}] if kind == "messages" else asked
    # a conversation begins with what was asked, and only one row has more to say
    rows = [row(chosen=f"{asked} Water.", rejected=f"{asked} Sand.", **{column: value}) for _ in range(70)]
    late = len(rows) - 1 if kind == "late" else 0
    rows[late][column] = json.loads(json.dumps(value).replace("Nile", "Rhine"))
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.raises(
            FlexdpoError, match=rf"train: row {late} \(counted from 0\): column '{column}' would be lost"
        ):
            tokens_of(dataset, bytewise)


def test_what_only_describes_a_row_is_named(bytewise: Any) -> None:
    asked = "What is the Nile?"
    described = {
        "prompt_id": "ab12", "source": "evol_instruct", "chosen_model": "a model", "rationale": "It is right.",
        "score_chosen": 8.5, "question_type": "geography", "dialogue": [{"role": "user", "content": asked}],
        "title": "", "document": [], "original_prompt": asked,
    }  # fmt: skip
    texts = {"chosen": f"{asked} Water.", "rejected": f"{asked} Sand."}
    rows = [{**texts, **described} for _ in range(3)]
    note = "not read: " + ", ".join(map(repr, described))
    report = tokenize_preferences(Dataset.from_list(rows), bytewise, max_length=None).report
    assert report.notes[0] == note
    assert f"\n  note: {note}\n" in report.summary()
    stream = StreamedPreferences(Dataset.from_list(rows).to_iterable_dataset(), bytewise, max_length=None)
    assert stream.report.notes == (note,)
    # beside a prompt, what it was made of is described by it; what comes before it is not
    assert prompt_like(["title", "context", "history"], has_prompt=True) == ("context", "history")
    with_prompt = [{"prompt": "Q: Nile?", "chosen": "Water.", "rejected": "Sand.", "question": "Nile, what is it?"}]
    assert tokenize_preferences(Dataset.from_list(with_prompt), bytewise, max_length=None).report.notes == (
        "not read: 'question'",
    )


def test_tools_beside_text_are_named(bytewise: Any) -> None:
    rows = [{"prompt": "Nile?", "chosen": "Water.", "rejected": "Sand.", "tools": '[{"name": "map"}]'}]
    [note] = tokenize_preferences(Dataset.from_list(rows), bytewise, max_length=None).report.notes
    assert note.startswith("tools and chat_template_kwargs left out, since text goes through no chat template")


def test_a_conversation_that_only_one_response_repeats(bytewise: Any) -> None:
    prompt = [{"role": "user", "content": "Nile?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Water.", "Sand.")]
    rows = [{"prompt": prompt, "chosen": prompt + answers[0], "rejected": answers[1]}]
    with pytest.raises(FlexdpoError, match=r"row 0 .*response 0 .*repeats the messages of the prompt and response 1"):
        tokens_of(Dataset.from_list(rows), bytewise)


def test_many_rows_without_a_prompt(bytewise: Any) -> None:
    questions = [{"chosen": f"{n} is even", "rejected": f"{n} is odd"} for n in range(10, 90)]
    bare = [row(chosen="Yes.", rejected="No.", anfrage="Is it?")] * 30
    rows = [{"anfrage": "Is it?", **question} for question in questions] + bare
    why = r"train: 30 of \d+ rows have an empty prompt: there is no column 'prompt' and .*\(not read: 'anfrage'\)"
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.raises(FlexdpoError, match=why):
            tokens_of(dataset, bytewise)
    named = [{"prompt": None, "chosen": "Yes.", "rejected": "No."}] * 6 + [{**row(), "prompt": "Nile?"}] * 5
    with pytest.raises(FlexdpoError, match=r"6 of 11 rows have an empty prompt: column 'prompt' is empty there"):
        tokens_of(Dataset.from_list(named), bytewise)
    assert len(tokens_of(Dataset.from_list(named[1:]), bytewise)) == 5


# --- responses that are cut ------------------------------------------------------------------------------------------


def test_cut_responses_are_said_before_training(
    tmp_path: Path, tokenizer: Any, small_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # one token each for the prompt and the end of a response
    def pair(chosen: int, rejected: int) -> dict[str, str]:
        return {"prompt": "w5 ", "chosen": "w6 " * chosen, "rejected": "w7 " * rejected}

    rows = [pair(8, 9)] * 18 + [pair(30, 2), pair(3, 2)]
    dataset = Dataset.from_list(rows)
    assert tokenize_preferences(dataset, tokenizer, max_length=10).report.notes == (
        "19 of 40 responses cut to max_length=10, and without the token that ends them; max_length=11 would keep 95 % "
        "of the rows whole",
    )
    # 95 % are whole already
    assert tokenize_preferences(dataset, tokenizer, max_length=11).report.notes == (
        "1 of 40 responses cut to max_length=11, and without the token that ends them",
    )
    assert tokenize_preferences(dataset, tokenizer, max_length=32).report.notes == ()
    most = (
        "37 of 40 responses cut to max_length=7, and without the token that ends them: more than half of all, so that"
    )
    for source in (dataset, dataset.to_iterable_dataset()):
        caplog.clear()
        args = settings(tmp_path, max_length=7, max_steps=1)
        DPOTrainer(small_model(), None, args, train_dataset=source, processing_class=tokenizer)
        said = [record for record in caplog.records if most in record.getMessage()]
        assert [record.levelname for record in said] == ["WARNING"]
        assert "max_length=11 would keep 95 % of the rows whole" in said[0].getMessage()


# --- columns of other names on the command line ----------------------------------------------------------------------


def test_columns_on_the_command_line() -> None:
    want = {"prompt": "question", "chosen": "response_j"}
    assert parse_columns("prompt=question, chosen=response_j") == want
    assert parse_columns(json.dumps(want)) == want
    assert parse_columns(None) is None
    for wrong in ("prompt", "prompt=", "=a", "{", '{"prompt": 3}'):
        with pytest.raises(FlexdpoError, match=r"--columns .*: (expected pairs such as prompt=|not valid JSON)"):
            parse_columns(wrong)
