"""How a run lays its rows out: how long they may be, what they are padded to, and what shares a trie."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from flexdpo.data.tokenize import group_from_row
from flexdpo.hf.unwrap import base_model
from flexdpo.layout.packing import Buckets, choose_buckets, row_lengths
from flexdpo.objective.unpaired import with_unrelated_responses
from flexdpo.training import memory
from flexdpo.training.distribution import is_sharded, largest, shards_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from torch import nn

    from flexdpo.attention.settings import KernelSettings
    from flexdpo.config import DPOConfig
    from flexdpo.layout.groups import Group

logger = logging.get_logger(__name__)
# padding as a share of all tokens run, above which one kernel for all lengths is the better bargain
MAX_WASTE = 0.03
# each length compiles kernels of its own, for about half a minute on a GPU; unasked, a run takes no more than these
FEW_LENGTHS = 4
# rows longer than every sampled one come in steps of an eighth of the longest
_SURPRISES = 8
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
            # one plan for all: work that is dealt out by rows must be the same rows everywhere
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
            batches = [with_unrelated_responses(batch) for batch in batches if len(batch) > 1] or batches
        multiple, budget = args.room_multiple, self.max_tokens_per_row
        lengths = row_lengths(batches, budget and budget // multiple * multiple, sharing=self.sharing, limits=limits)
        asked = self.kernels.lengths == "bucket"
        few = {} if asked else {"max_buckets": FEW_LENGTHS}
        buckets = choose_buckets(lengths, max_waste=MAX_WASTE, multiple=multiple, **few)
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
    """Whether an example that is longer than a row may run in pieces: see :class:`~flexdpo.layout.pieces.Piece`.

    Not where processes gather weights together, where a loss needs the routers' logits of all tokens at once, where
    layers hand on more than keys and values, and under a kernel that plans whole rows.
    """
    stateful = base_model(model)._flexdpo_mixing.stateful
    return not (is_sharded(args) or router or stateful or args.attn_impl == "varlen")
