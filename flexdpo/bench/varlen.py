"""The strong baseline on a GPU: packed rows without sharing, through torch's own variable-length FlashAttention."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from flexdpo.attention.torch_varlen import torch_varlen
from flexdpo.bench.variants import Packed
from flexdpo.errors import FlexdpoError
from flexdpo.objective.lm_head import head_logps, head_plan
from flexdpo.objective.logps import sum_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row

ATTN_IMPLEMENTATION = "flexdpo_varlen"
# (query [S, Hq, D], key [S, Hkv, D], value [S, Hkv, D], documents, scaling) -> [S, Hq, D]
VarlenKernel = Any


class Documents(NamedTuple):
    """Where the documents of a row lie.

    Attributes:
        boundaries: Where each begins, and the end of the last, ``[N + 1]`` int32.
        longest: Tokens of the longest.
    """

    boundaries: Tensor
    longest: int

    @classmethod
    def of(cls, row: Row) -> Documents:
        """The documents of a row; its padding counts as one more."""
        starts = [start for start, _ in row.documents]
        ends = [stop for _, stop in row.documents]
        length = row.input_ids.shape[1]
        boundaries = [*starts, ends[-1], *([length] if length > ends[-1] else [])]
        longest = max(stop - start for start, stop in pairwise(boundaries))
        return cls(torch.tensor(boundaries, dtype=torch.int32, device=row.input_ids.device), longest)


@dataclass(eq=False)
class _Held:
    documents: Documents | None = None
    kernel: VarlenKernel = None


_held = _Held()


def within_documents(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None) -> Tensor:
    """Causal attention within each document by ``torch.nn.attention.varlen.varlen_attn``."""
    bounds, longest = documents
    # the same tensor twice, so that torch takes cuDNN where that is the faster one
    return torch_varlen(query, key, value, bounds, bounds, longest, longest, scaling=scaling)


class Varlen(Packed):
    """Packed and unshared, as :class:`Packed`, with another attention.

    Args:
        max_tokens_per_row: Longest row.
        kernel: Attention within documents.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Sequence[Group]],
        device: torch.device,
        *,
        max_tokens_per_row: int | None = None,
        kernel: VarlenKernel = within_documents,
    ) -> None:
        super().__init__(model, batches, device, shared=False, max_tokens_per_row=max_tokens_per_row)
        # the head is measured by a run of the model, which this arm's attention could not do without documents
        self.plan = head_plan(model)
        if self.plan.obstacle is not None:
            raise FlexdpoError(f"this baseline needs the model's head itself, but {self.plan.obstacle}")
        AttentionInterface.register(ATTN_IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(ATTN_IMPLEMENTATION, _no_mask)
        self.kernel = kernel
        # known before the step, as the row's layout is
        self.documents = {id(row.input_ids): Documents.of(row) for rows in self.rows for row in rows}

    def enter(self) -> None:
        """Give the model the baseline's attention."""
        self.model.set_attn_implementation(ATTN_IMPLEMENTATION)

    def _logps(self, row: Row) -> Tensor:
        inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False}
        with _holding(self.documents[id(row.input_ids)], self.kernel):
            values = head_logps(self.model, inputs, row.predictors, row.labels, self.plan)
        return sum_targets(values.logps, row).sums.view(-1, 2).t()


@contextmanager
def _holding(documents: Documents, kernel: Callable[..., Tensor]) -> Iterator[None]:
    # not let go at the end: a checkpoint runs layers again in the backward pass, before the next row's forward
    _held.documents, _held.kernel = documents, kernel
    yield


def _attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,  # noqa: ARG001
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if _held.documents is None:
        raise FlexdpoError(f"attn_implementation={ATTN_IMPLEMENTATION!r} is for the benchmark only")
    heads = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
    return _held.kernel(*heads, _held.documents, scaling)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None
