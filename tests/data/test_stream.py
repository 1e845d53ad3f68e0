"""Streams: the whole dataset's rows in bounded memory, the same batches for any number of readers, exact resumes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from flexdpo import DPOTrainer, FlexdpoError
from flexdpo.data.load import load_preference_dataset
from flexdpo.data.stream import StreamedPreferences
from flexdpo.data.tokenize import tokenize_preferences
from flexdpo.training.batch import PackingCollator
from tests.conftest import preference_rows
from tests.training.test_trainer import settings


def odd_rows(number: int) -> list[dict[str, Any]]:
    """Every seventh row has no answer, every eleventh no difference."""
    rows: list[dict[str, Any]] = preference_rows(number)
    for row in rows[::7]:
        row["chosen"] = ""
    for row in rows[1::11]:
        row["rejected"] = row["chosen"]
    return rows


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return Dataset.from_list(rows).to_iterable_dataset()


@pytest.fixture
def streamed(tokenizer: Any) -> Any:
    def build(source: Any = None, **changes: Any) -> StreamedPreferences:
        source = stream(odd_rows(60)) if source is None else source
        return StreamedPreferences(source, tokenizer, **{"max_length": 30, **changes})

    return build


def numbers(rows: Any) -> list[int]:
    return [row["row"] for row in rows]


# --- the same rows and the same account as of the whole dataset ------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved", "folder"])
def test_rows_and_report_are_those_of_the_whole_dataset(
    tmp_path: Path, tokenizer: Any, streamed: Any, kind: str
) -> None:
    rows, path = odd_rows(150), tmp_path / f"pairs.{kind}"
    if kind in ("jsonl", "folder"):
        path = tmp_path / kind / "pairs.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = path if kind == "jsonl" else path.parent
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        getattr(Dataset.from_list(rows), f"to_{kind}")(path)
    want = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=20)
    assert {"empty response", "identical responses", "prompt alone fills max_length"} <= set(want.report.skipped)
    got = streamed(load_preference_dataset(str(path), streaming=True), max_length=20, endless=False)
    assert list(got) == want.dataset.to_list()
    # what no later row can change is known while they come, and not which length would have been enough
    advice = r"; max_length=\d+ would keep 95 % of the rows whole$"
    assert got.report == replace(want.report, notes=tuple(re.sub(advice, "", note) for note in want.report.notes))


def test_every_form_of_rows_streams(tokenizer: Any, streamed: Any) -> None:
    ids = [{"prompt_ids": [3], "chosen_ids": [5, 6 + k], "rejected_ids": [7]} for k in range(3)]
    labelled = [{"prompt": "w3 ", "completion": f"w{k}", "label": k > 4} for k in range(3, 7)]
    carrying = [
        {"prompt_ids": [3], "response_ids": [[5], [6]], "edges": [[0, 1]], "row": k, "ref_response_logps": [-1.0, -2.0]}
        for k in (4, 9)
    ]
    common = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in odd_rows(9)[2:7]]
    for rows in (ids, labelled, carrying, common):
        want = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=None)
        got = streamed(stream(rows), max_length=None, endless=False)
        assert list(got) == [dict(row) for row in want.dataset]
        assert got.report == want.report


def test_a_generator_without_known_columns_streams(streamed: Any) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from odd_rows(30)

    source = IterableDataset.from_generator(rows)
    assert source.column_names is None
    assert numbers(streamed(source, endless=False)) == numbers(streamed(stream(odd_rows(30)), endless=False))


# --- the same batches for any number of processes and workers --------------------------------------------------------


def batches_of(whole: StreamedPreferences, processes: int, workers: int, size: int) -> list[list[int]]:
    """The row numbers of each batch over all processes, as accelerate and torch hand them out."""
    whole.batch_size, whole.num_processes = size, processes
    per_process = []
    for rank in range(processes):
        part = whole if processes == 1 else IterableDatasetShard(whole, size, False, processes, rank)
        per_process.append(list(DataLoader(part, batch_size=size, num_workers=workers, collate_fn=numbers)))
    assert len({len(batches) for batches in per_process}) == 1
    return [[row for batch in step for row in batch] for step in zip(*per_process, strict=True)]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 2), (4, 0)])
def test_batches_do_not_depend_on_who_reads(streamed: Any, processes: int, workers: int) -> None:
    want = numbers(streamed(endless=False))
    got = batches_of(streamed(endless=False), processes, workers, size=8 // processes)
    flat = [row for batch in got for row in batch]
    assert flat[: len(want)] == want
    assert [len(batch) for batch in got[:-1]] == [8] * (len(got) - 1)
    # only what fills up the last batch of several processes is repeated, and can be told apart
    extra = flat[len(want) :]
    assert extra == ([] if processes == 1 else [-1 - row for row in want[: -len(want) % 8]])


def test_more_processes_than_rows(streamed: Any) -> None:
    one = stream(preference_rows(1))
    assert batches_of(streamed(one, endless=False), processes=4, workers=0, size=1) == [[0, -1, -1, -1]]
    assert batches_of(streamed(stream(preference_rows(2)), endless=False), 1, 0, size=8) == [[0, 1]]


def test_a_training_stream_goes_on_with_the_next_pass(streamed: Any) -> None:
    once = numbers(streamed(endless=False))
    assert numbers(islice(streamed(), 2 * len(once) + 5)) == [*once, *once, *once[:5]]
    for workers in (0, 2):
        loader = DataLoader(streamed(batch_size=8), batch_size=8, num_workers=workers, collate_fn=numbers)
        got = [row for batch in islice(loader, 20) for row in batch]
        assert got == (once * 4)[:160]


def test_a_closed_stream_gives_nothing(streamed: Any) -> None:
    whole = streamed()
    whole.closed = True
    assert list(whole) == []


# --- order -----------------------------------------------------------------------------------------------------------


def test_the_buffer_shuffles_every_pass_anew_and_always_alike(streamed: Any) -> None:
    once = numbers(streamed(endless=False))
    shuffled = numbers(islice(streamed(shuffle_buffer=10, seed=3), 2 * len(once)))
    first, second = shuffled[: len(once)], shuffled[len(once) :]
    assert sorted(first) == sorted(second) == once
    assert len({tuple(first), tuple(second), tuple(once)}) == 3
    # no row comes earlier than the buffer allows
    assert all(once.index(row) <= place + 10 for place, row in enumerate(first))
    again = streamed(shuffle_buffer=10, seed=3)
    assert numbers(islice(again, len(once))) == numbers(islice(again, len(once))) == first
    again.set_epoch(1)
    assert numbers(islice(again, len(once))) == second
    assert numbers(islice(streamed(shuffle_buffer=10, seed=4), len(once))) != first


def test_a_shuffled_source_keeps_its_meaning(streamed: Any) -> None:
    source = stream(preference_rows(40)).shuffle(seed=5, buffer_size=16)
    with_text = [row["prompt"] for row in source]
    got = list(streamed(source, endless=False, max_length=None))
    want = streamed(stream(preference_rows(40)), endless=False, max_length=None)
    by_prompt = {row["prompt"]: tokens["prompt_ids"] for row, tokens in zip(preference_rows(40), want, strict=True)}
    assert [row["prompt_ids"] for row in got] == [by_prompt[text] for text in with_text]
    passes = list(islice(streamed(source, max_length=None), 80))
    assert [r["prompt_ids"] for r in passes[:40]] != [r["prompt_ids"] for r in passes[40:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_batches_leave_the_rest_as_it_was(streamed: Any, workers: int) -> None:
    """What transformers does when a run continues."""

    def loader() -> Any:
        whole = streamed(shuffle_buffer=16, batch_size=4)
        return prepare_data_loader(
            DataLoader(whole, batch_size=4, num_workers=workers, collate_fn=PackingCollator(max_tokens_per_row=64)),
            put_on_device=False,
        )

    want = [batch["example_rows"].tolist() for batch in islice(loader(), 40)]
    resumed = islice(skip_first_batches(loader(), 25), 15)
    assert [batch["example_rows"].tolist() for batch in resumed] == want[25:]


# --- memory and the account ------------------------------------------------------------------------------------------


def test_only_what_the_buffers_hold_is_read(streamed: Any) -> None:
    read = []

    def endless_rows() -> Iterator[dict[str, Any]]:
        good = preference_rows(50)
        for number in count():
            read.append(number)
            yield good[number % 50]

    rows = iter(streamed(IterableDataset.from_generator(endless_rows), shuffle_buffer=100))
    read.clear()
    taken = list(islice(rows, 200))
    assert len(taken) == 200
    # the buffer, and one batch of the tokeniser
    assert max(read) < 200 + 100 + 64


def test_used_and_skipped_rows_always_add_up(streamed: Any) -> None:
    whole = streamed(stream(odd_rows(300)))
    seen = []
    for _ in islice(whole, 500):
        report = whole.report
        assert report.used + sum(report.skipped.values()) == report.rows
        seen.append(report.rows)
    # more than a pass was read, and every row counted once
    assert seen[0] < seen[-1] == 300


def test_rows_read_by_workers_are_counted_here(streamed: Any) -> None:
    want = streamed(endless=False)
    list(want)
    got = streamed(endless=False, batch_size=4)
    list(DataLoader(got, batch_size=4, num_workers=2, collate_fn=numbers))
    assert got.report == want.report
    assert got.report.skipped == {"empty response": 9, "identical responses": 5, "prompt alone fills max_length": 1}


def test_a_sample_is_a_tokenised_dataset(streamed: Any) -> None:
    whole = streamed()
    sample = whole.sample(10)
    assert numbers(sample) == numbers(islice(whole, 10))
    whole = streamed()
    whole.sample(10)
    assert whole.report.rows == 0
    assert len(whole.sample(1000)) == 45


# --- what cannot work says so ----------------------------------------------------------------------------------------


def test_rows_that_cannot_be_trained_on_are_named(streamed: Any) -> None:
    rows: list[dict[str, Any]] = preference_rows(100)
    rows[71]["chosen"] = 5
    source = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(FlexdpoError, match=r"^train: row 71 \(counted from 0\), column 'chosen': expected text .*int"):
        list(streamed(source, endless=False))
    # everything before its batch of the tokeniser came through
    assert len(list(islice(streamed(source), 60))) == 60
    with pytest.raises(
        FlexdpoError, match=r"train: row \d+ .* has \d+ tokens but the model has 20 positions; set max_"
    ):
        list(streamed(max_positions=20))
    too_long = DataLoader(streamed(), batch_size=4, collate_fn=PackingCollator(max_tokens_per_row=24))
    with pytest.raises(FlexdpoError, match=r"row \d+ has a sequence of \d+ tokens .*_per_row=24 leaves room"):
        list(too_long)
    carrying = {
        "prompt_ids": [3],
        "response_ids": [[5, 6, 7], [6]],
        "edges": [[0, 1]],
        "ref_response_logps": [0.0, 0.0],
    }
    with pytest.raises(
        FlexdpoError, match=r"row 0 .* longer than max_length=3, and column 'ref_response_logps' belongs"
    ):
        list(streamed(stream([carrying]), max_length=3))


def test_streams_without_a_usable_row(streamed: Any) -> None:
    rows = [dict(row, chosen="") for row in preference_rows(3)]
    for endless in (False, True):
        with pytest.raises(FlexdpoError, match=r"none of the 3 rows can be used: 3 skipped \(empty response, first at"):
            list(streamed(stream(rows), endless=endless))
    with pytest.raises(FlexdpoError, match=r"train: none of the 0 rows can be used|train: the stream has no rows"):
        list(streamed(IterableDataset.from_generator(lambda: iter(()))))


def test_a_stream_that_breaks_off(tmp_path: Path, streamed: Any, capfd: Any) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from preference_rows(70)
        raise ConnectionError("the other side hung up\nand more")

    with pytest.raises(
        FlexdpoError, match=r"broke off in its rows 64 to 127 .*: ConnectionError: the other side hung up and more$"
    ):
        list(streamed(IterableDataset.from_generator(rows)))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(5)) + "{oops\n")
    with pytest.raises(
        FlexdpoError, match=r"train: the stream broke off in its rows 0 to 63 .*JSON parse error.* row 5"
    ):
        list(streamed(load_preference_dataset(str(path), streaming=True)))
    assert "Failed" not in capfd.readouterr().err


def test_sources_that_cannot_be_streamed(tmp_path: Path, streamed: Any) -> None:
    with pytest.raises(FlexdpoError, match=r"train: expected a datasets\.IterableDataset, found list; pick one split"):
        streamed([1, 2])
    from datasets.distributed import split_dataset_by_node

    with pytest.raises(FlexdpoError, match="already split by process; give the whole stream to every process"):
        streamed(split_dataset_by_node(stream(odd_rows(8)), rank=0, world_size=2))
    with pytest.raises(FlexdpoError, match="train: no preference columns; found 'text'"):
        streamed(stream([{"text": "x"}]))
    with pytest.raises(FlexdpoError, match="shuffle_buffer=-1: use 0 to keep the order"):
        streamed(shuffle_buffer=-1)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(preference_rows(1)[0]) + "\n")
    with pytest.raises(FlexdpoError, match=r"pairs\.jsonl: cannot be loaded \(ValueError: Bad split: test"):
        load_preference_dataset(str(path), split="test", streaming=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "a stream has no length, so say how long to train: set max_steps"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy='group_by_length' looks at the whole",
        ),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs looks at the whole dataset, and a stream"),
        ({"regroup_prompts": True}, "regroup_prompts looks at the whole dataset, and a stream"),
        (
            {"eval_strategy": "epoch"},
            "eval_strategy='epoch' has no meaning for a stream, which has no end; use 'steps'",
        ),
        ({"save_strategy": "epoch"}, "save_strategy='epoch' has no meaning for a stream"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config sets dispatch_batches=True"),
    ],
)
def test_settings_that_a_stream_cannot_have(
    tmp_path: Path, tokenizer: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlexdpoError, match=message):
        StreamedPreferences.for_run(stream(odd_rows(9)), tokenizer, settings(tmp_path, **changes), name="train")


def test_the_stream_of_a_run(tmp_path: Path, tokenizer: Any) -> None:
    changes = {"per_device_eval_batch_size": 3, "eval_strategy": "steps", "stream_shuffle_buffer": 5}
    args = settings(tmp_path, data_seed=7, max_length=20, **changes)
    made = [StreamedPreferences.for_run(stream(odd_rows(30)), tokenizer, args, name=name) for name in ("train", "eval")]
    # each process reads for itself
    assert args.accelerator_config.dispatch_batches is False
    assert [(one.endless, one.batch_size, one.shuffle_buffer) for one in made] == [(True, 4, 5), (False, 3, 0)]
    assert {(one.settings.max_length, one.num_processes, one.seed) for one in made} == {(20, 1, 7)}
    # what is only evaluated may go with training by epochs
    epochs = settings(tmp_path, max_steps=-1, eval_strategy="epoch", regroup_prompts=True)
    StreamedPreferences.for_run(stream(odd_rows(9)), tokenizer, epochs, name="eval")
    args = settings(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(FlexdpoError, match="precompute_ref_log_probs looks at the whole dataset"):
        StreamedPreferences.for_run(stream(odd_rows(9)), tokenizer, args, name="eval")


# --- through the trainer ---------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path, tokenizer: Any, small_model: Any) -> Any:
    def build(data: Any, folder: str = "run", **changes: Any) -> DPOTrainer:
        args = settings(tmp_path / folder, **{"max_tokens_per_row": 60, "prove": False, **changes})
        return DPOTrainer(small_model(), None, args, train_dataset=data, processing_class=tokenizer)

    return build


def curve(run: DPOTrainer) -> list[float]:
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_is_the_run_in_the_order_of_the_file(trainer: Any, workers: int) -> None:
    rows = odd_rows(60)
    want = curve(trainer(Dataset.from_list(rows), train_sampling_strategy="sequential"))
    run = trainer(stream(rows), "streamed", dataloader_num_workers=workers)
    assert curve(run) == want
    report = run.data_reports["train"]
    assert report.used + sum(report.skipped.values()) == report.rows == 60


def test_a_streamed_run_continues_exactly(tmp_path: Path, trainer: Any) -> None:
    """Beyond the end of the first pass, and a finished run is left alone."""
    rows = odd_rows(20)
    saving = {"max_steps": 9, "save_strategy": "steps", "save_steps": 6}
    whole = trainer(stream(rows), "whole", **saving)
    whole.train()
    first = trainer(stream(rows), **saving)
    first.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    for _ in range(2):
        again = trainer(stream(rows), **saving)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 9
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], weight), name
    with pytest.raises(FlexdpoError, match="checkpoint-9 was made from other training data"):
        trainer(stream(rows[5:]), **saving).train(resume_from_checkpoint=True)


def test_a_streamed_evaluation_is_that_of_the_whole_dataset(trainer: Any) -> None:
    rows = odd_rows(30)
    run = trainer(Dataset.from_list(rows), per_device_eval_batch_size=4)
    run.train()
    want, got = run.evaluate(Dataset.from_list(rows)), run.evaluate(stream(rows))
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert got[name] == pytest.approx(want[name], rel=1e-5)


def test_an_example_that_fits_no_row_stops_a_streamed_run_at_its_batch(trainer: Any) -> None:
    rows = [dict(row, prompt="w5 ", chosen="w6", rejected="w7") for row in preference_rows(20)]
    rows[13]["prompt"] = "w5 " * 70
    run = trainer(stream(rows), max_steps=10, dataloader_num_workers=1)
    with pytest.raises(
        FlexdpoError, match=r"^row 13 has a sequence of 70 tokens or more but max_tokens_per_row=60 leaves room"
    ):
        run.train()
    assert run.state.global_step in (2, 3)


@pytest.mark.parametrize("endless", [True, False])
def test_a_stream_without_a_usable_row_says_so_soon(streamed: Any, endless: bool) -> None:
    read = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(100_000):
            read.append(number)
            yield {"prompt": "w3 " * 50, "chosen": "w4", "rejected": "w5"}

    why = r"train, the beginning of the stream: none of the 960 rows can be used: 960 skipped \(prompt alone fills"
    with pytest.raises(FlexdpoError, match=why):
        next(iter(streamed(IterableDataset.from_generator(rows), endless=endless)))
    assert len(read) <= 1100
