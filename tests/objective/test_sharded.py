"""Log-probabilities of models whose weights are spread over processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flexdpo import Row, prepare_model, response_logps
from flexdpo.objective import linear_logps
from tests.conftest import build_model, odd_groups
from tests.processes import spawn_processes


def a_row() -> Row:
    return Row.from_groups(odd_groups(np.random.default_rng(5)))


def run(model: Any) -> torch.Tensor:
    row = a_row()
    sums = response_logps(model, row).sums
    (sums * torch.linspace(-1, 1, row.num_responses, dtype=torch.float64)).sum().backward()
    return sums.detach()


def join(rank: int, file: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)


def sharded(rank: int, file: str, name: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    join(rank, file)
    plain, model = (prepare_model(build_model(name, "flexdpo")) for _ in range(2))
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    for layer in layers:
        fully_shard(layer)
    if name != "gpt2":
        # GPT-2's head is tied to its embedding, so both belong to the root
        fully_shard(model.lm_head)
    fully_shard(model)
    want = run(plain)
    counts = []
    for elements in (2**24, 1):
        linear_logps._CHUNK_ELEMENTS["cpu"] = elements
        model.zero_grad()
        # the first call also measures what follows the head
        response_logps(model, a_row())
        with CommDebugMode() as communication:
            torch.testing.assert_close(run(model), want)
        counts.append({str(kind): count for kind, count in communication.get_comm_counts().items()})
    # the second time every target was a chunk of its own
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 0
    for (label, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), wanted.grad, rtol=1e-6, atol=1e-8, msg=label)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fsdp_gathers_the_head_once_per_pass(name: str, tmp_path: Path) -> None:
    spawn_processes(sharded, str(tmp_path / "rendezvous"), name, count=2)


def replicated(rank: int, file: str) -> None:
    join(rank, file)
    plain = prepare_model(build_model("llama", "flexdpo"))
    model = torch.nn.parallel.DistributedDataParallel(prepare_model(build_model("llama", "flexdpo")))
    torch.testing.assert_close(run(model), run(plain))
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


@pytest.mark.distributed
def test_ddp(tmp_path: Path) -> None:
    spawn_processes(replicated, str(tmp_path / "rendezvous"), count=2)
