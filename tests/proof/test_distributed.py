"""The proof of a model whose weights are spread over processes: values alone, and nothing is left behind."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flexdpo import FlexdpoError, prove
from tests.hf.architectures import build_model
from tests.hf.equivalence import Run, example_groups, gradient_error, packed_run, unpacked_run
from tests.hf.test_distributed import WORLD, _fsdp2, _Plain, _row
from tests.processes import free_port, spawn_processes
from tests.proof.test_prove import _off_by_one

pytestmark = pytest.mark.distributed


def _work(rank: int, name: str, dtype: torch.dtype, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    model = _fsdp2(build_model(name, dtype=dtype))
    proof = prove(model, example_groups())
    assert proof.sequences == 5
    assert proof.value_error <= proof.value_budget
    assert proof.gradient_error != proof.gradient_error
    if dtype == torch.float64:
        _learns_as_before(model, name, rank)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _off_by_one(monkeypatch)
        with pytest.raises(FlexdpoError, match="packed log-probabilities are off by"):
            prove(model, example_groups())
    # nobody waits for a process that went on alone
    dist.barrier()


def _learns_as_before(model: Any, name: str, rank: int) -> None:
    """The first step's gradients, the outermost weights' included, are those of a model that was not asked."""
    run = packed_run(_Plain(model), _row(rank))
    got = {n: g.full_tensor() for n, g in run.gradients.items()}
    assert got.keys() == {n for n, _ in model.named_parameters()}
    singles = [unpacked_run(build_model(name), _row(each)) for each in range(WORLD)]
    want = {n: sum(single.gradients[n] for single in singles) / WORLD for n in singles[0].gradients}
    assert gradient_error(Run([], got), Run([], want)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sharded_weights_are_proved(dtype: torch.dtype) -> None:
    spawn_processes(_work, "llama", dtype, free_port(), count=WORLD)
