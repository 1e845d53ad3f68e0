"""Compiled FlexAttention: one kernel for each thing that would otherwise compile it again.

torch compiles a function anew when its inputs change in kind, gives up after eight times, and then runs FlexAttention's
dense version without a word. Here every mask kind, gradient mode and length has a function of its own, so that none
gets near the limit, the whole graph is asked for, so that giving up raises, and the number of kernels is bounded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.fx.experimental import _config as shape_config
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from flexdpo.attention.inputs import AttentionCall, AttentionInputs, wants_gradients
from flexdpo.attention.row_mask import RowMask
from flexdpo.attention.score_mods import composed_score_mod, softcap_score_mod
from flexdpo.errors import FlexdpoError


class KernelKey(NamedTuple):
    """What a compiled kernel is for; whatever else differs (dtype, heads) compiles it again, up to torch's limit."""

    mask: str  # name of the mask kind, and whether images see themselves both ways
    grad: bool  # whether a backward follows
    length: int  # tokens of the row; 0 for every length
    scaling: float | None  # factor on the scores
    softcap: float | None  # bound of the scores
    sinks: bool  # whether the log-sum-exp is needed
    options: tuple[tuple[str, Any], ...]  # kernel options, sorted
    score_mod: object = None  # the code of the row mask's own; tensors that it captures are inputs of the kernel


_kernels: dict[KernelKey, Callable[..., Any]] = {}
# two threads that need the same kernel compile it once, and count together
_adding = threading.Lock()


def run_flex(inputs: AttentionInputs, row_mask: RowMask) -> Tensor:
    """Run FlexAttention; see :func:`flexdpo.attention.kernels.packed_attention`."""
    query, key, value, scaling, softcap, sinks = inputs
    if query.device.type == "cpu":
        _require_cpu_forward(inputs, row_mask)
    # a score_mod costs in every tile, so a model without softcap gets none
    score_mod = row_mask.score_mod
    if softcap is not None:
        bounded = softcap_score_mod(softcap)
        score_mod = bounded if score_mod is None else composed_score_mod(bounded, score_mod)
    kwargs: dict[str, Any] = {
        "block_mask": row_mask.block_mask,
        "scale": scaling,
        "score_mod": score_mod,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": dict(row_mask.settings.kernel_options) or None,
    }
    attend: Callable[..., Any] = flex_attention  # a compiled model compiles its attention along with the rest
    if not torch.compiler.is_compiling():
        call = AttentionCall.of(inputs)
        attend = _kernel_for(kernel_key_of(call, row_mask, query.device.type, grad=wants_gradients(inputs)), row_mask)
    if sinks is None:
        output: Tensor = attend(query, key, value, **kwargs)
        return output
    # softmax over the scores and one sink: the usual output, scaled by the share of the mass that is not the sink's
    output, aux = attend(query, key, value, return_aux=AuxRequest(lse=True), **kwargs)
    # its logarithm keeps the digits of the gradient where the share is near 1, as it is for a sink with little mass
    share = F.logsigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None]).exp()
    return (output * share[..., None]).to(query.dtype)


def kernel_key_of(call: AttentionCall, row_mask: RowMask, device_type: str, *, grad: bool) -> KernelKey:
    """Which compiled kernel a call belongs to."""
    settings, score_mod = row_mask.settings, row_mask.score_mod
    code: object = score_mod
    if isinstance(score_mod, FunctionType):
        # a factory called for every row makes a new function each time, and none of them needs a kernel of its own
        captured = (cell.cell_contents for cell in score_mod.__closure__ or ())
        code = (score_mod.__code__, *(held.__code__ for held in captured if isinstance(held, FunctionType)))
    # pieces of rows come in as many lengths as their paths do
    in_piece = row_mask.layout.keys is not None
    one_for_all = in_piece or row_mask.impl == "varlen" or settings.dynamic(device_type)
    return KernelKey(
        row_mask.kind.name + "_blocks" * row_mask.kind.blocks,
        grad,
        0 if one_for_all else row_mask.layout.length,
        call.scaling,
        call.softcap,
        call.sinks,
        tuple(sorted(settings.kernel_options.items())),
        code,
    )


def _kernel_for(kernel_key: KernelKey, row_mask: RowMask) -> Callable[..., Any]:
    with _adding:
        if kernel_key not in _kernels:
            most = row_mask.settings.max_kernels
            if len(_kernels) >= most:
                lengths = sorted({known.length for known in _kernels})
                raise FlexdpoError(
                    f"a row of {row_mask.layout.length} tokens needs FlexAttention kernel number {len(_kernels) + 1}, "
                    f"and max_kernels={most} (lengths so far: {lengths}); pad rows to fewer lengths, compile one "
                    "kernel for all of them with lengths='dynamic', or raise max_kernels"
                )
            _kernels[kernel_key] = _compile(kernel_key)
        return _kernels[kernel_key]


def _compile(kernel_key: KernelKey) -> Callable[..., Any]:
    def attend(*args: Any, **kwargs: Any) -> Any:
        return flex_attention(*args, **kwargs)

    # torch counts compilations by code object, so every kernel gets its own
    name = f"attend_{kernel_key.mask}_{'grad' if kernel_key.grad else 'no_grad'}_{kernel_key.length or 'dynamic'}"
    code = attend.__code__.replace(co_name=name)
    own = FunctionType(code, attend.__globals__, name, attend.__defaults__, attend.__closure__)
    # fullgraph: past its recompile limit FlexAttention would otherwise fall back to the dense version without a word
    compiled = torch.compile(own, fullgraph=True, dynamic=kernel_key.length == 0)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            # torch's kernels for CPUs index with one size in place of another where equal ones are told apart
            with sizes_told_apart() if _on_card(args[0]) else contextlib.nullcontext():
                return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise FlexdpoError(
                f"FlexAttention for {name} was compiled {torch._dynamo.config.recompile_limit} times in this process, "
                "for that many dtypes, head counts or mask functions; run fewer kinds of models in one process, or "
                "raise torch._dynamo.config.recompile_limit"
            ) from error

    return run


# a function, so that kernels for cards can be generated without one
def _on_card(query: Tensor) -> bool:
    return query.device.type != "cpu"


def sizes_told_apart() -> AbstractContextManager[Any]:
    """Let what compiles inside take no two sizes for one: 8 tiles and 8 heads at the first call are not at the next."""
    config: Any = shape_config
    apart: AbstractContextManager[Any] = config.patch(use_duck_shape=False)
    return apart


def _require_cpu_forward(inputs: AttentionInputs, row_mask: RowMask) -> None:
    """FlexAttention on a CPU is a forward for float32 and below; say what is missing before torch does."""
    way_out = "use impl='sdpa' (or 'auto') there"
    if row_mask.settings.backend != "AUTO":
        raise FlexdpoError(f"kernel_options BACKEND={row_mask.settings.backend!r} needs CUDA; leave it out on a CPU")
    if wants_gradients(inputs):
        raise FlexdpoError(f"impl='flex' has no backward on a CPU; {way_out}, or run under torch.no_grad()")
    if inputs.query.dtype == torch.float64:
        raise FlexdpoError(f"impl='flex' has no float64 kernel on a CPU; {way_out}")
    if inputs.sinks is not None:
        raise FlexdpoError(f"impl='flex' cannot return the log-sum-exp that attention sinks need on a CPU; {way_out}")
