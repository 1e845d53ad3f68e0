"""Reward models on shared rows: a score for every response, and the Bradley-Terry loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.objective.lm_head import anchored, base_model, replaced_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from flexdpo.layout.row import Row


class RewardLoss(NamedTuple):
    """A row's share of the batch loss, a scalar, and the detached rewards by their logged name, ``[E]`` each."""

    loss: Tensor
    metrics: dict[str, Tensor]


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margins: Tensor | None = None) -> Tensor:
    """Negative log-probability that the chosen response wins under the Bradley-Terry model.

    Args:
        chosen_rewards: ``[E]``.
        rejected_rewards: ``[E]``.
        margins: Lead that each chosen response must win by, ``[E]``.

    Returns:
        ``[E]``; ``ln 2`` where rewards agree and there are no margins.

    Source:
        Ouyang et al. 2022, arXiv:2203.02155, Eq. 1; margins: Touvron et al. 2023 (Llama 2), arXiv:2307.09288, Eq. 2.
    """
    lead = chosen_rewards - rejected_rewards
    return -F.logsigmoid(lead if margins is None else lead - margins)


def centre_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Square of the summed rewards of a pair, which keeps rewards around 0; ``[E]``.

    Source:
        Eisenstein et al. 2023, arXiv:2312.09244, Eq. 2.
    """
    return (chosen_rewards + rejected_rewards).square()


def response_rewards(model: nn.Module, row: Row) -> Tensor:
    """Run a packed row through a reward model and return the score at the last token of each response.

    Args:
        model: A prepared ``AutoModelForSequenceClassification`` with one label, wrapped or not; the call goes through
            its own forward.
        row: A packed row on the model's device.

    Returns:
        ``[R]``, float32 for half models; differentiable in the model's parameters.

    Raises:
        FlexdpoError: if the model has no score head, or more than one label.
    """
    head = getattr(base_model(model), "score", None)
    if not isinstance(head, torch.nn.Module):
        raise UnsupportedModelError(
            f"{type(base_model(model)).__name__} has no score head; load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
        )
    last = torch.tensor([int(path[-1]) for path in row.response_paths], device=row.input_ids.device)
    found: list[Tensor] = []

    def forward(original: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        output = original(hidden)
        found.append(output[0, last])
        return output

    with replaced_forward(head, forward):
        pooled = model(**row.inputs()).logits
    (scores,) = found
    if scores.shape[-1] != 1:
        raise FlexdpoError(
            f"a reward model gives one score, this one has num_labels={scores.shape[-1]}; load it with 1"
        )
    scores = anchored(scores[:, 0], pooled)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def reward_row_loss(
    rewards: Tensor, row: Row, total_pairs: int, *, margins: Tensor | None = None, centre_coefficient: float = 0.0
) -> RewardLoss:
    """Compute one row's share of the batch's mean Bradley-Terry loss; the shares of a batch's rows add up.

    Args:
        rewards: Score of each response of the row, ``[R]``.
        row: The row.
        total_pairs: Preferences in the whole batch.
        margins: See :func:`bradley_terry_loss`.
        centre_coefficient: Weight of :func:`centre_loss`.
    """
    chosen, rejected = rewards[row.edges[:, 0]], rewards[row.edges[:, 1]]
    losses = bradley_terry_loss(chosen, rejected, margins)
    if centre_coefficient:
        losses = losses + centre_coefficient * centre_loss(chosen, rejected)
    chosen, rejected = chosen.detach(), rejected.detach()
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
    }
    return RewardLoss(losses.sum() / total_pairs, metrics)
