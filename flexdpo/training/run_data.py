"""The datasets of a run: tokenised, counted, and refused where the model or the settings could not take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from flexdpo.data.draft import LABELS_COLUMN
from flexdpo.data.images import is_processor, reader_of
from flexdpo.data.lengths import longest_sequence, require_company, require_room, tokens_needed
from flexdpo.data.regroup import regroup_by_prompt
from flexdpo.data.report import DataReport
from flexdpo.data.stream import StreamedPreferences, is_stream
from flexdpo.data.tokenize import tokenize_preferences
from flexdpo.errors import FlexdpoError
from flexdpo.training.model_loading import require_positions
from flexdpo.training.row_plan import RowPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from flexdpo.config import DPOConfig
    from flexdpo.data.images import ImageReader
    from flexdpo.objective.objective import Objective

logger = logging.get_logger(__name__)

# of a stream, before training
_PREVIEWED_EXAMPLES = 64


@dataclass(eq=False)
class RunData:
    """Makes the datasets of a run out of what its user gave, and remembers what became of their rows."""

    args: DPOConfig
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    max_positions: int | None  # of the model's learned position table, if it has one
    unrelated_responses: bool  # the loss runs other examples' responses behind every prompt
    limits: tuple[int, ...] = ()  # as in :func:`flexdpo.pack`
    in_pieces: bool = False  # examples that are longer than a row run in pieces
    reports: dict[str, DataReport] = field(default_factory=dict)  # of each dataset that was tokenised as a whole
    images: ImageReader | None = field(init=False)  # reads the pictures of a row; ``None`` with a tokenizer alone

    def __post_init__(self) -> None:
        self.images = reader_of(self.tokenizer) if is_processor(self.tokenizer) else None
        self.in_pieces = self.in_pieces and self.images is None

    def tokenised(self, dataset: Any, name: str) -> Any:
        """Tokenise a dataset or a dict of them, or open a stream; refuse what model, rows or loss could not take."""
        args = self.args
        if isinstance(dataset, dict):
            return {key: self.tokenised(part, key) for key, part in dataset.items()}
        if dataset is None:
            return None
        if is_stream(dataset):
            stream = StreamedPreferences.for_run(
                dataset, self.tokenizer, args, name=name, max_positions=self.max_positions
            )
            _tell(stream.preview(_PREVIEWED_EXAMPLES))
            require_fit(args.objective(), stream.sample(1)[0], name)
            return stream
        if args.stream_shuffle_buffer and name == "train":
            raise FlexdpoError(
                f"stream_shuffle_buffer={args.stream_shuffle_buffer} has no effect: the training data are no stream; "
                "a dataset in memory is shuffled as a whole"
            )
        # one process fills the cache that the others read
        with args.main_process_first(desc=f"tokenising {name}"):
            data, report = tokenize_preferences(
                dataset,
                self.tokenizer,
                name=name,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                max_prompt_length=args.max_prompt_length,
                num_proc=args.dataset_num_proc,
            )
            if args.regroup_prompts:
                data = regroup_by_prompt(data)
        _tell(report)
        self.reports[name] = report
        require_fit(args.objective(), data[0], name)
        require_positions(self.max_positions, report.longest)
        if isinstance(args.max_tokens_per_row, int):
            self._require_room(data, args.max_tokens_per_row)
        if self.unrelated_responses:
            require_company(data, args, name)
        return data

    def row_plan(self, train_data: Any, eval_data: Any, model: nn.Module, *, reference: bool) -> RowPlan:
        """How the rows of these tokenised datasets are laid out, see :meth:`RowPlan.of`."""
        datasets = [train_data, *(eval_data.values() if isinstance(eval_data, dict) else [eval_data])]
        sized = [data for data in datasets if hasattr(data, "num_rows")]
        longest, sequence = 0, 0
        if self.args.max_tokens_per_row == "auto":
            counts = [tokens_needed(data, **self._counted) for data in sized]
            longest = max((int(count.max()) for count in counts), default=0)
            lengths = [longest_sequence(data, unrelated_responses=self.unrelated_responses) for data in sized]
            sequence = max(lengths, default=0)
        plan = RowPlan.of(
            self.args,
            model,
            reference=reference,
            longest=longest,
            longest_sequence=sequence if self.in_pieces else None,
        )
        if plan.max_tokens_per_row is not None and longest > plan.max_tokens_per_row:
            for data in sized:
                self._require_room(data, plan.max_tokens_per_row)
        return plan.with_buckets(sized[0] if sized else None, self.args, **self._counted)

    def _require_room(self, data: Dataset, budget: int) -> None:
        require_room(data, budget, self.args.room_multiple, in_pieces=self.in_pieces, **self._counted)

    @property
    def _counted(self) -> dict[str, Any]:
        """What a trie's size depends on beside its example."""
        return {"unrelated_responses": self.unrelated_responses, "limits": self.limits}


def require_fit(objective: Objective, example: Mapping[str, Any], name: str) -> None:
    """Refuse data of which no loss could learn, by their first example: a dataset has one layout.

    Raises:
        FlexdpoError: naming the losses and one that the data have what it needs for.
    """
    pairs, labels = len(example["edges"]), bool(example.get(LABELS_COLUMN))
    losses = ", ".join(objective.loss_type)
    if not pairs and (objective.needs_pairs or "plackett_luce" in objective.loss_type):
        has, take = ("a label for each response", "kto") if labels else ("single completions", "sft")
        raise FlexdpoError(
            f"{name}: loss_type {losses} compares responses, and the data have {has}; use --loss_type {take}"
        )
    if not pairs and not labels and objective.needs_labels:
        raise FlexdpoError(
            f"{name}: loss_type {losses} needs labels or preferences, and the data have single completions; use "
            "--loss_type sft"
        )


def _tell(report: DataReport) -> None:
    # what was left out is said at a level that transformers shows by default
    (logger.warning if report.skipped or report.notes else logger.info)(report.summary())
