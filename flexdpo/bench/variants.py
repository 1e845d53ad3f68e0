"""The ways of running a batch of pairs that the benchmark compares, all on the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from flexdpo.attention.row_mask import Impl
from flexdpo.estimate.costs import Work, padded_work, row_work
from flexdpo.hf.prepare import prepare_model
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import best_fit_decreasing
from flexdpo.layout.row import Row
from flexdpo.layout.trie import Trie
from flexdpo.objective.linear_logps import linear_logps
from flexdpo.objective.logps import response_logps

_BETA = 0.1


class Variant:
    """One way of running batches of pairs, in two phases: the reference's forward pass, then the policy's step.

    Policy and reference are one set of weights here, which changes no time.

    Attributes:
        name: What the tables call it.
        head_passes: How often the policy's logits are multiplied out in a step, forward and backward.
        slow: Whether it is so far behind that it sits most rounds out.
    """

    name: str
    head_passes = 4
    slow = False

    def __init__(self, model: PreTrainedModel, batches: Sequence[Sequence[Group]]) -> None:
        self.model = model
        self.batches = batches

    def enter(self) -> None:
        """Bring the model into the state that this variant needs; not timed."""
        raise NotImplementedError

    def parts(self, batch: int) -> Sequence[Any]:
        """What runs at a time, one part after the other."""
        raise NotImplementedError

    def logps(self, part: Any) -> Tensor:
        """Log-probabilities of a part's responses, ``[2, pairs]``: chosen, rejected."""
        raise NotImplementedError

    def work(self, batch: int) -> Work:
        """What a batch asks of the model."""
        raise NotImplementedError

    def reference(self, batch: int) -> Tensor:
        """``[2, pairs]`` of a whole batch, without gradients, in the order of its parts."""
        with torch.no_grad():
            return torch.cat([self.logps(part) for part in self.parts(batch)], dim=1)

    def policy(self, batch: int, reference: Tensor) -> Tensor:
        """The batch's mean DPO loss (arXiv:2305.18290, Eq. 7), with gradients left in the model."""
        total, first, pairs = torch.zeros((), device=reference.device), 0, reference.shape[1]
        # a part goes backward before the next one runs
        for part in self.parts(batch):
            logps = self.logps(part)
            chosen, rejected = (logps - reference[:, first : first + logps.shape[1]]).unbind(0)
            loss = -F.logsigmoid(_BETA * (chosen - rejected)).sum() / pairs
            loss.backward()
            total += loss.detach()
            first += logps.shape[1]
        return total


class Padded(Variant):
    """Chosen and rejected concatenated and padded to the longest, stock SDPA attention, logits at every position."""

    name = "padded"
    head_passes = 3
    slow = True

    def __init__(self, model: PreTrainedModel, batches: Sequence[Sequence[Group]], device: torch.device) -> None:
        super().__init__(model, batches)
        self.inputs = [_padded(batch, device) for batch in batches]
        self.pairs_at_once = max(len(batch) for batch in batches)

    def enter(self) -> None:
        """Give the model its stock attention back."""
        self.model.set_attn_implementation("sdpa")

    def parts(self, batch: int) -> list[list[Tensor]]:
        """Token ids, attention mask and the places of responses, ``[2 x pairs, longest]`` each."""
        pieces = zip(*(x.split(self.pairs_at_once, dim=1) for x in self.inputs[batch]), strict=True)
        return [[x.flatten(0, 1) for x in piece] for piece in pieces]

    def logps(self, part: list[Tensor]) -> Tensor:
        """By the logits of every position."""
        ids, mask, is_response = part
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        # one sequence at a time, so that no second copy of the full logits is made
        tokens = torch.stack([_label_logps(one, labels) for one, labels in zip(logits, ids[:, 1:], strict=True)])
        return (tokens * is_response[:, 1:]).sum(dim=1).view(2, -1)

    def reference(self, batch: int) -> Tensor:
        """In as many parts as memory needs."""
        return self._fitting(super().reference, batch)

    def policy(self, batch: int, reference: Tensor) -> Tensor:
        """In as many parts as memory needs."""
        return self._fitting(super().policy, batch, reference)

    def work(self, batch: int) -> Work:
        """By the padded shape."""
        return padded_work(self.batches[batch])

    def _fitting(self, run: Callable[..., Tensor], *args: Any) -> Tensor:
        """Halve the pairs that run at once until they fit into memory, as a user would."""
        while True:
            try:
                return run(*args)
            except torch.OutOfMemoryError:
                if self.pairs_at_once == 1:
                    raise
            self.pairs_at_once //= 2
            self.model.zero_grad(set_to_none=True)


class PaddedLabels(Padded):
    """The same padded batch, with logits at the positions that predict a response's token and nowhere else.

    TRL does so on GPUs since 1.16. The head is the one that packed rows have here, so that the layouts are compared.
    """

    name = "padded_labels"
    head_passes = 4

    def logps(self, part: list[Tensor]) -> Tensor:
        """By the logits at labels."""
        ids, mask, is_response = part
        backbone = self.model.base_model
        states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = is_response[:, 1:]
        head: Any = self.model.get_output_embeddings()
        tokens = linear_logps(states[wanted], head.weight, None, ids[:, 1:][wanted]).logps
        return tokens.new_zeros(wanted.shape).masked_scatter(wanted, tokens).sum(dim=1).view(2, -1)

    def work(self, batch: int) -> Work:
        """By the padded shape, with logits at the responses only."""
        return padded_work(self.batches[batch], labels_only=True)


def _label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.dtype in (torch.bfloat16, torch.float16):
        return logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0].to(torch.float32)
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(dim=-1)


def _padded(groups: Sequence[Group], device: torch.device) -> list[Tensor]:
    """Token ids, attention mask and the places of responses, ``[2, pairs, longest]``, chosen before rejected."""
    sequences = [torch.from_numpy(group.sequences[side]) for side in (0, 1) for group in groups]
    ids = pad_sequence(sequences, True)
    places = torch.arange(ids.shape[1])
    is_token = places < torch.tensor([len(sequence) for sequence in sequences])[:, None]
    behind_prompt = places >= torch.tensor([group.prompt_ids.size for group in groups]).repeat(2)[:, None]
    both_sides = (ids, is_token.long(), is_token & behind_prompt)
    return [rearrange(x, "(side pair) token -> side pair token", side=2).to(device) for x in both_sides]


class Packed(Variant):
    """Packed rows through our own kernels, log-probabilities at the targets only; prompts shared or not.

    Args:
        shared: Whether a prompt exists once for its two responses or once for each.
        max_tokens_per_row: Longest row; both responses of a pair always stand in the same one.
        pad_to_multiple_of: Rows are padded to a multiple of this.
        impl: The attention kernel; ``"varlen"`` gives the variant its name.
    """

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
        super().__init__(model, batches)
        self.name = impl if impl == "varlen" else "shared" if shared else "packed"
        self.impl = impl
        prepare_model(model, impl=impl)
        self.rows = [
            [row.to(device) for row in pack_pairs(batch, shared, max_tokens_per_row, pad_to_multiple_of)]
            for batch in batches
        ]

    def enter(self) -> None:
        """Give the model our attention."""
        prepare_model(self.model, impl=self.impl)

    def parts(self, batch: int) -> list[Any]:
        """The rows."""
        return self.rows[batch]

    def policy(self, batch: int, reference: Tensor) -> Tensor:
        """With the masks that the reference's pass made."""
        loss = super().policy(batch, reference)
        # once per step, as a training run makes them
        self.rows[batch] = [dataclasses.replace(row, layout=row.layout.without_masks()) for row in self.rows[batch]]
        return loss

    def logps(self, part: Any) -> Tensor:
        """``[2, pairs]`` of one row, in which chosen and rejected of a pair stand side by side."""
        return rearrange(response_logps(self.model, part).sums, "(pair side) -> side pair", side=2)

    def work(self, batch: int) -> Work:
        """By the rows, padding not counted."""
        return sum(map(row_work, self.rows[batch]), Work())


def pack_pairs(
    pairs: Sequence[Group], shared: bool, max_tokens_per_row: int | None, pad_to_multiple_of: int
) -> list[Row]:
    """Pack pairs so that both responses of a pair stand side by side in one row, their prompt shared or repeated."""
    tries = [Trie.from_sequences(pair.sequences, share=shared) for pair in pairs]
    lengths, bins = list(map(len, tries)), [list(range(len(pairs)))]
    if max_tokens_per_row is not None:
        bins = best_fit_decreasing(lengths, max(max_tokens_per_row, *lengths))
    rows = [([pairs[i] for i in members], [tries[i] for i in members]) for members in bins]
    return [Row.from_tries(*row, pad_to_multiple_of=pad_to_multiple_of) for row in rows]
