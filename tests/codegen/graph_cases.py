"""How often attention and decoder layers are compiled on a card, and into how many graphs; nothing is launched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from flexdpo import Group, Row, prepare_model, response_logps
from flexdpo.attention import flex
from flexdpo.attention.inputs import AttentionInputs
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.attention.row_mask import row_mask_for
from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from flexdpo.hf.compilation import compile_decoder_layers
from tests.codegen.as_if_cuda import Recording
from tests.codegen.model_cases import CONFIGS, build


def row_of(length: int) -> Row:
    group = Group.from_lists([1] * 200, [[2] * 120, [3] * 40])
    return Row.from_groups([group], pad_to_multiple_of=length)


def lengths_of_one_kernel(heads: tuple[int, int], lengths: Sequence[int], batch_size: int, _: Recording) -> int:
    """How often one dynamic kernel is compiled while rows change in length."""
    _start()
    with kernel_settings_as(KernelSettings(lengths="dynamic")):
        for length in lengths:
            layout = row_of(length).layout
            row_mask = row_mask_for(type(layout).stack([layout] * batch_size), CAUSAL, "flex")
            query, key, value = (
                torch.zeros(batch_size, length, count, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
                for count in (heads[0], heads[1], heads[1])
            )
            flex.run_flex(AttentionInputs(query, key, value), row_mask).sum().backward()
    return graphs()


def layers_of(name: str, dynamic: bool, lengths: Sequence[int], recording: Recording) -> dict[str, Any]:
    """Graphs of four decoder layers, forward and backward, over rows of several lengths."""
    _start()
    before = len(recording.wrappers)
    model = build(name, 4).bfloat16()
    prepare_model(model, impl="flex")
    compile_decoder_layers(model, dynamic=dynamic)
    for length in lengths:
        response_logps(model, row_of(length)).sums.sum().backward()
    return {
        "graphs": graphs(),
        "graph breaks": dict(counters["graph_break"]),
        "attention outside of layers": len(flex._kernels),
        "launches of attention": [
            sum(".run(" in line and "tem_fused" in line for line in wrapper.splitlines())
            for wrapper in recording.wrappers[before:]
        ],
    }


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _start() -> None:
    torch._dynamo.reset()
    flex._kernels.clear()
    counters.clear()


# (query heads, key heads), lengths, rows: numbers of tiles, heads and rows that fall together at the first length
EQUAL = {
    "as many tiles as query heads": ((8, 2), (1024, 1152, 1280), 1),
    "as many tiles as key heads": ((8, 4), (512, 640, 768), 1),
    "as many tiles as rows": ((8, 4), (384, 512, 640), 3),
    "nothing equal": ((8, 2), (640, 768, 1152), 1),
}
CASES = {
    **{name: partial(lengths_of_one_kernel, *case) for name, case in EQUAL.items()},
    **{f"{name} layers": partial(layers_of, name, False, (384,)) for name in CONFIGS},
    "llama layers of all lengths": partial(layers_of, "llama", True, (384, 512, 640)),
    "llama layers with as many tiles as heads": partial(layers_of, "llama", True, (256, 384, 512)),
}
