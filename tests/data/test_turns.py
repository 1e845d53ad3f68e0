"""Trees of turns: which preferences they hold, and that sharing their histories changes nothing."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset

import flexdpo
from flexdpo import FlexdpoError, Group, pack, prepare_model, regroup_by_prompt, step_preferences, tokenize_preferences
from flexdpo.data.tokenize import group_from_row
from flexdpo.layout import packing
from tests.conftest import build_model
from tests.test_equivalence import packed, relative_error, unpacked

CHAT = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"


def said(*texts: str) -> list[dict[str, str]]:
    """The user begins, and speaks at every other turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def tree() -> dict[str, Any]:
    """Four turns of the assistant, of which three part: 2 x 3 x 1 x 2 = 12 conversations; no two means are equal."""
    conversations, scores = [], []
    for number, (a, b, c) in enumerate(product(range(2), range(3), range(2))):
        answers = (f"w3{a} w35 w36", f"w4{a} w5{b}", f"w5{b} w51", f"w7{c} w70")
        questions = ("w5 w6 w7 w8", f"w9 w6{a}", "w9 w62 w8", f"w6{b} w9")
        conversations.append(said(*(text for turn in zip(questions, answers, strict=True) for text in turn)))
        scores.append(2.0 ** ((7 * number) % 12))
    return {"conversations": conversations, "scores": scores}


def test_a_tree_trains_as_its_separate_pairs(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities, loss and every gradient, with histories of all depths shared."""
    monkeypatch.setattr(packing, "MIN_SHARED", 4)
    tokenizer.chat_template = CHAT
    # the first turn parts in 2, the second in 3 below each, and the last in 2 below each of 6
    preferences = step_preferences([tree()])
    assert len(preferences) == 1 + 2 * 3 + 6
    data, _ = tokenize_preferences(preferences, tokenizer, name="tree", max_length=None)
    pairs: list[Group] = [group_from_row(row) for row in data]
    groups = [group_from_row(row) for row in regroup_by_prompt(data)]
    assert len(groups) == 1 + 2 + 6
    stock, stock_reference = build_model("gpt2"), build_model("gpt2", seed=1)
    model, reference = (prepare_model(build_model("gpt2", "flexdpo", seed=seed)) for seed in (0, 1))
    rows = pack(groups, sharing="step")
    assert len(rows) == 1
    # every turn is run once
    assert rows[0].num_tokens < 0.4 * sum(group.unshared_tokens for group in pairs)
    order = [group for row in rows for group in row.groups]
    got, want = packed(model, reference, rows, order), unpacked(stock, stock_reference, order)
    assert relative_error(got, want) < 1e-9
    apart = unpacked(stock, stock_reference, pairs)
    torch.testing.assert_close(got.loss, apart.loss, rtol=1e-9, atol=0)
    for name, gradient in apart.gradients.items():
        torch.testing.assert_close(got.gradients[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))


def test_turns_are_worth_what_their_conversations_score() -> None:
    row = {
        "conversations": [said("q", "a", "r", "x"), said("q", "a", "r", "y"), said("q", "b")],
        "scores": [5, 1, 2],
    }
    found = [
        (len(each["prompt"]), each["chosen"][0]["content"], each["rejected"][0]["content"])
        for each in step_preferences([{"conversations": [said("u", "v")], "scores": [0]}, row])
    ]
    # the mean of 5 and 1 is above 2
    assert found == [(1, "a", "b"), (3, "x", "y")]
    # each turn's own score says otherwise
    row["scores"] = [[1, 0], [2, 0], [3]]
    assert [each["chosen"][0]["content"] for each in step_preferences([row])] == ["b"]


def test_tools_and_users_are_never_learned() -> None:
    told = [{"role": "tool", "content": "1"}], [{"role": "tool", "content": "2"}]
    conversations = [
        said("q", "a") + tool + [{"role": "assistant", "content": end}] for tool, end in zip(told, "xy", strict=True)
    ]
    with pytest.raises(FlexdpoError, match="no turn is preferred to another"):
        step_preferences([{"conversations": conversations, "scores": [1, 0]}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [said("q", "a")], "scores": [1, 2]}, r"row 0: expected a list of conversations .* score"),
        ({"conversations": [said("q", "a")], "scores": [[1, 2]]}, "conversation 0 has 1 turns of the assistant"),
        ({"conversations": [said("q", "a")], "scores": ["good"]}, "conversation 0 has 1 turns of the assistant"),
        ({"conversations": ["text"], "scores": [1]}, "row 0, column 'conversations': expected messages, found str"),
        ({"conversations": [said("q", "a")]}, "row 0: no column 'scores', found columns 'conversations'"),
        (None, r"row 0: no column 'conversations', found NoneType"),
    ],
)
def test_what_does_not_fit(row: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        flexdpo.step_preferences([row])


@pytest.mark.parametrize("dataset", [None, 3, "rows", tree()], ids=["none", "number", "text", "one row"])
def test_what_is_no_list_of_rows(dataset: Any) -> None:
    with pytest.raises(FlexdpoError, match=r"expected a Dataset or a list of rows with 'conversations', got"):
        step_preferences(dataset)


def test_other_columns_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    talk = {"conversations": [said("q", "a"), said("q", "b")], "scores": [1, 0]}
    rows = [{**talk, "id": "one", "row": 17}, {**talk, "tools": tools, "system": "be kind"}]
    for dataset in (
        rows,
        Dataset.from_list([{**dict.fromkeys(rows[1]), "id": None, "row": None, **row} for row in rows]),
    ):
        made = step_preferences(dataset).to_list()
        assert [each["tools"] for each in made] == [None, tools]
        assert [each["system"] for each in made] == [None, "be kind"]
        assert [each["id"] for each in made] == ["one", None]
        assert [each["row"] for each in made] == [0, 1]
        assert made[0].keys() == {"prompt", "chosen", "rejected", "row", "id", "tools", "system"}
    assert "so 'row' of the data are replaced" in caplog.text
    labelled = Dataset.from_list([{**talk, "kind": 1}]).cast_column("kind", ClassLabel(names=["a", "b"]))
    assert step_preferences(labelled).features["kind"].names == ["a", "b"]
    with pytest.raises(FlexdpoError, match=r"column 'id' of the rows .* more than one type .* leave the column out"):
        step_preferences([{**talk, "id": "one"}, {**talk, "id": [1]}])


def test_tools_reach_the_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if tools %}w9 {{ tools[0]['function']['name'] }} {% endif %}" + CHAT
    talk = {"conversations": [said("w3", "w4"), said("w3", "w5")], "scores": [1, 0]}
    rows = [talk, {**talk, "tools": [{"type": "function", "function": {"name": "w8"}}]}]
    data, _ = tokenize_preferences(step_preferences(rows), tokenizer, max_length=None)
    assert [tokenizer.decode(row["prompt_ids"]).split()[:2] for row in data] == [["w1", "w3"], ["w9", "w8"]]
