"""Two processes with a row each: their averaged gradients are those of the unpacked sequences of both rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flexdpo import prepare_model
from flexdpo.hf.checkpointing import enable_checkpointing
from tests.hf.architectures import build_model
from tests.hf.equivalence import Run, example_row, gradient_error, packed_run, unpacked_run
from tests.processes import free_port, spawn_processes

pytestmark = pytest.mark.distributed
WORLD = 2
# a convolution, Mamba 2 beside attention, and a mixer that is run whole; scans compute in float32
STATEFUL = {"lfm2": 1e-6, "falcon_h1": 1e-4, "zaya": 1e-6}


def _row(rank: int) -> Any:
    # rows of different lengths: nothing makes ranks agree on them
    return example_row(seed=rank, prompt=14 + 5 * rank)


def _ddp(model: Any) -> Any:
    # both take the first row's path through their experts or not at all
    return torch.nn.parallel.DistributedDataParallel(model)


def _fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for layer in model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp2_checkpointed(model: Any) -> Any:
    model.train()
    enable_checkpointing(model)
    return _fsdp2(model)


class _Plain(torch.nn.Module):
    """Names parameters as the bare model does."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, **inputs: Any) -> Any:
        return self.wrapped(**inputs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((name.removeprefix("module."), p) for name, p in self.wrapped.named_parameters(*args, **kwargs))


def _work(rank: int, name: str, wrap: Callable[[Any], Any], port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    model = wrap(prepare_model(build_model(name)))
    run = packed_run(_Plain(model), _row(rank))
    gradients = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in run.gradients.items()}
    torch.save((run.logits, gradients), Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("wrap", [_ddp, _fsdp2, _fsdp2_checkpointed])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", *STATEFUL])
def test_gradients_of_two_processes(name: str, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    tolerance = STATEFUL.get(name, 1e-6)
    spawn_processes(_work, name, wrap, free_port(), str(tmp_path), count=WORLD)
    model = build_model(name)
    singles = [unpacked_run(model, _row(rank)) for rank in range(WORLD)]
    mean = {n: sum(single.gradients[n] for single in singles) / WORLD for n in singles[0].gradients}
    for rank in range(WORLD):
        logits, gradients = torch.load(tmp_path / f"{rank}.pt")
        scale = max(float(each.abs().max()) for each in singles[rank].logits)
        for got, want in zip(logits, singles[rank].logits, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance * scale)
        assert gradient_error(Run(logits, gradients), Run([], mean)) < tolerance
