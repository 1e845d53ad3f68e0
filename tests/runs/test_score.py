"""Scores of a dataset in a file: right, the same after an interruption, and a training run's reference bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexdpo import cli
from flexdpo.config import DPOConfig
from flexdpo.errors import FlexdpoError
from flexdpo.reference import logps
from flexdpo.training.batch import REFERENCE_COLUMN
from flexdpo.training.trainer import DPOTrainer
from tests.conftest import build_model, preference_rows


@pytest.fixture
def parts(tmp_path: Path, tokenizer: Any) -> dict[str, str]:
    """Two models and some preferences, of which two begin alike."""
    rows = preference_rows(6, seed=3)
    data = tmp_path / "pairs.jsonl"
    Dataset.from_list(rows).to_json(data)
    names = {"data": str(data)}
    for seed, name in enumerate(("policy", "reference")):
        model = build_model("llama", seed=seed).float()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        names[name] = str(tmp_path / name)
    return names


def command(parts: dict[str, str], file: Path, *more: str) -> list[str]:
    options = {"--output_file": str(file), "--use_cpu": "true", "--bf16": "false"}
    return ["score", parts["policy"], parts["data"], *chain.from_iterable(options.items()), *more]


def scored(parts: dict[str, str], file: Path, *more: str) -> int:
    return cli.main(command(parts, file, *more))


def one_by_one(folder: str, rows: list[dict[str, Any]]) -> list[list[float]]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        sums = []
        for name in ("chosen", "rejected"):
            ids = torch.tensor([[*prompt, *tokenizer(row[name])["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(float(logits.gather(1, ids[0, len(prompt) :, None]).sum()))
        found.append(sums)
    return found


def test_scores_are_those_of_each_response_alone(
    parts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores.parquet"
    assert scored(parts, file, "--ref_model", parts["reference"], "--beta", "0.3") == 0
    table = pq.read_table(file).to_pydict()
    rows = preference_rows(6, seed=3)
    wants = one_by_one(parts["policy"], rows), one_by_one(parts["reference"], rows)
    assert table["row"] == [*range(6)]
    for name, want in zip(("logps", "ref_logps"), wants, strict=True):
        torch.testing.assert_close(torch.tensor(table[name]), torch.tensor(want), rtol=1e-5, atol=1e-4)
    rewards = 0.3 * (torch.tensor(wants[0]) - torch.tensor(wants[1]))
    torch.testing.assert_close(torch.tensor(table["rewards"]), rewards, rtol=1e-4, atol=1e-4)
    agreed = (rewards[:, 0] > rewards[:, 1]).float()
    assert table["accuracy"] == agreed.tolist()
    assert f"6 rows; implicit rewards agree with {agreed.mean():.1%} of the preferences" in capsys.readouterr().out


def test_an_interrupted_run_ends_with_the_same_file(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, again = tmp_path / "scores.parquet", tmp_path / "again.parquet"
    assert scored(parts, file, "--max_tokens_per_row", "64") == 0
    monkeypatch.setenv("FLEXDPO_CACHE", str(tmp_path / "another"))
    values, done = logps._values, []

    def stopping(*args: Any) -> Any:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return values(*args)

    monkeypatch.setattr(logps, "_values", stopping)
    assert scored(parts, again, "--max_tokens_per_row", "64") == 130
    assert not again.exists()
    assert scored(parts, again, "--max_tokens_per_row", "64") == 0
    assert again.read_bytes() == file.read_bytes()
    # the first row was not run again
    assert len(done) > 2


# the command, writing after every row instead of twice a minute, and slow enough to be killed between two; on one
# thread as the tests are, since sums on several round otherwise
SLOWLY = """
import sys, time
from functools import partial
import torch
torch.set_num_threads(1)
from flexdpo import DPOTrainer, cli
from flexdpo.training import run_reference
run_reference.PrecomputeSettings = partial(run_reference.PrecomputeSettings, save_every_s=0)
run = DPOTrainer.reference_logps
DPOTrainer.reference_logps = lambda self, row: (time.sleep(0.5), run(self, row))[1]
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("scored_before", [0, 1], ids=["in the policy", "in the reference"])
def test_a_killed_run_ends_with_the_same_file(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored_before: int
) -> None:
    more = ("--ref_model", parts["reference"], "--max_tokens_per_row", "64")
    file, again, cache = tmp_path / "scores.parquet", tmp_path / "again.parquet", tmp_path / "another"
    values, rows_run = logps._values, []
    monkeypatch.setattr(logps, "_values", lambda *args: (rows_run.append(1), values(*args))[1])
    assert scored(parts, file, *more) == 0
    whole = len(rows_run)

    monkeypatch.setenv("FLEXDPO_CACHE", str(cache))
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *command(parts, again, *more)])
    # one cache for each model, the policy's first
    while len({part.parent for part in cache.rglob("part-*.safetensors")}) <= scored_before:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not again.exists()

    rows_run.clear()
    assert scored(parts, again, *more) == 0
    assert again.read_bytes() == file.read_bytes()
    assert 0 < len(rows_run) < whole
    for column in ("logps", "ref_logps"):
        model = parts["policy" if column == "logps" else "reference"]
        trainer = trained(parts, tmp_path / column, model, precompute_ref_cache_dir=str(again), max_tokens_per_row=64)
        assert trainer.train_dataset[REFERENCE_COLUMN] == pq.read_table(file).to_pydict()[column]


def trained(parts: dict[str, str], folder: Path, model: str, **settings: Any) -> DPOTrainer:
    config = DPOConfig(
        str(folder), precompute_ref_log_probs=True, use_cpu=True, bf16=False, report_to="none", prove=False, **settings,
    )  # fmt: skip
    return DPOTrainer(model, None, config, train_dataset=Dataset.from_list(preference_rows(6, seed=3)))


@pytest.mark.parametrize("column", ["logps", "ref_logps"])
def test_a_training_run_takes_them_for_its_reference(parts: dict[str, str], tmp_path: Path, column: str) -> None:
    file = tmp_path / "scores.parquet"
    assert scored(parts, file, "--ref_model", parts["reference"]) == 0
    model = parts["policy" if column == "logps" else "reference"]
    trainer = trained(parts, tmp_path / "run", model, precompute_ref_cache_dir=str(file))
    assert trainer.train_dataset[REFERENCE_COLUMN] == pq.read_table(file).to_pydict()[column]


def test_what_is_no_reference_of_this_run(parts: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "scores.parquet"
    assert scored(parts, file) == 0
    with pytest.raises(FlexdpoError, match="has no values of this run's reference, but logps of another model"):
        trained(parts, tmp_path / "run", parts["reference"], precompute_ref_cache_dir=str(file))
    Dataset.from_list(preference_rows(2)).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(FlexdpoError, match=r"pairs\.parquet holds no scores; write it with flexdpo score"):
        trained(parts, tmp_path / "run", parts["policy"], precompute_ref_cache_dir=str(tmp_path / "pairs.parquet"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which model? give a folder or hub name"),
        (["model", "data", "--output_file", "scores.csv"], "--output_file scores.csv: name a .parquet file"),
        (["model"], "which dataset? give a file, folder or hub name"),
    ],
)
def test_what_is_missing_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", *words]) == 2
    assert message in capsys.readouterr().err
