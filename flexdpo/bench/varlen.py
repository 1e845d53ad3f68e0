"""The strong baseline on a GPU: packed rows without sharing, through torch's own variable-length FlashAttention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flexdpo.attention.torch_varlen import Sequences, torch_varlen
from flexdpo.bench.variants import Packed
from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import Group
from flexdpo.layout.row import Row
from flexdpo.objective.lm_head import head_logps, head_plan
from flexdpo.objective.logps import sum_targets

ATTN_IMPLEMENTATION = "flexdpo_varlen"


class Documents(NamedTuple):
    """Where each document of a row begins, and the end of the last, ``[N + 1]`` int32; tokens of the longest."""

    boundaries: Tensor
    longest: int


def document_bounds(row: Row) -> Documents:
    """The documents of a row; its padding counts as one more."""
    length, end = row.layout.length, row.num_tokens
    roots = (row.position_ids[0, :end] == 0).nonzero()[:, 0].tolist()
    boundaries = [*roots, end] + [length] * (length > end)
    longest = max(stop - start for start, stop in pairwise(boundaries))
    return Documents(torch.tensor(boundaries, dtype=torch.int32, device=row.input_ids.device), longest)


def within_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None = None
) -> Tensor:
    """Causal attention within each document, ``[1, heads, S, head size]`` to ``[1, S, heads, head size]``."""
    bounds, longest = documents
    query, key, value = (rearrange(x, "1 head token size -> token head size").contiguous() for x in (query, key, value))
    # the same tensor twice, so that torch takes cuDNN where that is the faster one
    return torch_varlen(query, key, value, Sequences(bounds, bounds, longest, longest), scaling=scaling)[None]


class Varlen(Packed):
    """Packed and unshared, as :class:`Packed`, with another attention."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Sequence[Group]],
        device: torch.device,
        *,
        max_tokens_per_row: int | None = None,
    ) -> None:
        super().__init__(model, batches, device, shared=False, max_tokens_per_row=max_tokens_per_row)
        # the head is measured by a run of the model, which this arm's attention could not do without documents
        self.plan = head_plan(model)
        if self.plan.obstacle is not None:
            raise FlexdpoError(f"this baseline needs the model's head itself, but {self.plan.obstacle}")
        AttentionInterface.register(ATTN_IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(ATTN_IMPLEMENTATION, lambda *_, **__: None)
        # known before the step, as the row's layout is
        self.with_bounds = [[(row, document_bounds(row)) for row in rows] for rows in self.rows]

    def enter(self) -> None:
        """Give the model the baseline's attention."""
        self.model.set_attn_implementation(ATTN_IMPLEMENTATION)

    def parts(self, batch: int) -> list[Any]:
        """Rows and where their documents lie."""
        return self.with_bounds[batch]

    def logps(self, part: Any) -> Tensor:
        """``[2, pairs]`` of one row."""
        row, documents = part
        inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False}
        # an argument that models hand on to their attention, in a checkpoint's second run too
        inputs["documents"] = documents
        values = head_logps(self.model, inputs, row.predictors, row.labels, self.plan)
        return rearrange(sum_targets(values.logps, row).sums, "(pair side) -> side pair", side=2)


def _attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,  # noqa: ARG001
    scaling: float | None = None,
    *,
    documents: Documents | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if documents is None:
        raise FlexdpoError(f"attn_implementation={ATTN_IMPLEMENTATION!r} is for the benchmark only")
    return within_documents(query, key, value, documents, scaling), None
