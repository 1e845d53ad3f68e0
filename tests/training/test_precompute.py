"""Reference values of a dataset that is taken part by part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from flexdpo import DPOTrainer
from flexdpo.training import run_reference
from flexdpo.training.batch import REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN
from tests.conftest import preference_rows
from tests.training.test_trainer import settings


@pytest.fixture
def columns(tmp_path, tokenizer, small_model, monkeypatch) -> Any:
    rows = preference_rows(17)
    # the same pair in two parts is computed once
    data = Dataset.from_list([*rows, rows[2]])

    def compute(folder: str, rows_at_once: int | None) -> tuple[Dataset, list[int]]:
        sizes: list[int] = []
        run = run_reference.precompute_reference

        def counted(cache: Any, groups: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(groups))
            return run(cache, groups, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(run_reference, "precompute_reference", counted)
            if rows_at_once is not None:
                patch.setattr(run_reference, "ROWS_AT_ONCE", rows_at_once)
            cache = str(tmp_path / folder)
            args = settings(tmp_path, precompute_ref_log_probs=True, precompute_ref_cache_dir=cache, ld_alpha=0.5)
            made = DPOTrainer(small_model(), None, args, train_dataset=data, processing_class=tokenizer)
        return made.train_dataset, sizes

    return compute


def test_parts_give_what_the_whole_gives(columns) -> None:
    whole, sizes = columns("whole", None)
    assert sizes == [18]
    parts, sizes = columns("parts", 5)
    assert sizes == [5, 5, 5, 3]
    for name in (REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN):
        np.testing.assert_allclose(np.array(parts[name]), np.array(whole[name]), rtol=1e-5)
    assert parts[17][REFERENCE_COLUMN] == parts[2][REFERENCE_COLUMN]
    again, _ = columns("parts", 5)
    assert again[REFERENCE_COLUMN][:] == parts[REFERENCE_COLUMN][:]
