"""The datasets of a run: tokenised, counted, refused where they could not be taken, and how their rows are laid out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from flexdpo.data.draft import LABELS_COLUMN
from flexdpo.data.images import is_processor, reader_of
from flexdpo.data.lengths import longest_sequence, require_batches, require_company, require_room, tokens_needed
from flexdpo.data.regroup import regroup_by_prompt
from flexdpo.data.report import DataReport
from flexdpo.data.stream import StreamedPreferences, is_stream
from flexdpo.data.tokenize import group_from_row, tokenize_preferences
from flexdpo.errors import FlexdpoError, quoted
from flexdpo.hf.unwrap import base_model
from flexdpo.layout.packing import MAX_WASTE, Buckets, choose_buckets, row_lengths
from flexdpo.objective.unpaired import with_unrelated_responses
from flexdpo.training import memory
from flexdpo.training.distribution import is_sharded, largest, shards_of
from flexdpo.training.model_loading import require_positions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from flexdpo.attention.settings import KernelSettings
    from flexdpo.config import DPOConfig
    from flexdpo.data.images import ImageReader
    from flexdpo.layout.groups import Group
    from flexdpo.objective.objective import Objective

logger = logging.get_logger(__name__)
# of a stream, before training
_PREVIEWED_EXAMPLES = 64
# each length compiles kernels of its own, for about half a minute on a GPU; unasked, a run takes no more than these
FEW_LENGTHS = 4
_SURPRISES = 8  # rows longer than every sampled one come in steps of an eighth of the longest
_SAMPLED_EXAMPLES = 2048
_SAMPLED_BATCHES = 256


@dataclass(frozen=True)
class RowPlan:
    """How rows are made: see :func:`flexdpo.pack`."""

    max_tokens_per_row: int | None
    pad_to_multiple_of: int
    sharing: str
    kernels: KernelSettings  # how FlexAttention is compiled for them
    buckets: Buckets | None = None
    in_pieces: bool = True  # whether what is longer than a row may run in pieces

    @property
    def kernels_of_any_length(self) -> KernelSettings:
        """For rows of other lengths than those of training batches."""
        return replace(self.kernels, lengths="dynamic")

    @property
    def collation(self) -> dict[str, Any]:
        """The layout's part of the arguments of :class:`~flexdpo.training.batch.PackingCollator`."""
        names = ("max_tokens_per_row", "pad_to_multiple_of", "sharing", "buckets", "in_pieces")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(
        cls, args: DPOConfig, model: nn.Module, *, reference: bool, longest: int, longest_sequence: int | None = None
    ) -> RowPlan:
        """The plan of a run before its data are known; ``max_tokens_per_row="auto"`` asks how much memory is free.

        ``model`` is the policy where it was loaded, ``reference`` whether a copy of it is kept, ``longest`` the
        distinct tokens of the longest example, 0 where nobody knows, and ``longest_sequence`` those of the longest
        sequence, where examples may run in pieces.
        """
        budget: Any = args.max_tokens_per_row
        if budget == "auto":
            setup = memory.TrainingSetup.from_arguments(args, model, reference=reference, **shards_of(args))
            # each process has a GPU of its own, but they share the machine's memory
            sharing_memory = 1 if args.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            here = next(model.parameters()).device.type == args.device.type
            resident = ("weights", "reference") if reference else ("weights",)
            budget = memory.auto_row_budget(
                model,
                setup,
                device=args.device,
                free=memory.free_memory(args.device) // sharing_memory,
                resident=resident if here else (),
                multiple=args.row_multiple,
                longest=longest,
                longest_sequence=longest_sequence,
            )
            # one plan for all: work that is split by rows must be the same rows everywhere
            budget = -largest(args.device, -budget)
            longer = f"; the longest example, {longest} tokens, runs in pieces" if longest > budget else ""
            logger.warning(f"max_tokens_per_row='auto': rows of up to {budget} tokens fit into the free memory{longer}")
        in_pieces = longest_sequence is not None
        return cls(budget, args.row_multiple, args.sharing, args.kernel_settings(), in_pieces=in_pieces)

    def with_buckets(
        self,
        dataset: Dataset | None,
        args: DPOConfig,
        *,
        unrelated_responses: bool = False,
        limits: Sequence[int] = (),
    ) -> RowPlan:
        """The plan with row lengths chosen from a sample of the data, where kernels are compiled by length."""
        if self.kernels.dynamic(args.device.type):
            return self
        one_kernel = replace(self, kernels=self.kernels_of_any_length)
        if dataset is None:
            return one_kernel
        # batches of random examples, the same ones in every process
        size = args.per_device_train_batch_size
        count = min(len(dataset), max(size, min(_SAMPLED_EXAMPLES, _SAMPLED_BATCHES * size)))
        order = np.sort(np.random.default_rng(args.seed).permutation(len(dataset))[:count])
        order = order[np.random.default_rng(args.seed).permutation(count)]
        groups = [group_from_row(row) for row in dataset.select(order)]
        batches: list[Sequence[Group]] = [groups[start : start + size] for start in range(0, count, size)]
        if unrelated_responses:
            several = [batch for batch in batches if len({group.prompt_key for group in batch}) > 1]
            batches = [with_unrelated_responses(batch) for batch in several] or batches
        multiple, budget = args.room_multiple, self.max_tokens_per_row
        lengths = row_lengths(batches, budget and budget // multiple * multiple, sharing=self.sharing, limits=limits)
        asked = self.kernels.lengths == "bucket"
        few = {} if asked else {"max_buckets": FEW_LENGTHS}
        buckets = choose_buckets(lengths, multiple=multiple, **few)
        if buckets.waste > MAX_WASTE:
            if not asked:
                return one_kernel
            logger.warning(
                f"attn_kernel_lengths='bucket': {len(buckets.lengths)} row lengths leave {buckets.waste:.1%} padding; "
                "'dynamic' compiles one kernel for all lengths, and a max_tokens_per_row makes rows more alike"
            )
        # a kernel with and one without gradients for each length and mask kind, and for surprises in the data
        most = max(self.kernels.max_kernels, 4 * (len(buckets.lengths) + _SURPRISES))
        return replace(self, buckets=buckets, kernels=replace(self.kernels, max_kernels=most))


def may_run_in_pieces(args: DPOConfig, model: nn.Module, *, router: bool) -> bool:
    """Whether an example that is longer than a row may run in pieces: see :class:`~flexdpo.layout.row.Piece`.

    Not where processes gather weights together, where a loss needs the routers' logits of all tokens at once, where
    layers hand on more than keys and values, and under a kernel that plans whole rows.
    """
    stateful = base_model(model)._flexdpo_mixing.stateful
    return not (is_sharded(args) or router or stateful or args.attn_impl == "varlen")


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
        if isinstance(dataset, dict) and name == "train":
            raise FlexdpoError(
                f"train_dataset is a {type(dataset).__name__} of {quoted(dataset)}; give one of them, such as "
                f"train_dataset=data[{next(iter(dataset), 'train')!r}]"
            )
        if isinstance(dataset, dict):
            return {key: self.tokenised(part, key) for key, part in dataset.items()}
        if dataset is None:
            return None
        if is_stream(dataset):
            if args.dataset_num_proc is not None:
                raise FlexdpoError(
                    f"dataset_num_proc={args.dataset_num_proc} has no effect on {name}, a stream that is tokenised as "
                    "it is read; set dataloader_num_workers, or leave it out"
                )
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
        require_batches(data, args, name)
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
            if self.images is not None:
                logger.warning(
                    "max_tokens_per_row='auto' counts the tokens of images and not what the part that encodes them "
                    "keeps where it is trained; give a number if rows of many images do not fit"
                )
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
