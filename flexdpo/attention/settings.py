"""How FlexAttention is compiled: a setting of each thread, read when a row's mask is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch.nn.attention.flex_attention import FlexKernelOptions

from flexdpo.errors import FlexdpoError, nearest

Lengths = Literal["auto", "bucket", "dynamic"]
BACKENDS = ("AUTO", "TRITON", "FLASH")
# promises that hold for one causal document and not for a packed row: in a tile of several documents the first keys a
# query meets may all be hidden from it, and its tiles are interrupted by dead siblings
_BROKEN_PROMISES = ("ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS")


@dataclass(frozen=True)
class KernelSettings:
    """How FlexAttention is compiled and checked."""

    # ``"bucket"`` compiles one kernel per row length, which must then be few, multiples of 128
    # (:func:`flexdpo.layout.packing.choose_buckets`); whole tiles let the kernel skip its bounds checks. ``"dynamic"``
    # compiles one kernel for all lengths. ``"auto"`` is ``"bucket"`` on CUDA, ``"dynamic"`` on a CPU.
    lengths: Lengths = "auto"
    max_kernels: int = 32  # most kernels a process compiles; one more raises instead of compiling for hours
    # for ``torch.nn.attention.flex_attention``, for example ``{"BLOCK_M": 64, "BLOCK_N": 64}`` (queries and keys of a
    # forward tile, which divide 128), ``{"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2":
    # 32}`` (of the backward tiles), ``{"num_stages": 2}`` where shared memory is short, ``{"BACKEND": "FLASH"}`` for
    # FlashAttention-4. See torch's ``FlexKernelOptions``. FLASH is used only after its gradients were compared with
    # dense attention at the shape and mask of the training.
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    # on CUDA, compare every kernel's output and gradients with dense attention at its first row, and stop where they
    # are wrong. FLASH is always compared.
    self_test: bool = True

    def __post_init__(self) -> None:
        if self.lengths not in (known := get_args(Lengths)):
            raise FlexdpoError(f"lengths must be one of {known}, got {self.lengths!r}{nearest(self.lengths, known)}")
        if self.max_kernels < 1:
            raise FlexdpoError(f"max_kernels must be at least 1, got {self.max_kernels}")
        known_options = tuple(FlexKernelOptions.__annotations__)
        for name, value in self.kernel_options.items():
            plain = name.removeprefix("fwd_").removeprefix("bwd_")
            if plain not in known_options:
                raise FlexdpoError(f"kernel_options has no {name!r}{nearest(plain, known_options)}")
            if plain in _BROKEN_PROMISES and value:
                raise FlexdpoError(
                    f"kernel_options {name}=True promises something that packed rows do not keep (a tile may hold "
                    "several documents), so the result would be wrong or NaN; leave it out"
                )
            if plain == "BACKEND" and value not in BACKENDS:
                raise FlexdpoError(f"kernel_options BACKEND must be one of {BACKENDS}, got {value!r}")
        object.__setattr__(self, "kernel_options", dict(self.kernel_options))

    @property
    def backend(self) -> str:
        """The backend that was asked for, ``"AUTO"`` by default."""
        return str(self.kernel_options.get("BACKEND", "AUTO"))

    def dynamic(self, device_type: str) -> bool:
        """Whether one kernel serves all lengths on this kind of device."""
        return self.lengths == "dynamic" or (self.lengths == "auto" and device_type == "cpu")


class _InForce(threading.local):
    settings: KernelSettings = KernelSettings()


_in_force = _InForce()


def kernel_settings() -> KernelSettings:
    """The settings in force in this thread."""
    return _in_force.settings


def exchange_kernel_settings(settings: KernelSettings) -> KernelSettings:
    """Put settings in force in this thread, for the masks made from now on, and return those that were."""
    before, _in_force.settings = _in_force.settings, settings
    return before


@contextlib.contextmanager
def kernel_settings_as(settings: KernelSettings) -> Iterator[None]:
    """Put settings in force in this thread for the duration of a ``with`` block."""
    before = exchange_kernel_settings(settings)
    try:
        yield
    finally:
        exchange_kernel_settings(before)
