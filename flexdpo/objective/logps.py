"""Log-probabilities of responses, computed at the predicting positions only.

The vocabulary projection never sees a prompt token except the last one, which predicts the first token of every
response. A target that several responses share is computed once and counted for each of them.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from flexdpo.errors import FlexdpoError, found
from flexdpo.hf.unwrap import base_model
from flexdpo.layout.groups import numbered
from flexdpo.layout.row import Row
from flexdpo.objective.gathered import gathered_targets
from flexdpo.objective.linear_logps import TargetLogps, logits_logps
from flexdpo.objective.lm_head import head_logps, head_plan, logits_of
from flexdpo.objective.piecewise import piecewise_logps, require_attention_only

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.get_logger(__name__)


class ResponseLogps(NamedTuple):
    """Log-probabilities of the ``R`` responses of a row."""

    # sum over the tokens of each response, in nats, ``[R]``; float64, so that adding many tokens adds no error
    sums: Tensor
    lengths: Tensor  # tokens in each response, ``[R]`` int64
    targets: Tensor  # log-probability of each distinct target, in nats, ``[T]``, float32 or better
    # ``log(sum over words of p^2)`` at each target, ``[T]``, without gradient; ``None`` where it was not asked for
    log_sum_squares: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """Mean log-probability per token of each response, in nats, ``[R]``."""
        return self.sums / self.lengths


def response_logps(model: nn.Module, row: Row, *, with_log_sum_squares: bool = False) -> ResponseLogps:
    """Run a packed row and return the log-probability of each of its responses.

    The prompt's last position is listed once for each response, since it predicts the first token of all of them. The
    logits of a chunk of targets exist at a time, in the backward pass too. A model whose head cannot be used directly
    computes the logits of all targets at once; a warning says so, and why.

    ``model`` is a prepared causal LM, wrapped or not (PEFT, DDP, FSDP), and runs through its own forward; ``row`` is on
    its device, and one with ``pieces`` runs piece by piece. WPO's weights need ``with_log_sum_squares``. The result is
    differentiable (once). Raises ``FlexdpoError`` if the model was not prepared, or the row does not fit it.
    """
    if not isinstance(row, Row):
        raise FlexdpoError(
            f"response_logps takes one flexdpo.Row, as pack(groups) and Row.from_groups make them, got {found(row)}"
        )
    run = partial(_target_logps, model, with_log_sum_squares=with_log_sum_squares)
    if row.pieces:
        require_attention_only(model)
        values = piecewise_logps(run, row)
    elif row.shard is not None:
        values = gathered_targets(run(row.shard), row.shard)
    else:
        values = run(row)
    return sum_targets(values.logps, row, values.log_sum_squares)


def _target_logps(model: nn.Module, row: Row, *, with_log_sum_squares: bool) -> TargetLogps:
    """Run a row in one pass, on this process alone."""
    if isinstance(model, DistributedDataParallel) and not torch.is_grad_enabled():
        # processes take part in DDP's broadcasts at their first pass with gradients, in an order of its own; passes
        # without are not as many in each process
        model = model.module
    inputs, plan = row.inputs(), head_plan(model, row.input_ids.device)
    if plan.obstacle is not None:
        return _from_logits(model, row, plan.obstacle, with_log_sum_squares)
    return head_logps(model, inputs, row.predictors, row.labels, plan, with_log_sum_squares=with_log_sum_squares)


def _from_logits(model: nn.Module, row: Row, obstacle: str, with_log_sum_squares: bool) -> TargetLogps:
    name = type(base_model(model)).__name__
    if "logits_to_keep" in inspect.signature(type(base_model(model)).forward).parameters:
        logger.warning_once(
            f"{name}: the logits of all targets are held at once, since {obstacle}; this costs memory, not exactness"
        )
        logits = logits_of(model, **row.inputs(), logits_to_keep=row.predictors)[0]
    else:
        logger.warning_once(
            f"{name}: logits are computed for the whole row and those of prompts are thrown away, since {obstacle} and "
            "it takes no logits_to_keep; this costs memory and time, not exactness"
        )
        logits = logits_of(model, **row.inputs())[0, row.predictors]
    return logits_logps(logits, row.labels, with_log_sum_squares=with_log_sum_squares)


def sum_targets(targets: Tensor, row: Row, log_sum_squares: Tensor | None = None) -> ResponseLogps:
    """Sum values of targets, ``[T]``, into every response that contains the target."""
    members = member_values(targets, row)
    sums = members.new_zeros(len(row.response_paths)).index_add(0, row.member_responses, members)
    # bincount would wait for the device, to learn the largest response
    ones = torch.ones_like(row.member_responses)
    lengths = ones.new_zeros(len(row.response_paths)).index_add(0, row.member_responses, ones)
    return ResponseLogps(sums, lengths, targets, log_sum_squares)


def member_values(targets: Tensor, row: Row) -> Tensor:
    """Per-target values for every token of every response, one response after the other, ``[M]`` float64."""
    # float64 wherever the device has it
    wide = torch.float32 if targets.device.type == "mps" else torch.float64
    return targets.to(wide)[row.member_targets]


def require_finite(sums: Tensor, row: Row, *, model: str = "the policy", where: str = "") -> None:
    """Refuse log-probabilities that are NaN or infinite, by example and response; waits for the device once."""
    finite = torch.isfinite(sums.detach())
    if bool(finite.all()):
        return
    first = int((~finite).nonzero()[0])
    group, k = next((group, first - start) for group, start in [*numbered(row.groups)][::-1] if start <= first)
    place = f"{where}, {group.name}" if where else group.name
    raise FlexdpoError(
        f"{place}: the log-probability of response {k} under {model} is {float(sums[first].detach())}; a lower "
        "learning rate, max_grad_norm or bf16 in place of fp16 keeps the weights finite, and a model that starts out "
        "like this is damaged"
    )


def pair_sums(logps: ResponseLogps, row: Row, ld_alpha: float | None = None) -> Tensor:
    """Return the log-probability of each preference's chosen and rejected response, ``[E, 2]`` in nats.

    ``ld_alpha`` weighs the tokens beyond the length of the pair's shorter response, so that length itself is learned
    less; ``None`` and 1 weigh all tokens alike, 0 looks at equal lengths only (LD-DPO, Liu et al. 2024,
    arXiv:2409.06411).
    """
    sums = logps.sums[row.edges]
    if ld_alpha is None:
        return sums
    # memberships stand response by response, so the beginning of a response is a difference of running sums
    running = torch.nn.functional.pad(member_values(logps.targets, row).cumsum(dim=0), (1, 0))
    first = (logps.lengths.cumsum(dim=0) - logps.lengths)[row.edges]
    shared = logps.lengths[row.edges].amin(dim=1, keepdim=True)
    return ld_alpha * sums + (1 - ld_alpha) * (running[first + shared] - running[first])


def response_weights(logps: ResponseLogps, row: Row) -> Tensor:
    """WPO's weight of each response, ``[R]`` without gradient: about 1 for those that the policy would sample.

    The geometric mean over tokens of ``p(token) / sum p^2``: Zhou et al. 2024, arXiv:2406.11827, Eq. 2, with sampled
    alignment.
    """
    if logps.log_sum_squares is None:
        raise FlexdpoError("use_weighting needs response_logps(..., with_log_sum_squares=True)")
    return sum_targets(logps.targets.detach() - logps.log_sum_squares, row).means.exp()
