"""Log-probabilities of a row that several processes run together, brought together on each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from flexdpo.objective.linear_logps import TargetLogps

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.layout.row import RowShard


def gathered_targets(values: TargetLogps, shard: RowShard) -> TargetLogps:
    """Return the values of all targets of a row, ``[T]``, from those that each process computed."""
    squares = values.log_sum_squares
    return TargetLogps(
        _Gathered.apply(values.logps, shard), None if squares is None else _Gathered.apply(squares, shard)
    )


class _Gathered(torch.autograd.Function):
    """What follows is computed on every process alike, so each takes the gradient of its own targets."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shard: RowShard) -> Tensor:
        assert shard.layout.shard is not None
        ctx.targets = shard.targets
        everyone = own.new_zeros(shard.num_targets).index_copy_(0, shard.targets, own)
        # every target is predicted by one process, and the others add 0
        dist.all_reduce(everyone, group=shard.layout.shard.group)
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.targets], None
