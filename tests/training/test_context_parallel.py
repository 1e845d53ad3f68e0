"""Processes that run each row together against one that runs it whole: the same ten steps."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from flexdpo import FlexdpoError, Group, keep_attention, make_train_step, prepare_model, response_logps
from flexdpo.attention import context_parallel
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.layout.packing import pack
from flexdpo.layout.row import Row
from flexdpo.layout.shards import shard_of
from flexdpo.training.context_parallel import ContextParallel
from tests.conftest import build_model, odd_groups, random_ids
from tests.hf.architectures import build_model as build_zoo_model
from tests.processes import free_port, spawn_processes

STEPS = 10


def groups_of(step: int) -> list[Group]:
    """Tries of very different sizes, so that shards hold prompts, branches and padding."""
    rng = np.random.default_rng(step)
    stem = random_ids(rng, 40)
    deep = [stem + random_ids(rng, 9 + step), stem + random_ids(rng, 20), random_ids(rng, 3)]
    return [*odd_groups(rng), Group.from_lists(random_ids(rng, 60), deep, [(0, 1), (0, 2)], name="deep")]


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_token_and_every_target_has_one_process(processes) -> None:
    (row,) = pack(groups_of(0))
    shards = [shard_of(row, number, processes, 16).shard for number in range(processes)]
    assert len({shard.layout.length for shard in shards}) == 1
    tokens = torch.cat([shard.tokens for shard in shards])
    assert sorted(tokens.tolist()) == list(range(len(tokens)))
    assert torch.equal(tokens[shards[0].layout.shard.order], torch.arange(len(tokens)))
    assert sorted(torch.cat([shard.targets for shard in shards]).tolist()) == list(range(len(row.labels)))
    for shard in shards:
        assert torch.equal(shard.tokens[shard.predictors], row.predictors[shard.targets])
        assert torch.equal(shard.labels, row.labels[shard.targets])
        at = 0
        for chunk in shard.layout.shard.chunks:
            # the chunk's tokens are the last of the keys that it sees, and those end where the row's do, or later on
            keys, length = chunk.keys, chunk.length
            own = shard.tokens[at : at + length]
            assert torch.equal(own, torch.arange(keys.length - length, keys.length))
            real = own < row.layout.length
            whole = row.layout.subtree_end[0, own[real]].clamp(max=keys.length)
            assert torch.equal(keys.subtree_end[0, own[real]], whole)
            at += length
        assert at == shard.layout.length


def test_attention_is_assigned_evenly() -> None:
    rng = np.random.default_rng(0)
    long = Group.from_lists(random_ids(rng, 3000), [random_ids(rng, 400) for _ in range(5)], [(0, 1)])
    row = Row.from_groups([long])
    loads = [
        int((mine.shard.layout.position_ids + 1).sum())
        for mine in (shard_of(row, number, 4, 16) for number in range(4))
    ]
    assert max(loads) <= 1.05 * sum(loads) / 4


# --- ten steps -------------------------------------------------------------------------------------------------------


def trained(model: Any, groups: Any, wrap: Any = None, **settings: Any) -> tuple[list[float], Any]:
    """Ten steps, and the loss of each."""
    wrap = wrap or (lambda module: module)
    reference = wrap(copy.deepcopy(model))
    model = wrap(model)
    accelerator = settings.get("accelerator")
    if accelerator is not None:
        prepare_model(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = make_train_step(model, optimizer, ref_model=reference, beta=0.3, **settings)
    return [float(step(groups(number)).loss) for number in range(STEPS)], model


def _fsdp2(model: Any, *, layer_by_layer: bool = True) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers if layer_by_layer else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {"alone": None, "fsdp2": _fsdp2, "root": lambda model: _fsdp2(model, layer_by_layer=False)}


def _join(rank: int, count: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count)


def _work(rank: int, count: int, port: int, name: str, way: str, settings: dict[str, Any], out: str) -> None:
    _join(rank, count, port)
    model = _built(name, settings.pop("checkpointing", None))
    if way == "ddp":
        from accelerate import Accelerator

        def half(step: int) -> list[Group]:
            # each two processes have groups of their own, of as many pairs, and run their rows together
            return groups_of(step)[rank // 2 :: 2]

        losses, model = trained(model, half, accelerator=Accelerator(cpu=True), context_parallel=2, **settings)
        model = model.module
    else:
        losses, model = trained(model, groups_of, WRAPS[way], context_parallel=count, **settings)
    weights = {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach()
        for name, each in model.named_parameters()
    }
    torch.save((losses, weights), f"{out}/{rank}.pt")
    dist.barrier()


def _built(name: str, checkpointing: bool | str | None) -> Any:
    model = build_model(name.removesuffix("+lora"))
    if name.endswith("+lora"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(model, config)
    if checkpointing == "attention":
        enable_checkpointing(model, context_fn=keep_attention)
    elif checkpointing is not None:
        enable_checkpointing(model, use_reentrant=checkpointing)
    return model


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "count", "way", "settings"),
    [
        ("gpt2", 2, "alone", {}),
        ("llama", 2, "alone", {"max_tokens_per_row": 200, "checkpointing": True}),
        ("mistral", 4, "alone", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}),
        ("qwen3", 2, "root", {"max_tokens_per_row": 200}),
        ("llama", 4, "fsdp2", {"checkpointing": False}),
        ("llama", 4, "ddp", {"max_tokens_per_row": 200}),
        ("llama+lora", 2, "alone", {}),
        ("llama", 2, "alone", {"checkpointing": "attention"}),
    ],
)
def test_ten_steps_are_those_of_one_process(tmp_path, name, count, way, settings) -> None:
    spawn_processes(_work, count, free_port(), name, way, dict(settings), str(tmp_path), count=count)
    checkpointing = settings.get("checkpointing")
    rest = {name: value for name, value in settings.items() if name != "checkpointing"}
    want, model = trained(_built(name, checkpointing), groups_of, **rest)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for rank, (losses, weights) in enumerate(found):
        # the loss that a process tells is that of its own groups
        halves = [losses, found[(rank + 2) % 4][0]] if way == "ddp" else [losses]
        np.testing.assert_allclose(np.mean(halves, axis=0), want, rtol=1e-8)
        for key, value in model.named_parameters():
            torch.testing.assert_close(weights[key], value.detach(), rtol=1e-6, atol=1e-8)


# --- what one process holds, faults, bad input -----------------------------------------------------------------------


def kept_bytes(model: Any, row: Row) -> int:
    """Bytes that the forward pass of a row keeps for its backward pass, weights not counted."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []  # so that no place in memory is counted for two
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        response_logps(model, row)
    return sum(kept.values())


def _gradients(model: Any, groups: list[Group], **settings: Any) -> torch.Tensor:
    """Of one step, as the change of the weights without clipping."""
    before = torch.cat([each.detach().flatten().clone() for each in model.parameters()])
    step = make_train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), max_grad_norm=None, **settings)
    step(groups)
    return torch.cat([each.detach().flatten() for each in model.parameters()]) - before


def _shard(row: Row, rank: int) -> Row:
    return shard_of(row, rank, 2, 16, dist.group.WORLD)


def _hold(rank: int, port: int) -> None:
    _join(rank, 2, port)
    model = prepare_model(build_model("llama"))
    rng = np.random.default_rng(0)
    (row,) = pack([Group.from_lists(random_ids(rng, 700), [random_ids(rng, 150), random_ids(rng, 120)])])
    assert kept_bytes(model, _shard(row, rank)) <= 0.55 * kept_bytes(model, row)

    groups = groups_of(0)
    want = _gradients(build_model("llama"), groups)
    torch.testing.assert_close(_gradients(build_model("llama"), groups, context_parallel=2), want, rtol=0, atol=1e-9)
    faults = {
        "gradients of the others' keys are dropped": (context_parallel, "_own_part", _only_own),
        "keys stand in the processes' order": (context_parallel, "gathered_heads", _as_they_come),
        "gradients are not added up": (ContextParallel, "add_up", lambda *_: None),
        "every process takes the whole gradient": (ContextParallel, "backward", lambda self, given: _doubled(given)),
    }
    for fault, (place, name, wrong) in faults.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(place, name, wrong)
            error = (_gradients(build_model("llama"), groups, context_parallel=2) - want).norm() / want.norm()
        assert error > 1e-3, fault
    _refuse(rank, groups)
    dist.barrier()


def _only_own(whole: torch.Tensor, shard: Any, tokens: int) -> torch.Tensor:
    return whole[:, :, shard.order // tokens == dist.get_rank()]


def _as_they_come(own: torch.Tensor, shard: Any) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts, dim=2)


def _doubled(given: Any) -> Any:
    return lambda loss: given(2 * loss)


def _refuse(rank: int, groups: list[Group]) -> None:
    model, stateful = build_model("llama"), build_zoo_model("lfm2")
    optimizer = torch.optim.SGD([*model.parameters(), *stateful.parameters()], lr=1.0)
    with pytest.raises(FlexdpoError, match="context_parallel=3 does not divide the 2 processes"):
        make_train_step(model, optimizer, context_parallel=3)
    with pytest.raises(FlexdpoError, match=r"leaves 2 groups of processes.*give accelerator"):
        make_train_step(model, optimizer, context_parallel=1)
    with pytest.raises(FlexdpoError, match="carry a state from token to token"):
        make_train_step(stateful, optimizer, context_parallel=2)
    with pytest.raises(FlexdpoError, match="were given different groups"):
        make_train_step(model, optimizer, context_parallel=2)(groups[rank:])
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    alone = fully_shard(build_model("llama"), mesh=mesh["shards"])
    with pytest.raises(FlexdpoError, match=r"sharded over the processes.*run a row together"):
        make_train_step(model, optimizer, ref_model=alone, context_parallel=2)
    with pytest.raises(FlexdpoError, match="must be one dimension of a mesh"):
        make_train_step(model, optimizer, context_parallel=mesh)


@pytest.mark.distributed
def test_shares_of_memory_faults_and_bad_input() -> None:
    spawn_processes(_hold, free_port(), count=2)


def test_one_process_alone_is_told() -> None:
    model = build_model("llama")
    with pytest.raises(FlexdpoError, match="needs several processes"):
        make_train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), context_parallel=2)
