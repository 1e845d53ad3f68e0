"""What Triton's interpreter lacks for the kernels that inductor writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def fill_gaps() -> None:
    """Give the interpreter ``libdevice`` and products of bfloat16; call before a kernel is loaded."""
    from torch._inductor.runtime import triton_helpers

    triton_helpers.libdevice = _Libdevice()
    _multiply_bfloat16_by_value()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}


class _Libdevice:
    """CUDA's math library by numpy; a function that no kernel has asked for so far is named in the error."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in _FUNCTIONS:
            raise NotImplementedError(f"the interpreted kernel calls libdevice.{name}; add it to {__file__}")
        function = _FUNCTIONS[name]

        def call(x: Any) -> Any:
            from triton.language import tensor
            from triton.runtime.interpreter import TensorHandle

            values = x.handle.data
            # bfloat16 is kept as its bits, and inductor widens before it calls
            assert values.dtype in (np.float32, np.float64), values.dtype
            return tensor(TensorHandle(function(values).astype(values.dtype), x.handle.dtype), x.type)

        return call


def _multiply_bfloat16_by_value() -> None:
    """The interpreter keeps bfloat16 as uint16, and its ``tl.dot`` would multiply the bit patterns."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    as_it_is = InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: as_it_is(self, widened(a), widened(b), *rest)


def widen_blocks(kernel: Any) -> None:
    """Let a pointwise or reduction kernel do its work in few programs, whose number is what interpreting costs.

    Args:
        kernel: A ``CachingAutotuner``; any block sizes are right, and torch interprets its first configuration.
    """
    blocks = kernel.configs[0].kwargs
    for axis, size in (kernel.size_hints or {}).items():
        name = f"{axis.upper()}BLOCK"
        if name in blocks:
            blocks[name] = max(blocks[name], min(size, 1024))
