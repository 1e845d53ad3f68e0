"""``torch.compile`` as if CPU tensors lay on a CUDA card: inductor's CUDA code, recorded and interpreted.

Dynamo and AOTAutograd trace CPU tensors, since autograd's engine would ask the CUDA runtime about fake CUDA tensors.
The graphs that they hand to inductor are moved to fake CUDA tensors and lowered as for the card. The wrapper that
inductor writes then runs on the CPU tensors: under ``TRITON_INTERPRET=1`` torch itself hands its kernels to Triton's
interpreter, otherwise they are recorded and launch nothing, so that results are whatever the memory holds.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flexdpo.attention import flex
from tests.codegen import fake_card, interpreter
from tests.codegen.fake_card import Card

_CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel as inductor wrote it: a Python module that defines it under its name."""

    name: str
    source: str


@dataclass
class Recording:
    """What inductor wrote since :func:`install`, in order.

    Attributes:
        kernels: Triton kernels.
        wrappers: One Python module for each graph, which allocates and launches.
    """

    kernels: list[Kernel] = field(default_factory=list)
    wrappers: list[str] = field(default_factory=list)


def install(card: Card = fake_card.H100) -> Recording:
    """Compile for ``card`` from now on, in this process; ``TRITON_INTERPRET`` is read before triton is imported."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    recording = Recording()
    fake_card.insert(card)
    if interpreted:
        interpreter.fill_gaps()
    _open_front_end()
    _lower_for_cuda()
    _record(recording, launch=interpreted)
    _allocate_on_cpu()
    return recording


# --- tracing and lowering --------------------------------------------------------------------------------------------


def _open_front_end() -> None:
    """FlexAttention and flexdpo refuse gradients on a CPU, and torch leaves out the log-sum-exp they need."""
    from torch.nn.attention import flex_attention as front_end

    options_of = front_end._apply_kernel_options

    def options_as_on_cuda(query, key, value, return_lse, kernel_options, return_aux=None):  # type: ignore[no-untyped-def]
        options = options_of(query, key, value, return_lse, kernel_options, return_aux)
        wanted = return_lse if return_aux is None else return_aux.lse
        options["OUTPUT_LOGSUMEXP"] = wanted or torch.is_grad_enabled()
        return options

    front_end._apply_kernel_options = options_as_on_cuda
    front_end._validate_device = lambda *_: None
    flex._require_cpu_forward = lambda *_: None
    flex._on_card = lambda _: True


def _lower_for_cuda() -> None:
    from torch._inductor import compile_fx as inductor
    from torch._inductor import config

    config.compile_threads = 1
    config.force_disable_caches = True
    config.use_static_triton_launcher = False
    compile_fx = inductor.compile_fx

    def compile_for_cuda(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("inner_compile", _lower_on_cuda)
        return compile_fx(*args, **kwargs)

    inductor.compile_fx = compile_for_cuda


def _lower_on_cuda(graph: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.compile_fx import compile_fx_inner

    mode = detect_fake_mode(example_inputs)
    assert mode is not None
    _move(graph, mode)
    inputs = [_on_cuda(x, mode) for x in example_inputs]
    for node, value in zip((n for n in graph.graph.nodes if n.op == "placeholder"), inputs, strict=True):
        node.meta["val"] = value
        node.meta.pop("tensor_meta", None)
    return compile_fx_inner(graph, inputs, **kwargs)


def _move(graph: torch.fx.GraphModule, mode: FakeTensorMode) -> None:
    """Move a graph and its subgraphs (``mask_mod``, ``score_mod``) to fake CUDA tensors."""
    for module in graph.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            constant = getattr(module, str(node.target), None) if node.op == "get_attr" else None
            if isinstance(constant, torch.Tensor):
                raise NotImplementedError(f"the graph holds the constant tensor {node.target}, which cannot be moved")
            node.args = torch.fx.node.map_aggregate(node.args, _cuda_for_cpu)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _cuda_for_cpu)
            if "val" in node.meta:
                node.meta["val"] = torch.utils._pytree.tree_map(lambda x: _on_cuda(x, mode), node.meta["val"])
        module.recompile()


def _cuda_for_cpu(argument: Any) -> Any:
    return _CUDA if isinstance(argument, torch.device) and argument.type == "cpu" else argument


def _on_cuda(value: Any, mode: FakeTensorMode) -> Any:
    if not (isinstance(value, FakeTensor) and value.device.type == "cpu"):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_CUDA)


# --- recording and running -------------------------------------------------------------------------------------------


class _NoLaunch:
    def run(self, *args: Any, **kwargs: Any) -> None:
        """Launch nothing."""


def _record(recording: Recording, *, launch: bool) -> None:
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime import triton_helpers

    load = AsyncCompile.triton

    def triton(self: AsyncCompile, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
        recording.kernels.append(Kernel(kernel_name, source_code))
        if not launch:
            return _NoLaunch()
        kernel = load(self, kernel_name, source_code, device_str)
        interpreter.widen_blocks(kernel)
        return kernel

    AsyncCompile.triton = triton
    GraphLowering.save_output_code = staticmethod(recording.wrappers.append)
    # every kernel's module asks for the driver of a real card
    triton_helpers.set_driver_to_gpu = lambda: None


def _allocate_on_cpu() -> None:
    guards: Any = torch._C._dynamo.guards
    guards._empty_strided_cuda = guards._empty_strided_cpu
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()
    torch.cuda.set_device = lambda index: None
