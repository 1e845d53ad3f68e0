"""Several processes that train together, each a Python program of its own, as torchrun would start them."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import IO, Any

import torch.multiprocessing as mp


def run_processes(words: Sequence[str], count: int, *, timeout_s: float = 300, **environment: str) -> list[str]:
    """Run Python with ``words`` once per rank, and return what each printed; fail with what all said if one fails.

    One process is run as an ordinary one. torchrun is not used: its agent looks the machine's name up, which not every
    machine can.
    """
    shared = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    if count > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with ExitStack() as files:
        # files, since a pipe that nobody empties stops its process
        printed, said = ([files.enter_context(TemporaryFile("w+")) for _ in range(count)] for _ in range(2))
        workers = []
        for rank in range(count):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            command = [sys.executable, *words]
            workers.append(subprocess.Popen(command, env=shared | mine, stdout=printed[rank], stderr=said[rank]))
        codes = _wait(workers, timeout_s)
        assert codes == [0] * count, "".join(
            f"\nrank {rank} ended with {code}:\n{_text(errors)[-4000:]}"
            for rank, (code, errors) in enumerate(zip(codes, said, strict=True))
        )
        return [_text(file) for file in printed]


def spawn_processes(worker: Callable[..., None], *args: Any, count: int, timeout_s: float = 300) -> None:
    """Call ``worker(rank, *args)`` in each of ``count`` new processes; fail with the first one's exception.

    Workers leave their process group to the end of the process: after ``destroy_process_group`` DDP's reducer is the
    last that holds it, and takes it down with Python's lock in hand, for which gloo's thread may wait: for ever.
    """
    workers = mp.start_processes(_leaving, args=(worker, args), nprocs=count, start_method="spawn", join=False)
    until = time.monotonic() + timeout_s
    while not workers.join(timeout=1):
        if time.monotonic() > until:
            for process in workers.processes:
                process.kill()
            raise AssertionError(f"processes still run after {timeout_s:g} s")


def _leaving(rank: int, worker: Callable[..., None], args: Sequence[Any]) -> None:
    worker(rank, *args)
    leave()


def leave() -> None:
    """End this process, with success, without taking Python down.

    Threads of torch.distributed that still drop a tensor while Python goes down abort the process ("terminate called
    without an active exception"), once in forty runs or so, after all its work.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def fully_sharded(trainer: type) -> type:
    """Trainers of this class whose models FSDP2 shards, on a CPU too, where accelerate falls back to DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class FullySharded(trainer):  # type: ignore[misc, valid-type]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            state = self.accelerator.state
            for shared in (state._shared_state, PartialState._shared_state):
                shared["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                cpu_ram_efficient_loading=False,
                state_dict_type="SHARDED_STATE_DICT",
            )
            if self.args.bf16:
                state.fsdp_plugin.set_mixed_precision("bf16")
            self.is_fsdp_enabled = True
            assert self.accelerator.is_fsdp2

    return FullySharded


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    # below the ports that systems hand out, so that no connection made in the meantime takes it
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def _wait(workers: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Exit codes of the processes; when one fails, or none ends, the others are stopped."""
    until = time.monotonic() + timeout_s
    while any(worker.poll() is None for worker in workers) and time.monotonic() < until:
        if any(worker.returncode for worker in workers):
            # the others usually notice, and say something about it
            until = min(until, time.monotonic() + 10)
        time.sleep(0.05)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    return [worker.wait() for worker in workers]


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
