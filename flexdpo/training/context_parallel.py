"""A step whose rows several processes run together, each some of the tokens: for rows longer than one card holds."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flexdpo.errors import FlexdpoError, UnsupportedModelError, found
from flexdpo.hf.unwrap import base_model
from flexdpo.layout.row import tile_multiple
from flexdpo.layout.sequences import is_count
from flexdpo.layout.shards import shard_of
from flexdpo.training.distribution import reshard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from torch import Tensor, nn

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row
    from flexdpo.training.batch import PackedBatch

# where there are no tiles, so that short rows can be sharded evenly too
_UNIT = 16


@dataclass(frozen=True)
class ContextParallel:
    """The processes that run each row together: they are given the same groups, and each runs its shard of the tokens.

    What follows the log-probabilities is computed on each of them alike, so their gradients are parts of one sum.
    """

    group: dist.ProcessGroup
    # whether DDP or FSDP averages the gradients over these processes too, which makes a mean of what must be a sum
    averaged: bool

    @classmethod
    def of(
        cls, given: int | DeviceMesh, model: nn.Module, ref_model: nn.Module | None, accelerator: Accelerator | None
    ) -> ContextParallel:
        """Take a number of neighbouring processes, or the dimension of a mesh.

        Raises:
            FlexdpoError: if the processes cannot be parted so, or the model or its reference is spread over others.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise FlexdpoError(
                f"context_parallel={given!r} needs several processes; start them with torchrun or accelerate launch, "
                "or leave it out"
            )
        group, everyone = _group_of(given), dist.get_world_size()
        if dist.get_world_size(group) < everyone and accelerator is None:
            raise FlexdpoError(
                f"context_parallel={given!r} leaves {everyone // dist.get_world_size(group)} groups of processes that "
                "train on different examples, whose gradients somebody must average; give accelerator, or all "
                f"{everyone} processes one row (context_parallel={everyone})"
            )
        for module in (model, *(() if ref_model is None else (ref_model,))):
            # whatever ran before left the outermost weights whole
            reshard(module)
            _require_reached(module, group)
        stateful = base_model(model)._flexdpo_mixing.stateful
        if stateful:
            raise UnsupportedModelError(
                f"{stateful} layers of {type(model).__name__} carry a state from token to token, which is not handed "
                "from process to process; leave context_parallel out"
            )
        sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return cls(group, sharded or isinstance(model, DistributedDataParallel))

    @property
    def size(self) -> int:
        """Processes that run a row together."""
        return dist.get_world_size(self.group)

    def sharded(self, batch: PackedBatch, groups: Sequence[Group], device: torch.device) -> PackedBatch:
        """The batch, on the host, with this process's shard of every row."""
        self._require_same(groups, device)
        idle = None if batch.idle_row is None else self._shard(batch.idle_row, device)
        return dataclasses.replace(batch, rows=[self._shard(row, device) for row in batch.rows], idle_row=idle)

    def _shard(self, row: Row, device: torch.device) -> Row:
        unit = max(tile_multiple(device), _UNIT)
        return shard_of(row, dist.get_rank(self.group), self.size, unit, self.group)

    def _require_same(self, groups: Sequence[Group], device: torch.device) -> None:
        """Stop where processes that run a row together were given different rows."""
        digest = 0
        for group in groups:
            for ids in (group.prompt_ids, *group.response_ids):
                digest = zlib.crc32(ids.tobytes(), zlib.crc32(str(ids.size).encode(), digest))
            digest = zlib.crc32(repr(group.edges).encode(), digest)
        mine = torch.tensor([digest], device=device)
        everyone = mine.new_empty(self.size)
        dist.all_gather_into_tensor(everyone, mine, group=self.group)
        if bool((everyone != digest).any()):
            other = dist.get_global_rank(self.group, int((everyone != digest).nonzero()[0]))
            raise FlexdpoError(
                f"processes {dist.get_rank()} and {other} run their rows together (context_parallel={self.size}) but "
                "were given different groups; give every process of such a group the same, for instance with a "
                "sampler over num_processes // context_parallel"
            )

    def backward(self, given: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """A backward pass after which the mean over all processes is that over the groups of processes."""
        return (lambda loss: given(loss * self.size)) if self.averaged else given

    def add_up(self, model: nn.Module) -> None:
        """Add the gradients of the processes up, where nothing else brings them together."""
        if self.averaged:
            return
        pending: list[Any] = [
            dist.all_reduce(parameter.grad, group=self.group, async_op=True)
            for parameter in model.parameters()
            if parameter.grad is not None
        ]
        for each in pending:
            each.wait()


def _group_of(given: int | DeviceMesh) -> dist.ProcessGroup:
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise FlexdpoError(
                f"context_parallel must be one dimension of a mesh, got {given.ndim} ({given.mesh_dim_names}); take "
                'it out of the mesh, as in mesh["cp"]'
            )
        group: dist.ProcessGroup = given.get_group()
        return group
    if not is_count(given):
        raise FlexdpoError(
            f"context_parallel must be a number of processes or a dimension of a mesh, got {found(given)}"
        )
    everyone = dist.get_world_size()
    if everyone % given:
        raise FlexdpoError(
            f"context_parallel={given} does not divide the {everyone} processes; use a divisor of {everyone}, or start "
            f"a multiple of {given}"
        )
    mine: dist.ProcessGroup | None = None
    for first in range(0, everyone, given):
        # all processes must take part in making every group
        group = dist.new_group(list(range(first, first + given)))
        if first <= dist.get_rank() < first + given:
            mine = group
    assert mine is not None
    return mine


def _require_reached(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Stop at weights that are spread over some of the processes that run a row together and not over others."""
    together = set(dist.get_process_group_ranks(group))
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            over = set(parameter.device_mesh.mesh.flatten().tolist())
            if not together <= over:
                raise FlexdpoError(
                    f"{name} of {type(module).__name__} is sharded over the processes {sorted(over)}, but "
                    f"{sorted(together)} run a row together (context_parallel); shard it over all of them"
                )
