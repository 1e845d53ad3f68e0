"""Layouts of the field's datasets: a row of each, and what it must be read as, or what refuses it; never another thing."""

# ruff: noqa: E501 (a table: what a row holds stands in its line)

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from flexdpo import FlexdpoError
from flexdpo.data.layouts import LAYOUTS
from tests.data.test_columns import bytewise, own_cache, report_of, tokens_of

__all__ = ["bytewise", "own_cache"]

Q, A, B, SYSTEM = "Name a river.", "The Nile.", "The moon.", "Be brief."
SECOND = "And another?"


def user(text: str = Q, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


TEXT = {"prompt": Q, "chosen": A, "rejected": B}
CHAT = {"prompt": [user()], "chosen": [bot(A)], "rejected": [bot(B)]}
WITH_SYSTEM = {**CHAT, "prompt": [{"role": "system", "content": SYSTEM}, user()]}
GROUP = {"prompt": Q, "responses": [A, B], "scores": [2, 1]}
GOOD, BAD = ({"prompt": Q, "completion": text, "label": label} for text, label in ((A, True), (B, False)))
WHOLE = {"chosen": [user(), bot(A)], "rejected": [user(), bot(B)]}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "river"}}}

READ: dict[str, tuple[Any, Any]] = {
    "UltraFeedback binarized": (
        {"prompt": Q, "prompt_id": "ab", **WHOLE, "messages": [user(), bot(A)], "score_chosen": 8.0, "score_rejected": 3.0},
        CHAT,
    ),
    "messages with ratings inside": ({"chosen": [user(), bot(A, rating=5)], "rejected": [user(), bot(B, rating=1)]}, {
        **CHAT, "chosen": [bot(A, rating=5)], "rejected": [bot(B, rating=1)]}),
    "HH-RLHF transcripts": (
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: no."},
        {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {A}", "rejected": " no."},
    ),
    "SHP, B preferred": ({"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0, "domain": "x"}, TEXT),
    "Orca DPO pairs": ({"system": SYSTEM, "question": Q, "chosen": A, "rejected": B}, WITH_SYSTEM),
    "Orca without a system prompt": ({"system": "", "question": Q, "chosen": A, "rejected": B}, CHAT),
    "distilabel Orca": (
        {"system": SYSTEM, "input": Q, "chosen": A, "rejected": B, "generations": [A, B], "rating": [9.0, 1.0],
         "order": ["a", "b"], "labelling_prompt": [user("Judge.")], "status": "unchanged", "in_gsm8k_train": False},
        WITH_SYSTEM,
    ),
    "Nectar": ({"prompt": Q, "answers": [{"answer": B, "model": "x", "rank": 2.0}, {"answer": A, "model": "y", "rank": 1.0}]},
               {"prompt": Q, "responses": [B, A], "ranks": [1, 0]}),
    "PKU-SafeRLHF": ({"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0, "is_response_0_safe": True}, TEXT),
    "PKU-SafeRLHF in a CSV file": ({"prompt": Q, "response_0": B, "response_1": A, "better_response_id": "1"}, TEXT),
    "HelpSteer2, second preferred": ({"prompt": Q, "response_1": B, "response_2": A, "preference_strength": 3}, TEXT),
    "HelpSteer3": ({"domain": "stem", "context": [user()], "response1": A, "response2": B, "overall_preference": -1}, CHAT),
    "Argilla's capybara": (
        {"source": "x", "conversation": None, "original_response": A, "rating_chosen": 5, "model": "m", **WHOLE}, CHAT),
    "Argilla's mix, chosen_response": ({"instruction": Q, "chosen_response": A, "rejected_response": B}, TEXT),
    "axolotl chatml.argilla": ({"system": SYSTEM, "instruction": Q, "chosen_response": A, "rejected_response": B}, WITH_SYSTEM),
    "axolotl chat_template": ({"conversation": [user()], "chosen": bot(A), "rejected": bot(B)}, CHAT),
    "distilabel generations": ({"instruction": Q, "generations": [A, B], "ratings": ["2", "1"]}, GROUP),
    "distilabel with a missing rating": ({"instruction": Q, "generations": [A, B, "?"], "ratings": [2.0, 1.0, None]}, GROUP),
    "WebGPT": ({"question": {"dataset": "eli5", "id": "1", "full_text": Q}, "quotes_0": {"title": ["a"], "extract": ["b"]},
                "answer_0": B, "score_0": -1.0, "answer_1": A, "score_1": 1.0}, TEXT),
    "Chatbot Arena": ({"conversation_a": [user(), bot(B)], "conversation_b": [user(), bot(A)], "winner": "model_b",
                       "judge": "x", "turn": 1}, CHAT),
    "battles": ({"prompt": Q, "response_a": A, "response_b": B, "winner": "A"}, TEXT),
    "Tulu": ({"id": "1", "prompt": Q, **WHOLE, "chosen_rating": 9.0}, CHAT),
    "UltraInteract": ({"task": "math", "id": "1", "trajectory": [{"from": "user", "value": Q}], "chosen": A, "rejected": B}, CHAT),
    "UltraFeedback": ({"source": "x", "instruction": Q, "models": ["a", "b"], "correct_answers": ["?"], "completions": [
        {"response": A, "overall_score": 2.0, "critique": "good", "fine-grained_score": 1.0},
        {"response": B, "overall_score": 1.0, "critique": "bad", "fine-grained_score": 5.0}]}, GROUP),
    "Magpie": ({"uuid": "1", "instruction": Q, **WHOLE, "gen_input_configs": {"t": 1}}, CHAT),
    "Skywork": ({**WHOLE, "source": "x", "chosen_score": 1.0}, CHAT),
    "Vezora": ({"input": Q, "accepted": A, "rejected": B, "ID": 3}, TEXT),
    "RewardBench": ({"prompt": Q, "chosen": A, "chosen_model": "x", "rejected": B, "rejected_model": "y", "subset": "s"}, TEXT),
    "rm-static": ({"prompt": Q, "response": A, "chosen": A, "rejected": B}, TEXT),
    "NeMo-Aligner": ({"prompt": Q, "chosen_response": A, "rejected_response": B, "chosen_reward": 1.0}, TEXT),
    "margins": ({**TEXT, "margin": 2.5, "prompt_id": 4}, TEXT),
    "Alpaca comparisons": ({"instruction": Q, "input": "", "output": [A, B]}, TEXT),
    "Alpaca with input": ({"instruction": "Name a", "input": "river.", "chosen": A, "rejected": B},
                          {**TEXT, "prompt": "Name a\nriver."}),
    "Alpaca with history": ({"system": SYSTEM, "instruction": SECOND, "input": "", "history": [[Q, A]], "chosen": A, "rejected": B},
                            {**CHAT, "prompt": [*WITH_SYSTEM["prompt"], bot(A), user(SECOND)]}),
    "ShareGPT whole": ({"chosen": [human(Q), gpt(A)], "rejected": [human(Q), gpt(B)]}, CHAT),
    "ShareGPT KTO": ({"conversations": [human(Q), gpt(A)], "kto_tag": True}, {"prompt": [user()], "completion": [bot(A)], "label": True}),
    "Alpaca KTO": ({"instruction": Q, "output": B, "kto_tag": False}, BAD),
    "KTO +1": ({"prompt": Q, "completion": A, "label": 1.0}, GOOD),
    "KTO -1": ({"prompt": Q, "completion": B, "label": -1}, BAD),
    "KTO in words": ({"prompt": Q, "completion": B, "label": "Undesirable"}, BAD),
    "KTO as response": ({"question": Q, "response": A, "label": "yes"}, GOOD),
    "JSON text of messages": ({k: json.dumps(v) for k, v in CHAT.items()}, CHAT),
    "JSON text of conversations": ({"prompt": Q, **{k: json.dumps(v) for k, v in WHOLE.items()}}, CHAT),
    "JSON text of scores": ({"prompt": Q, "responses": json.dumps([A, B]), "scores": "[2, 1]"}, GROUP),
    "list of dicts with score": ({"prompt": Q, "responses": [{"text": A, "score": 2}, {"text": B, "score": 1}]}, GROUP),
    "list of dicts with reward": ({"prompt": Q, "completions": [{"completion": A, "reward": 0.2}, {"completion": B, "reward": -3}]}, GROUP),
    "candidates": ({"prompt": Q, "candidates": [A, B], "scores": [2, 1]}, GROUP),
    "content as parts": (
        {k: [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in v] for k, v in CHAT.items()}, CHAT),
    "roles human and gpt": ({"prompt": [{"role": "human", "content": Q}], "chosen": [{"role": "gpt", "content": A}],
                             "rejected": [{"role": "GPT", "content": B}]}, CHAT),
    "tool calls": ({"prompt": [user()], "chosen": [bot(None, tool_calls=[CALL])], "rejected": [bot(B)]},
                   {**CHAT, "chosen": [bot(None, tool_calls=[CALL])]}),
    "a message for an answer": ({"prompt": Q, "chosen": [bot(A)], "rejected": [bot(B)]}, CHAT),
    "TRL's None beside it": ({**TEXT, "tools": None, "chat_template_kwargs": None}, TEXT),
    "images that are none": ({**TEXT, "images": []}, TEXT),
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "summarize comparisons": (
        {"info": {"id": "1", "post": "long", "title": "t"}, "summaries": [{"text": A}, {"text": B}], "choice": 0},
        "no preference columns; found 'info', 'summaries', 'choice'",
    ),
    "Stack Exchange paired": ({"question": Q, "response_j": A, "response_k": B}, r"--columns prompt=question,chosen=respo"),
    "the prompt is called otherwise": ({"frage": Q, "response_a": A, "response_b": B, "winner": "a"}, "hold their prompt among"),
    "process rewards": ({"prompt": Q, "completions": [A, B], "labels": [True, False]}, "'completions': expected a list of dicts"),
    "Alpaca instructions": ({"instruction": Q, "input": "", "output": A}, "'output': expected a list, found str"),
    "HelpSteer attributes": ({"prompt": Q, "response": A, "helpfulness": 4}, "no preference columns; found 'prompt', 'response'"),
    "labels between": ({"prompt": Q, "completion": A, "label": 0.7}, r"'label': expected true or false .* float \(0\.7\)"),
    "labels by another count": ({"prompt": Q, "completion": A, "label": 5}, r"'label': expected true or false .* int \(5\)"),
    "an id of neither": ({"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 2}, "expected one of '0', '1'"),
    "an unknown winner": ({"prompt": Q, "response_a": A, "response_b": B, "winner": "claude"}, "'winner': expected one of"),
    "strengths in words": (
        {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": "much"}, "expected a number, found str"),
    "several chosen": ({"prompt": Q, "chosen": [A, A], "rejected": [B]}, "'chosen', message 0: expected .*'role'"),
    "token lengths": ({"prompt": Q, "responses": [A, B], "scores": [1]}, "2 values in column 'responses' and 1 in 'scores'"),
    "a document beside the question": (
        {"question": Q, "context": "A long text.", "chosen": A, "rejected": B}, "'context' would be lost"),
    "whole conversations of another prompt": ({"prompt": SECOND, **WHOLE}, "text of 'prompt' would be lost"),
    "a prompt that stands in the answers": (
        {"prompt": Q, "chosen": f"{Q} {A}", "rejected": f"{Q} {B}"}, "every response begins with the text of the prompt"),
    "the same in messages": (
        {"messages": [user()], "chosen": f"{Q} {A}", "rejected": f"{Q} {B}"}, "every response begins with the text of the pr"),
    "conversations behind another prompt": ({"prompt": [user(SECOND)], **WHOLE}, "begins with all messages of the prompt"),
    "answers of the user": ({"prompt": [user()], "chosen": [user(A)], "rejected": [user(B)]}, "expected the assistant's answer"),
    "Python's own lists": ({"prompt": Q, "chosen": str(WHOLE["chosen"]), "rejected": str(WHOLE["rejected"])},
                           r"written by Python's str\(\), which is no JSON"),
    "unknown speakers": ({"conversations": [{"from": "function_call", "value": "{}"}], "chosen": gpt(A), "rejected": gpt(B)},
                         "'from' is 'function_call'; known are 'human'"),
    "images": ({**TEXT, "images": ["a.png"]}, "images are read by a processor"),
    "parts with an image": (
        {**CHAT, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": Q}]}]},
        "column 'prompt': images are read by a processor"),
    "two system prompts": ({"system": "Be loud.", **WITH_SYSTEM}, "system message differs from the system column"),
    "a system prompt beside transcripts": (
        {"system": SYSTEM, "chosen": f"{Q} {A}", "rejected": f"{Q} {B}"}, "text without a prompt beside a system prompt"),
    "history that is no pairs": (
        {"instruction": Q, "history": "earlier", "chosen": A, "rejected": B}, "'history': expected pairs of a question"),
    "an unfinished conversation": ({"messages": [user()], "label": True}, "ends with the assistant's answer"),
    "a message that is no message": ({**CHAT, "chosen": [{"speaker": "a", "said": A}]}, "'role' is NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_layout_is_read_as_it_is_meant(bytewise: Any, name: str) -> None:
    row, want = READ[name]
    dataset = Dataset.from_list([row])
    assert tokens_of(dataset, bytewise) == tokens_of(Dataset.from_list([want]), bytewise)
    assert tokens_of(dataset.to_iterable_dataset(), bytewise) == tokens_of(dataset, bytewise)
    report = report_of(dataset, bytewise)
    said = report.layout + "".join(report.notes)
    known = ("tools", "chat_template_kwargs")
    assert all(column in said for column in row if column not in known)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_is_not_read_is_refused_by_name(bytewise: Any, name: str, streaming: bool) -> None:
    row, why = REFUSED[name]
    dataset = Dataset.from_list([row])
    with pytest.raises(FlexdpoError, match=why):
        tokens_of(dataset.to_iterable_dataset() if streaming else dataset, bytewise)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": 0},
        {"prompt": Q, "response_a": A, "response_b": B, "winner": "tie (bothbad)"},
        {"prompt": Q, "response_a": A, "response_b": B, "winner": None},
        {"prompt": Q, "responses": [A, B], "scores": [1, 1.0]},
        {"prompt": Q, "responses": [A, B], "ranks": [1, None]},
        {"question": Q, "answer_0": A, "answer_1": B, "score_0": 0.0, "score_1": 0.0},
    ],
)
def test_a_tie_is_counted(bytewise: Any, row: dict[str, Any]) -> None:
    with pytest.raises(
        FlexdpoError, match=r"none of the 1 rows can be used: 1 skipped \(no preference between the resp"
    ):
        tokens_of(Dataset.from_list([row]), bytewise)


def test_turns_of_the_user_in_a_response_are_named(bytewise: Any) -> None:
    talk = {
        "conversation_a": [user(), bot(A), user(SECOND), bot(A)],
        "conversation_b": [user(), bot(B)],
        "winner": "model_a",
    }
    notes = report_of(Dataset.from_list([talk]), bytewise).notes
    assert "responses hold turns of the user, which are learned too, in 1 rows, first at row 0" in notes


@pytest.mark.parametrize("answers", [("Yes.", "No."), ([bot("Yes.")], [bot("No."), user(SECOND), bot(B)])])
def test_responses_go_on_with_what_the_assistant_began(bytewise: Any, answers: Any) -> None:
    begun = {"prompt": [user(), bot("Sure: ")], "chosen": answers[0], "rejected": answers[1]}
    dataset = Dataset.from_list([begun])
    note = "responses go on with the assistant's turn that the prompt ends with in 1 rows, first at row 0"
    assert note in report_of(dataset, bytewise).notes
    [(prompt, responses, *_)] = tokens_of(dataset, bytewise)
    assert bytewise.decode(prompt).endswith("<|assistant|>Sure: ")
    assert bytewise.decode(responses[0]) == "Yes.<eos>"
    assert bytewise.decode(responses[1]).startswith("No.<eos>")
    # a call of a tool is a turn of its own
    begun["prompt"] = [user(), {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}]
    assert note not in report_of(Dataset.from_list([begun]), bytewise).notes


def test_every_layout_of_the_registry_has_a_row() -> None:
    given = [row for row, _ in READ.values()]
    rows = [*given, {"messages": 1, "rejected_messages": 1}, {"messages": 1, "rejected_response": 1}]
    first = {next(key for key in LAYOUTS if set(key.split()) <= row.keys()) for row in rows}
    assert len(first) > 20
