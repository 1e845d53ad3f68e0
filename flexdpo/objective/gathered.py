"""Log-probabilities of a row that several processes run together, brought together on each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from flexdpo.objective.linear_logps import TargetLogps

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.layout.shards import Share


def gathered_targets(values: TargetLogps, share: Share) -> TargetLogps:
    """Return the values of all targets of a row, ``[T]``, from those that each process computed."""
    squares = values.log_sum_squares
    return TargetLogps(
        _Gathered.apply(values.logps, share), None if squares is None else _Gathered.apply(squares, share)
    )


class _Gathered(torch.autograd.Function):
    """What follows is computed on every process alike, so each takes the gradient of its own targets."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, share: Share) -> Tensor:
        ctx.targets = share.targets
        everyone = own.new_zeros(share.num_targets).index_copy_(0, share.targets, own)
        # every target is predicted by one process, and the others add 0
        dist.all_reduce(everyone, group=share.group)
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.targets], None
