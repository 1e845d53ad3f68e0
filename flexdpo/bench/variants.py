"""The ways of running a batch of pairs that the benchmark compares, all on the same weights.

Every variant has the same two phases: the reference model's forward pass without gradients, then the policy's forward
pass, the DPO loss and its backward pass. Policy and reference are one set of weights here, which changes no time.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from flexdpo.estimate.flops import Work, padded_work, row_work
from flexdpo.hf.prepare import prepare_model
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import best_fit_decreasing
from flexdpo.layout.row import Row
from flexdpo.objective.linear_logps import linear_logps
from flexdpo.objective.logps import response_logps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from flexdpo.attention.row_mask import Impl

_BETA = 0.1


class Variant(Protocol):
    """One way of running batches.

    Attributes:
        name: What the tables call it.
        head_passes: How often the policy's logits are multiplied out in a step, forward and backward.
    """

    name: str
    head_passes: int

    def enter(self) -> None:
        """Bring the model into the state that this variant needs; not timed."""

    def reference(self, batch: int) -> Tensor:
        """Log-probabilities of batch number ``batch`` under the reference, without gradients: chosen, rejected."""

    def policy(self, batch: int, reference: Tensor) -> Tensor:
        """Loss of a batch, with gradients left in the model."""

    def work(self, batch: int) -> Work:
        """What a batch asks of the model."""


def dpo_loss(logps: Tensor, reference: Tensor) -> Tensor:
    """The mean DPO loss of ``[2, pairs]`` log-probabilities, chosen before rejected (arXiv:2305.18290, Eq. 7)."""
    chosen, rejected = (logps - reference).unbind(0)
    return -F.logsigmoid(_BETA * (chosen - rejected)).mean()


# --- padded, with full logits ----------------------------------------------------------------------------------------


class Padded:
    """Chosen and rejected concatenated and padded to the longest, stock SDPA attention, logits at every position."""

    name = "padded"
    head_passes = 3

    def __init__(self, model: PreTrainedModel, batches: Sequence[Sequence[Group]], device: torch.device) -> None:
        self.model = model
        self.batches = batches
        self.inputs = [_padded(batch, device) for batch in batches]
        # halved until a batch fits into memory, as a user would
        self.pairs_at_once = max(len(batch) for batch in batches)

    def enter(self) -> None:
        """Give the model its stock attention back."""
        self.model.set_attn_implementation("sdpa")

    def reference(self, batch: int) -> Tensor:
        """``[2, pairs]`` without gradients."""
        with torch.no_grad():
            return self._fitting(lambda: torch.cat([self._logps(part) for part in self._parts(batch)], dim=1))

    def policy(self, batch: int, reference: Tensor) -> Tensor:
        """Loss, with gradients left in the model."""

        def run() -> Tensor:
            return _backward(map(self._logps, self._parts(batch)), reference)

        return self._fitting(run)

    def work(self, batch: int) -> Work:
        """By the padded shape."""
        return padded_work(self.batches[batch])

    def _parts(self, batch: int) -> list[dict[str, Tensor]]:
        whole = self.inputs[batch]
        pairs = whole["input_ids"].shape[1]
        slices = [slice(i, i + self.pairs_at_once) for i in range(0, pairs, self.pairs_at_once)]
        return [{name: tensor[:, part] for name, tensor in whole.items()} for part in slices]

    def _fitting(self, run: Callable[[], Tensor]) -> Tensor:
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                if self.pairs_at_once == 1:
                    raise
            self.pairs_at_once //= 2
            self.model.zero_grad(set_to_none=True)

    def _logps(self, part: dict[str, Tensor]) -> Tensor:
        ids, mask, is_response = (
            part[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "completion_mask")
        )
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = ids[:, 1:]
        # one sequence at a time, so that no second copy of the full logits is made
        tokens = torch.stack([_label_logps(one, label) for one, label in zip(logits, labels, strict=True)])
        return (tokens * is_response[:, 1:]).sum(dim=1).view(2, -1)


class PaddedLabels(Padded):
    """The same padded batch, with logits at the positions that predict a response's token and nowhere else.

    TRL does so on GPUs since 1.16. The head is the one that packed rows have here, so that the layouts are compared.
    """

    name = "padded_labels"
    head_passes = 4

    def work(self, batch: int) -> Work:
        """By the padded shape, with logits at the responses only."""
        targets = sum(ids.size for group in self.batches[batch] for ids in group.response_ids)
        return dataclasses.replace(padded_work(self.batches[batch]), targets=targets)

    def _logps(self, part: dict[str, Tensor]) -> Tensor:
        ids, mask, is_response = (
            part[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "completion_mask")
        )
        backbone = self.model.base_model
        states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = is_response[:, 1:] == 1
        head: Any = self.model.get_output_embeddings()
        tokens = linear_logps(states[wanted], head.weight, None, ids[:, 1:][wanted]).logps
        return tokens.new_zeros(wanted.shape).masked_scatter(wanted, tokens).sum(dim=1).view(2, -1)


def _label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.dtype in (torch.bfloat16, torch.float16):
        return logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0].to(torch.float32)
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(dim=-1)


def _padded(groups: Sequence[Group], device: torch.device) -> dict[str, Tensor]:
    """Right-padded tensors ``[2, pairs, longest]``, chosen before rejected."""
    longest = max(len(ids) for group in groups for ids in group.sequences)
    shape = (2, len(groups), longest)
    names = ("input_ids", "attention_mask", "completion_mask")
    tensors = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
    for number, group in enumerate(groups):
        for side, ids in enumerate(group.sequences):
            tensors["input_ids"][side, number, : len(ids)] = torch.from_numpy(ids)
            tensors["attention_mask"][side, number, : len(ids)] = 1
            tensors["completion_mask"][side, number, group.prompt_ids.size : len(ids)] = 1
    return {name: tensor.to(device) for name, tensor in tensors.items()}


# --- packed ----------------------------------------------------------------------------------------------------------


class Packed:
    """Packed rows through our own kernels, log-probabilities at the targets only; prompts shared or not.

    Args:
        shared: Whether a prompt exists once for its two responses or once for each.
        max_tokens_per_row: Longest row; both responses of a pair always stand in the same one.
        pad_to_multiple_of: Rows are padded to a multiple of this.
        impl: The attention kernel; ``"varlen"`` gives the variant its name.
    """

    head_passes = 4

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Sequence[Group]],
        device: torch.device,
        *,
        shared: bool,
        max_tokens_per_row: int | None = None,
        pad_to_multiple_of: int = 1,
        impl: Impl = "auto",
    ) -> None:
        self.name: str = impl if impl == "varlen" else "shared" if shared else "packed"
        self.model = model
        self.impl = impl
        prepare_model(model, impl=impl)
        self.rows = [
            [row.to(device) for row in pack_pairs(batch, shared, max_tokens_per_row, pad_to_multiple_of)]
            for batch in batches
        ]
        self._fresh: list[Row] = []

    def enter(self) -> None:
        """Give the model our attention."""
        prepare_model(self.model, impl=self.impl)

    def reference(self, batch: int) -> Tensor:
        """``[2, pairs]`` without gradients, in the order of the rows."""
        # masks are made once per step, here, and shared with the policy's pass
        self._fresh = [_without_masks(row) for row in self.rows[batch]]
        with torch.no_grad():
            return torch.cat([self._logps(row) for row in self._fresh], dim=1)

    def policy(self, batch: int, reference: Tensor) -> Tensor:
        """Loss, with gradients left in the model."""
        rows = self._fresh or [_without_masks(row) for row in self.rows[batch]]
        self._fresh = []
        return _backward(map(self._logps, rows), reference)

    def work(self, batch: int) -> Work:
        """By the rows, padding not counted."""
        return sum((row_work(row) for row in self.rows[batch]), Work(0, 0, 0))

    def _logps(self, row: Row) -> Tensor:
        # chosen and rejected of a pair stand side by side
        return response_logps(self.model, row).sums.view(-1, 2).t()


def pack_pairs(
    pairs: Sequence[Group], shared: bool, max_tokens_per_row: int | None, pad_to_multiple_of: int
) -> list[Row]:
    """Pack pairs so that both responses of a pair stand side by side in one row, their prompt shared or repeated."""
    lengths = [
        group.unshared_tokens if not shared else group.prompt_ids.size + sum(ids.size for ids in group.response_ids)
        for group in pairs
    ]
    bins = [list(range(len(pairs)))]
    if max_tokens_per_row is not None:
        bins = best_fit_decreasing(lengths, max(max_tokens_per_row, *lengths))
    rows = []
    for members in bins:
        groups = [part for i in members for part in ([pairs[i]] if shared else _apart(pairs[i]))]
        rows.append(Row.from_groups(groups, pad_to_multiple_of=pad_to_multiple_of))
    return rows


def _apart(pair: Group) -> list[Group]:
    return [Group(pair.prompt_ids, (ids,), (), pair.name) for ids in pair.response_ids]


def _without_masks(row: Row) -> Row:
    return dataclasses.replace(row, layout=row.layout.without_masks())


def _backward(parts: Iterable[Tensor], reference: Tensor) -> Tensor:
    """Loss of pairs that run in parts, ``[2, pairs]`` each; a part goes backward before the next one runs."""
    total, first, pairs = torch.zeros((), device=reference.device), 0, reference.shape[1]
    for logps in parts:
        count = logps.shape[1]
        loss = dpo_loss(logps, reference[:, first : first + count]) * (count / pairs)
        loss.backward()
        total += loss.detach()
        first += count
    return total
