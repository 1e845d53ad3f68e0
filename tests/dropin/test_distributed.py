"""Two processes with a padded batch each: their averaged gradients are those of both batches without sharing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import flexdpo
from tests.dropin.test_share import ALL, padded_batch, run
from tests.hf.architectures import build_model
from tests.hf.equivalence import Run, gradient_error, logit_error
from tests.hf.test_distributed import WORLD, _ddp, _fsdp2, _fsdp2_checkpointed, _Plain
from tests.processes import free_port, spawn_processes

pytestmark = pytest.mark.distributed


def _batch(rank: int) -> Any:
    # of different shapes, and the second rank has less to share: nothing makes ranks agree on what they run
    return padded_batch(seed=rank, repeat=rank == 0)


def _work(rank: int, name: str, wrap: Callable[[Any], Any], port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    model = build_model(name)
    flexdpo.share_prefixes(model, **ALL)
    wrapped = wrap(model)
    got = run(_Plain(wrapped), _batch(rank))
    assert flexdpo.sharing_stats(wrapped).batches_shared == 1
    gradients = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in got.gradients.items()}
    torch.save((got.logits, gradients), Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("wrap", [_ddp, _fsdp2, _fsdp2_checkpointed])
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_gradients_of_two_processes(name: str, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    spawn_processes(_work, name, wrap, free_port(), str(tmp_path), count=WORLD)
    model = build_model(name)
    singles = [run(model, _batch(rank)) for rank in range(WORLD)]
    mean = {n: sum(single.gradients[n] for single in singles) / WORLD for n in singles[0].gradients}
    for rank in range(WORLD):
        logits, gradients = torch.load(tmp_path / f"{rank}.pt")
        assert logit_error(Run(logits, {}), singles[rank]) < 1e-6
        assert gradient_error(Run(logits, gradients), Run([], mean)) < 1e-6
