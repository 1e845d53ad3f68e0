"""Log-probabilities of responses, computed at the predicting positions only.

The vocabulary projection never sees a prompt token except the last one, which predicts the first token of every
response. A target that several responses share is computed once and counted for each of them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.utils import logging

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flexdpo.layout.row import Row

logger = logging.get_logger(__name__)


class ResponseLogps(NamedTuple):
    """Log-probabilities of the ``R`` responses of a row.

    Attributes:
        sums: Sum over the tokens of each response, in nats, ``[R]``; float64, so that adding many tokens adds no error.
        lengths: Tokens in each response, ``[R]`` int64.
        targets: Log-probability of each distinct target, in nats, ``[T]``, float32 or better.
    """

    sums: Tensor
    lengths: Tensor
    targets: Tensor


def response_logps(model: nn.Module, row: Row) -> ResponseLogps:
    """Run a packed row and return the log-probability of each of its responses.

    The prompt's last position is listed once for each response, since it predicts the first token of all of them.

    Args:
        model: A prepared causal LM, wrapped or not (PEFT, DDP, FSDP): the call goes through its own forward.
        row: A packed row on the model's device.

    Returns:
        Sums, lengths and per-target values; differentiable in the model's parameters.

    Raises:
        FlexdpoError: if the model was not prepared, or the row does not fit it.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    if _takes_logits_to_keep(model):
        logits = model(**row.inputs(), logits_to_keep=row.predictors).logits[0]
    else:
        logger.warning_once(
            f"{type(model).__name__} takes no logits_to_keep, so logits are computed for the whole row and those of "
            "prompts are thrown away; this costs memory and time, not exactness"
        )
        logits = model(**row.inputs()).logits[0, row.predictors]
    return sum_targets(target_logps(logits, row.labels), row)


def target_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of each label under its logits.

    Args:
        logits: ``[T, V]``, any float dtype.
        labels: ``[T]`` int64.

    Returns:
        ``[T]`` in nats, float32 for half inputs, else the dtype of ``logits``.
    """
    if logits.shape[0] != labels.shape[0]:
        raise FlexdpoError(f"got {logits.shape[0]} rows of logits for {labels.shape[0]} targets")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(dim=1)


def sum_targets(targets: Tensor, row: Row) -> ResponseLogps:
    """Sum per-target values into every response that contains the target.

    Args:
        targets: One value per target of the row, ``[T]``.
        row: The row the targets belong to.
    """
    # float64 wherever the device has it
    wide = torch.float32 if targets.device.type == "mps" else torch.float64
    members = targets.to(wide)[row.member_targets]
    sums = members.new_zeros(row.num_responses).index_add(0, row.member_responses, members)
    lengths = torch.bincount(row.member_responses, minlength=row.num_responses)
    return ResponseLogps(sums, lengths, targets)


def _takes_logits_to_keep(model: nn.Module) -> bool:
    inner: Any = model
    while not hasattr(inner, "config") and hasattr(inner, "module"):
        inner = inner.module
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters
