"""The built-in example as a whole: its files, its table, the side-by-side timing, and (slow) what it must reach."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexdpo.config import DPOConfig
from flexdpo.errors import FlexdpoError
from flexdpo.hf.forward_layout import ATTN_IMPLEMENTATION
from flexdpo.hf.prepare import prepare_model
from flexdpo.layout.groups import Group
from flexdpo.objective.logps import response_logps
from flexdpo.objective.objective import Objective
from flexdpo.runs import example
from flexdpo.runs.example import (
    ExampleResult,
    Recipe,
    fresh_output_dir,
    run_example,
)
from flexdpo.runs.step_times import StepTimes, unshared_batch
from flexdpo.training.batch import PackingCollator
from flexdpo.training.step import Runner
from tests.example.part import part_of_the_library

TINY = Recipe(warm_up_steps=4, dpo_steps=4, held_out_pairs=40, timing_rounds=2)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> ExampleResult:
    """A run too short to learn anything, on a part of the library."""
    output = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "read_standard_library", lambda **_: part_of_the_library())
        return run_example(output, seed=1, recipe=TINY)


def groups() -> list[Group]:
    """Pairs with shared prompts; the second pair's responses begin alike, the third group has three responses."""
    return [
        Group.from_lists([1, 5, 6, 7], [[8, 9, 2], [10, 2]]),
        Group.from_lists([1, 5], [[8, 9, 11, 2], [8, 9, 12]]),
        Group.from_lists([1, 4, 4], [[3], [6, 7], [9, 2]], edges=[(0, 1), (2, 1)]),
    ]


def tiny_llama(seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    config._attn_implementation = ATTN_IMPLEMENTATION
    model = LlamaForCausalLM(config).double()
    prepare_model(model)
    return model


def test_unshared_rows_run_every_response_behind_its_own_prompt() -> None:
    shared = PackingCollator().packed(groups())
    unshared = unshared_batch(shared)
    assert unshared.tokens_run == shared.tokens_unshared == 38
    assert shared.tokens_run < unshared.tokens_run
    (row,) = unshared.rows
    sequences = [sequence for group in groups() for sequence in group.sequences]
    assert row.input_ids[0].tolist() == [int(token) for sequence in sequences for token in sequence]
    assert row.position_ids[0].tolist() == [i for sequence in sequences for i in range(sequence.size)]


def test_unshared_rows_give_the_shared_rows_loss_and_gradients() -> None:
    model, reference = tiny_llama(0), tiny_llama(1)
    shared = PackingCollator().packed(groups())
    found = []
    for batch in (shared, unshared_batch(shared)):
        model.zero_grad()
        run = Runner(model, Objective(), lambda row: response_logps(reference, row), torch.Tensor.backward)
        result = run(batch)
        assert abs(float(result.loss) - math.log(2)) > 1e-3  # the two models differ, so the loss says something
        found.append((result.loss, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-8)


def test_writes_a_model_a_tokenizer_metrics_and_pictures(tiny_run: ExampleResult) -> None:
    output = tiny_run.output_dir
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer("def add(a, b):\n", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert (output / "model.safetensors").exists()
    for picture in ("training.png", "mask.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")


def test_metrics_name_their_phase_and_end_with_the_result(tiny_run: ExampleResult) -> None:
    entries = [json.loads(line) for line in (tiny_run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert {entry["phase"] for entry in entries} == {"warm-up", "dpo", "final"}
    before = next(entry for entry in entries if "eval_loss" in entry)
    assert before["step"] == 0
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    final = entries[-1]
    assert final["phase"] == "final"
    assert final["tokens_unshared"] / final["tokens_run"] >= 1.4
    assert final["after"]["rewards/accuracies"] == tiny_run.accuracy
    assert 0 <= final["strangers"]["rewards/accuracies"] <= 1


def test_timing_leaves_the_weights_alone_and_compares_equal_losses(tiny_run: ExampleResult) -> None:
    assert tiny_run.step_times.loss_gap < 1e-5
    assert tiny_run.step_times.shared > 0
    assert tiny_run.step_times.laying_out > 0
    assert tiny_run.step_times.unshared > 0


def test_the_table_says_what_was_reached(tiny_run: ExampleResult) -> None:
    result = ExampleResult(
        output_dir=Path("out"),
        functions=16401,
        train_pairs=5892,
        held_out_pairs=600,
        before={"rewards/accuracies": 0.0, "rewards/margins": 0.0},
        after={"rewards/accuracies": 0.8125, "rewards/margins": 1.75},
        strangers={"rewards/accuracies": 0.49, "rewards/margins": 0.0},
        warm_up_accuracy=0.53,
        longer_accuracy=0.5,
        tokens_run=100_000,
        tokens_unshared=159_000,
        step_times=StepTimes(0.050, 0.070, 2.4e-7, 0.0008),
        seconds=171.2,
    )
    assert result.table().splitlines() == [
        "Which body belongs to this function?              before DPO     after DPO",
        "reward accuracy on 600 held-out pairs               all tied         0.812",
        "reward margin                                          0.000         1.750",
        "control: reward accuracy, strangers' prompts                         0.490",
        "control: the model's log-probability alone             0.530",
        'control: the rule "longer is chosen"                   0.500',
        "",
        "Cost of a DPO step                                  ordinary        shared",
        "tokens, whole training                               159,000       100,000",
        "milliseconds per step                                   70.0          50.0",
        "milliseconds to lay a batch out before                                 0.8",
        "1.59 times fewer tokens, 1.40 times faster steps, losses equal to 2e-07",
        "",
        "5892 pairs from 16401 functions of the standard library",
        "171 seconds, written to out",
    ]
    assert "all tied" in tiny_run.table()


def test_takes_a_fresh_numbered_folder(tmp_path: Path) -> None:
    names = [fresh_output_dir(tmp_path).name for _ in range(3)]
    assert names == ["flexdpo-example", "flexdpo-example-2", "flexdpo-example-3"]


def test_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FlexdpoError, match="is not empty"):
        run_example(tmp_path, recipe=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_learns_the_task_from_the_prompts(tmp_path: Path) -> None:
    # the seed that `flexdpo train` takes by default
    result = run_example(tmp_path / "out", seed=DPOConfig("unused").seed)
    assert result.held_out_pairs >= 500
    assert result.accuracy >= 0.8
    assert result.after["rewards/margins"] > 0.5
    assert 0.40 <= result.stranger_accuracy <= 0.60
    assert 0.45 <= result.longer_accuracy <= 0.55
    assert 0.45 <= result.warm_up_accuracy <= 0.65
    assert result.tokens_unshared / result.tokens_run >= 1.4
    assert result.step_times.loss_gap < 1e-5
    for name in ("model.safetensors", "tokenizer.json", "metrics.jsonl", "training.png", "mask.png"):
        assert (result.output_dir / name).stat().st_size > 0
