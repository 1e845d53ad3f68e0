"""The ways of running a batch of pairs that the benchmark compares, all on the same weights."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flexdpo.attention.row_mask import Impl
from flexdpo.attention.torch_varlen import Sequences, torch_varlen
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.costs import Work, padded_work, row_work
from flexdpo.hf.checkpointing import checkpointing_name
from flexdpo.hf.prepare import prepare_model
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import best_fit_decreasing
from flexdpo.layout.row import Row
from flexdpo.layout.trie import Trie
from flexdpo.objective.linear_logps import linear_logps
from flexdpo.objective.lm_head import head_logps, head_plan
from flexdpo.objective.logps import response_logps, sum_targets

Batches = Sequence[Sequence[Group]]
_BETA = 0.1


class Variant:
    """One way of running batches of pairs, in two phases: the reference's forward pass, then the policy's step.

    Policy and reference are one set of weights here, which changes no time. ``work`` is what each batch asks for.
    """

    name: str  # what the tables call it
    head_passes = 4  # how often the policy's logits are multiplied out in a step, forward and backward
    slow = False  # so far behind that it sits most rounds out

    def __init__(self, model: PreTrainedModel, batches: Batches, work: Sequence[Work]) -> None:
        self.model, self.batches, self.work = model, batches, work

    def enter(self) -> None:
        """Bring the model into the state that this variant needs, by default with stock attention; not timed."""
        self.model.set_attn_implementation("sdpa")

    def parts(self, batch: int) -> Sequence[Any]:
        """What runs at a time, one part after the other."""
        raise NotImplementedError

    def logps(self, part: Any) -> Tensor:
        """Log-probabilities of a part's responses, ``[2, pairs]``: chosen, rejected."""
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
    labels_only = False
    slow = True

    def __init__(self, model: PreTrainedModel, batches: Batches, device: torch.device) -> None:
        super().__init__(model, batches, [padded_work(batch, labels_only=self.labels_only) for batch in batches])
        self.inputs = [_padded(batch, device) for batch in batches]
        self.pairs_at_once = max(map(len, batches))

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
    labels_only = True

    def logps(self, part: list[Tensor]) -> Tensor:
        """By the logits at labels."""
        ids, mask, is_response = part
        backbone = self.model.base_model
        states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = is_response[:, 1:]
        head: Any = self.model.get_output_embeddings()
        tokens = linear_logps(states[wanted], head.weight, None, ids[:, 1:][wanted]).logps
        return tokens.new_zeros(wanted.shape).masked_scatter(wanted, tokens).sum(dim=1).view(2, -1)


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

    The attention kernel ``impl="varlen"`` gives the variant its name; ``packing`` is as in :func:`pack_pairs`.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Batches, device: torch.device, *, shared: bool, impl: Impl = "auto",
        **packing: Any,
    ) -> None:  # fmt: skip
        self.name = impl if impl == "varlen" else "shared" if shared else "packed"
        self.impl = impl
        prepare_model(model, impl=impl)
        self.rows = [[row.to(device) for row in pack_pairs(batch, shared, **packing)] for batch in batches]
        super().__init__(model, batches, [sum(map(row_work, rows), Work()) for rows in self.rows])

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


def pack_pairs(
    pairs: Sequence[Group], shared: bool, max_tokens_per_row: int | None = None, pad_to_multiple_of: int = 1
) -> list[Row]:
    """Pack pairs so that both responses of a pair stand side by side in one row, their prompt shared or repeated."""
    tries = [Trie.from_sequences(pair.sequences, share=shared) for pair in pairs]
    lengths, bins = list(map(len, tries)), [list(range(len(pairs)))]
    if max_tokens_per_row is not None:
        bins = best_fit_decreasing(lengths, max(max_tokens_per_row, *lengths))
    rows = [([pairs[i] for i in members], [tries[i] for i in members]) for members in bins]
    return [Row.from_tries(*row, pad_to_multiple_of=pad_to_multiple_of) for row in rows]


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

    def __init__(self, model: PreTrainedModel, batches: Batches, device: torch.device, **packing: Any) -> None:
        super().__init__(model, batches, device, shared=False, **packing)
        # the head is measured by a run of the model, which this variant's attention could not do without documents
        self.plan = head_plan(model)
        if self.plan.obstacle is not None:
            raise FlexdpoError(f"this baseline needs the model's head itself, but {self.plan.obstacle}")
        AttentionInterface.register(ATTN_IMPLEMENTATION, _documents_attention)
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


def _documents_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float | None = None,
    documents: Documents | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if documents is None:
        raise FlexdpoError(f"attn_implementation={ATTN_IMPLEMENTATION!r} is for the benchmark only")
    return within_documents(query, key, value, documents, scaling), None


class Trl(Variant):
    """``trl.DPOTrainer.compute_loss`` and the backward pass, on copies of the model since TRL changes its forward.

    The reference's forward pass happens inside ``compute_loss``, so all of the time counts as the policy's.
    """

    name = "trl"
    head_passes = 3
    slow = True

    def __init__(
        self, model: PreTrainedModel, batches: Batches, device: torch.device, *, checkpointing: bool = False
    ) -> None:
        self.trainer = _trainer(model, device, checkpointing)
        # on a GPU TRL computes logits at the responses only, elsewhere at every position
        work = [padded_work(batch, labels_only=device.type == "cuda") for batch in batches]
        super().__init__(self.trainer.model, batches, work)
        collated = [self.trainer.data_collator(list(map(_example, batch))) for batch in batches]
        self.inputs = [{name: tensor.to(device) for name, tensor in each.items()} for each in collated]

    def enter(self) -> None:
        """Start from zero gradients."""
        self.model.zero_grad(set_to_none=True)
        self.model.train()

    def reference(self, batch: int) -> Tensor:
        """Nothing: TRL runs the reference inside its loss."""
        return torch.zeros(2, len(self.batches[batch]))

    def policy(self, batch: int, reference: Tensor) -> Tensor:  # noqa: ARG002
        """TRL's loss, with gradients left in its model."""
        loss: Tensor = self.trainer.compute_loss(self.model, dict(self.inputs[batch]))
        loss.backward()
        return loss.detach()


def _example(group: Group) -> dict[str, list[int]]:
    prompt, chosen, rejected = (ids.tolist() for ids in (group.prompt_ids, *group.response_ids))
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _trainer(model: PreTrainedModel, device: torch.device, checkpointing: bool) -> Any:
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise FlexdpoError("--baseline trl needs TRL; pip install 'flexdpo[trl]'") from error
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<a>": 0, "<b>": 1}, unk_token="<a>"))  # noqa: S106
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<b>", pad_token="<a>", unk_token="<a>")  # noqa: S106
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    policy.set_attn_implementation("sdpa")
    reference.set_attn_implementation("sdpa")
    config = DPOConfig(
        tempfile.mkdtemp(prefix="flexdpo-bench-"), max_length=None, use_cpu=device.type == "cpu", report_to=[],
        bf16=False, disable_tqdm=True, **{checkpointing_name(DPOConfig): checkpointing},
    )  # fmt: skip
    # the trainer wants some data to be made with; the batches come ready tokenised
    data = Dataset.from_list([{"prompt": "<a>", "chosen": "<a>", "rejected": "<b>"}])
    return DPOTrainer(policy, reference, config, train_dataset=data, processing_class=tokenizer)
