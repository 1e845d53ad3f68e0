"""Scores a dataset under a model: log-probabilities, implicit rewards and accuracies, row by row, to a parquet file.

The trainer's own precomputation does the work, so that values are those of a training run's reference, and work that
was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from flexdpo.config import DPOConfig
from flexdpo.data.tokenize import group_from_row
from flexdpo.errors import FlexdpoError
from flexdpo.reference.cache import ReferenceIdentity, response_key
from flexdpo.reference.scores import is_scores, write_scores
from flexdpo.training.batch import REFERENCE_COLUMN
from flexdpo.training.trainer import DPOTrainer


@dataclass
class ScoreSettings:
    """What to score with, and where to. Names as in TRL."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A causal LM or an adapter: a saved folder, or a hub name.", "aliases": ["--model"]},
    )
    ref_model: str | None = field(
        default=None,
        metadata={"help": "What implicit rewards are held against; without it they are empty."},
    )
    output_file: str = field(default="scores.parquet", metadata={"help": "The file to write."})
    beta: float | None = field(default=None, metadata={"help": "Factor of implicit rewards; 0.1 by default."})
    dtype: str | None = field(
        default=None, metadata={"help": "Load weights in this dtype: bfloat16, float16 or auto; by default float32."}
    )
    max_length: int = field(default=1024, metadata={"help": "Cut sequences to this many tokens, as in training."})
    max_tokens_per_row: int | None = field(default=None, metadata={"help": "Longest packed row in tokens."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Run under autocast in bfloat16; the default is that of training."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU, whatever else there is."})

    def require_names(self) -> None:
        """Raise unless model and file can be what they must be."""
        if self.model_name_or_path is None:
            raise FlexdpoError("which model? give a folder or hub name: flexdpo score ./my-model pairs.jsonl")
        if self.beta is not None and self.ref_model is None:
            raise FlexdpoError(f"--beta {self.beta} is for implicit rewards; add --ref_model, or leave it out")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise FlexdpoError(f"--beta {self.beta}: implicit rewards need more than that; give a number above 0")
        path = Path(self.output_file)
        if path.suffix != ".parquet" or not path.parent.is_dir():
            raise FlexdpoError(f"--output_file {path}: name a .parquet file in a folder that exists")
        if not os.access(path.parent, os.W_OK):
            raise FlexdpoError(f"--output_file {path}: the folder cannot be written to; name a file in another")
        if path.exists() and not is_scores(path):
            raise FlexdpoError(f"--output_file {path} would write over what flexdpo score did not write; name another")


def score(settings: ScoreSettings, data: Any) -> str:
    """Write the file, and return a summary.

    Raises ``FlexdpoError`` as a training run with these settings would.
    """
    settings.require_names()
    rows, identity = _log_probabilities(str(settings.model_name_or_path), settings, data)
    reference = None
    if settings.ref_model is not None:
        others, reference = _log_probabilities(settings.ref_model, settings, data)
        for row, other in zip(rows, others, strict=True):
            row["ref_logps"] = other["logps"]
            sums = zip(row["logps"], other["logps"], strict=True)
            beta = 0.1 if settings.beta is None else settings.beta
            row["rewards"] = [beta * (logp - ref_logp) for logp, ref_logp in sums]
    for row in rows:
        values = row.get("rewards") or row["logps"]
        edges = row.pop("edges")
        if edges:
            row["accuracy"] = fmean(values[chosen] > values[rejected] for chosen, rejected in edges)
    write_scores(Path(settings.output_file), rows, identity, reference)
    accuracies = [row["accuracy"] for row in rows if "accuracy" in row]
    of = "implicit rewards" if reference is not None else "log-probabilities"
    told = f"; {of} agree with {fmean(accuracies):.1%} of the preferences" if accuracies else ""
    return f"{settings.output_file}: {len(rows):,} rows{told}"


def _log_probabilities(name: str, settings: ScoreSettings, data: Any) -> tuple[list[dict[str, Any]], ReferenceIdentity]:
    """The rows that can be used, and whose values they hold."""
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {} if settings.bf16 is None else {"bf16": settings.bf16}
        config = DPOConfig(
            folder,
            precompute_ref_log_probs=True,
            max_length=settings.max_length,
            max_tokens_per_row=settings.max_tokens_per_row,
            model_init_kwargs=None if settings.dtype is None else {"dtype": settings.dtype},
            **given,
            use_cpu=settings.use_cpu,
            prove=False,
            report_to="none",
            save_strategy="no",
        )
        trainer = DPOTrainer(name, None, config, train_dataset=data)
    rows = []
    for row in trainer.train_dataset:
        group = group_from_row(row)
        keys = [response_key(group.prompt_ids, response, group.images) for response in group.response_ids]
        rows.append({"row": row["row"], "keys": keys, "logps": row[REFERENCE_COLUMN], "edges": group.edges})
    return rows, trainer.reference_identity
