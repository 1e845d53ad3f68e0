"""The ordinary training run, independent of the package: pair by pair, stock attention, everything written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

LOGGED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of the two responses that follow it."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def sequences(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Prompt and response, the chosen one first."""
        return [(self.prompt, self.chosen), (self.prompt, self.rejected)]


# chosen and rejected log-probability of a pair
Reference = Callable[[Pair], list[Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How the ordinary run trains.

    Attributes:
        learning_rate: Highest learning rate of AdamW (betas 0.9 and 0.999, epsilon 1e-8).
        weight_decay: Of matrices; vectors (norms and biases) have none.
        beta: Of the DPO loss.
        max_grad_norm: Clip the gradient to this norm.
        schedule: Factor on the learning rate by optimizer step, from 0.
    """

    learning_rate: float
    weight_decay: float = 0.01
    beta: float = 0.1
    max_grad_norm: float = 1.0
    schedule: Callable[[int], float] = lambda step: 1.0


def linear_with_warmup(warmup: int, total: int) -> Callable[[int], float]:
    """Up from 0 in ``warmup`` steps, then down to 0 at ``total``."""
    return lambda step: step / warmup if step < warmup else (total - step) / (total - warmup)


# --- which pairs a step sees ------------------------------------------------------------------------------------------


class _Listener(torch.nn.Module):
    """A model that only writes down which dataset rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.heard: list[list[int]] = []

    def forward(self, row: Tensor) -> dict[str, Tensor]:
        self.heard.append(row.tolist())
        return {"loss": self.weight}


class _StepEnds(TrainerCallback):
    def __init__(self, listener: _Listener) -> None:
        self.listener = listener
        self.steps: list[list[list[int]]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(self.listener.heard)
        self.listener.heard = []


def sampled_steps(rows: int, folder: Any, **settings: Any) -> list[list[list[int]]]:
    """The dataset rows that transformers' own ``Trainer`` gives a model: by optimizer step, then by micro-batch."""
    listener = _Listener()
    ends = _StepEnds(listener)
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_strategy="no", **settings,
    )  # fmt: skip
    data = Dataset.from_dict({"row": range(rows)})
    Trainer(listener, args, train_dataset=data, callbacks=[ends]).train()
    return ends.steps


# --- the run ----------------------------------------------------------------------------------------------------------


def padded_logps(model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Log-probability of every response behind its own copy of the prompt; one right-padded batch, full logits."""
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    present = torch.zeros_like(ids)
    for i, (prompt, response) in enumerate(sequences):
        ids[i, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        present[i, : len(prompt) + len(response)] = 1
    logits = model(input_ids=ids, attention_mask=present, use_cache=False).logits
    logps = []
    for of_sequence, (prompt, response) in zip(logits, sequences, strict=True):
        # the token before predicts each of the response's
        predicting = of_sequence[len(prompt) - 1 : len(prompt) + len(response) - 1].log_softmax(-1)
        logps.append(predicting[range(len(response)), list(response)].sum())
    return logps


def frozen_reference(model: Any) -> Reference:
    """A copy of the model as it is now, run once for each pair."""
    reference = copy.deepcopy(model).requires_grad_(False)

    @cache
    def logps(pair: Pair) -> list[Tensor]:
        with torch.no_grad():
            return padded_logps(reference, pair.sequences)

    return logps


@dataclass(frozen=True)
class Judged:
    """The loss and the rewards of a pair, scalars."""

    loss: Tensor
    chosen: Tensor
    rejected: Tensor

    @classmethod
    def of(cls, model: Any, reference: Reference, pair: Pair, beta: float) -> Judged:
        own = padded_logps(model, pair.sequences)
        chosen, rejected = (beta * (logp - base) for logp, base in zip(own, reference(pair), strict=True))
        return cls(-F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())


def judge(model: Any, reference: Reference, pairs: Sequence[Pair], beta: float) -> dict[str, float]:
    """Means over pairs, without gradients."""
    with torch.no_grad():
        return _means([Judged.of(model, reference, pair, beta) for pair in pairs])


def _means(judged: Sequence[Judged]) -> dict[str, float]:
    chosen, rejected = torch.stack([j.chosen for j in judged]), torch.stack([j.rejected for j in judged])
    return {
        "loss": torch.stack([j.loss.detach() for j in judged]).mean().item(),
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).mean().item(),
    }


class _AdamW:
    """Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2."""

    def __init__(self, parameters: Iterable[Tensor], weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.count = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        self.count += 1
        corrections = 1 - 0.9**self.count, 1 - 0.999**self.count
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            if p.ndim > 1:
                p.mul_(1 - learning_rate * self.weight_decay)
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.sub_(learning_rate * (m / corrections[0]) / ((v / corrections[1]).sqrt() + 1e-8))


def run_unpacked(
    model: Any,
    reference: Reference,
    steps: Sequence[Sequence[Sequence[Pair]]],
    recipe: Recipe,
    after_step: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place and return what a trainer logs of every optimizer step.

    The loss of a step is the mean over its micro-batches of the mean over their pairs.

    Args:
        model: With stock attention.
        reference: See :func:`frozen_reference`.
        steps: Pairs by optimizer step and micro-batch.
        recipe: How to train.
        after_step: Called with the number of optimizer steps done.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _AdamW(parameters, recipe.weight_decay)
    lines = []
    for number, micro_batches in enumerate(steps):
        totals = [torch.zeros_like(p) for p in parameters]
        judged, loss = [], 0.0
        for pairs in micro_batches:
            for pair in pairs:
                judged.append(Judged.of(model, reference, pair, recipe.beta))
                share = judged[-1].loss / len(pairs) / len(micro_batches)
                torch._foreach_add_(totals, torch.autograd.grad(share, parameters))
                loss += share.item()
        # torch's own: summed in float32, it is off by a few 1e-5 of a float32 gradient's true norm
        norm = torch.nn.utils.get_total_norm(totals).item()
        clip = min(1.0, recipe.max_grad_norm / (norm + 1e-6))
        optimizer.step([g * clip for g in totals], recipe.learning_rate * recipe.schedule(number))
        lines.append({**_means(judged), "loss": loss, "grad_norm": norm})
        if after_step is not None:
            after_step(number + 1)
    return lines


# --- the comparison ---------------------------------------------------------------------------------------------------


def largest_gaps(got: Sequence[dict[str, float]], want: Sequence[dict[str, float]]) -> dict[str, float]:
    """Largest difference of each logged figure over all steps, relative where the figure is above 1."""
    assert len(got) == len(want)
    names = [name for name in LOGGED if name in want[0]]
    return {
        name: max(abs(a[name] - b[name]) / max(1.0, abs(b[name])) for a, b in zip(got, want, strict=True))
        for name in names
    }


def assert_same_trajectory(got: Sequence[dict[str, float]], want: Sequence[dict[str, float]], tolerance: float) -> None:
    """Compare every figure of every step."""
    # not "gap > tolerance", which a NaN would pass
    wrong = {name: gap for name, gap in largest_gaps(got, want).items() if not gap <= tolerance}
    assert not wrong, f"beyond {tolerance}: {wrong}"
