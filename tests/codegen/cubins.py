"""Attention kernels compiled for a card that is not there: registers, spills and shared memory, read from the cubin.

``python -m tests.codegen.cubins notebooks/results/compiled-kernels.json`` compiles every case for every card and writes
the committed table; CI compiles those of ``IN_CI`` and holds them against it.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flexdpo import Group, Row
from flexdpo.attention import flex
from flexdpo.attention.inputs import AttentionInputs
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import row_mask_for
from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from tests.codegen.as_if_cuda import Kernel, Recording

KIND = "compiled kernels"
_LENGTH = 1024
CARDS = ("A100", "H100", "B200")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a multiprocessor.

    Attributes:
        arch: The instruction set it was compiled for.
        tile: Query and key tokens of a tile; four of them where the backward pass takes different ones for dQ and
            dK, dV.
        warps: Of a block.
        registers: Of a thread; 255 at most.
        spilled_bytes: Of a thread, stored to memory for want of registers.
        shared_bytes: Of a block.
        shared_limit: What the card gives a block.
    """

    arch: str
    tile: tuple[int, ...]
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int


@dataclass(frozen=True)
class Case:
    """What a pair of kernels, forward and backward, is compiled for, in bfloat16."""

    head_dim: int = 128
    heads: tuple[int, int] = (8, 2)
    kind: MaskKind = CAUSAL
    softcap: float | None = None
    sinks: bool = False

    def __call__(self, recording: Recording) -> dict[str, Any]:
        torch._dynamo.reset()
        flex._kernels.clear()
        before = len(recording.kernels)
        with kernel_settings_as(KernelSettings(lengths="bucket")):
            self._attend()
        attention = [kernel for kernel in recording.kernels[before:] if "tem_" in kernel.name]
        backward = [kernel for kernel in attention if "backward" in kernel.name]
        forward = [kernel for kernel in attention if kernel not in backward]
        assert forward
        assert backward
        return {"forward": asdict(usage(forward[-1])), "backward": asdict(usage(backward[-1]))}

    def _attend(self) -> None:
        group = Group.from_lists(list(range(299)), [list(range(1000, 1150)), list(range(2000, 2100))])
        row_mask = row_mask_for(Row.from_groups([group], pad_to_multiple_of=_LENGTH).layout, self.kind, "flex")

        def tokens(heads: int) -> torch.Tensor:
            # as models hand them over: heads beside each other
            memory = torch.zeros(1, _LENGTH, heads, self.head_dim, dtype=torch.bfloat16)
            return memory.transpose(1, 2).requires_grad_()

        sinks = torch.zeros(self.heads[0], dtype=torch.bfloat16, requires_grad=True) if self.sinks else None
        query, key, value = tokens(self.heads[0]), tokens(self.heads[1]), tokens(self.heads[1])
        output = flex.run_flex(AttentionInputs(query, key, value, None, self.softcap, sinks), row_mask)
        output.backward(torch.zeros_like(output))


_SLIDING, _CHUNKED = MaskKind("sliding", 64), MaskKind("chunked", 64)
IN_CI: dict[str, Callable[[Recording], dict[str, Any]]] = {
    "head size 64": Case(64),
    "head size 128": Case(128),
    "head size 256": Case(256),
    "sliding": Case(kind=_SLIDING),
    "chunked": Case(kind=_CHUNKED),
}
CASES = IN_CI | {
    "softcap": Case(softcap=50.0),
    "sliding, sinks, head size 64": Case(64, (16, 2), _SLIDING, sinks=True),
}


def usage(kernel: Kernel) -> Usage:
    """Compile a kernel as inductor would at its first launch, and read what ptxas said while it made the cubin."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton import knobs

    # a cubin from triton's cache would come without a word
    knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = True, True
    with tempfile.TemporaryDirectory() as folder:
        # triton reads a kernel's source from its file
        path = Path(folder) / "kernel.py"
        path.write_text(kernel.source, encoding="utf-8")
        scope: dict[str, Any] = {"__name__": "kernel", "__file__": str(path)}
        exec(compile(kernel.source, str(path), "exec"), scope)
        tuner = next(value for value in scope.values() if isinstance(value, CachingAutotuner))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            compiled = tuner._precompile_config(tuner.configs[0]).kernel
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    log, arguments = said.getvalue(), tuner.inductor_meta.get("config_args", {})
    sides = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    return Usage(
        arch=re.findall(r"for '(sm_\w+)'", log)[0],
        tile=tuple(int(arguments[side]) for side in sides if side in arguments),
        warps=compiled.metadata.num_warps,
        registers=int(re.findall(r"Used (\d+) registers", log)[0]),
        spilled_bytes=int(re.findall(r"(\d+) bytes spill stores", log)[0]),
        shared_bytes=compiled.metadata.shared,
        shared_limit=torch.cuda.get_device_properties(0).shared_memory_per_block_optin,
    )


def table(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the result file says: the outcomes of all cases by card and by case, versions and date."""
    return {
        "kind": KIND,
        "versions": {"torch": torch.__version__, "triton": version("triton")},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "dtype": "bfloat16",
        "cards": results,
    }


def main() -> None:
    from tests.codegen.conftest import Suite, run_suite

    def compile_all(card: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            lines = run_suite(Suite("tests.codegen.cubins", False, card), list(CASES), Path(folder))
        for name, line in lines.items():
            if "error" in line:
                raise SystemExit(f"{card}, {name}:\n{line['error']}")
        return {name: line["result"] for name, line in lines.items()}

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(CARDS, pool.map(compile_all, CARDS), strict=True))
    Path(sys.argv[1]).write_text(json.dumps(table(results), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
