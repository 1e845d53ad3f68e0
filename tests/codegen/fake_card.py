"""A CUDA card that is not there: what code generation asks a card, answered from a table.

``torch.cuda.is_available()`` stays false, so that Dynamo leaves the CUDA runtime alone.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Card:
    """The fields of ``torch.cuda.get_device_properties`` that inductor and triton read; memory in bytes."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_block_optin: int
    warp_size: int = 32
    total_memory: int = 80 << 30
    regs_per_multiprocessor: int = 65_536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    shared_memory_per_block: int = 49_152
    L2_cache_size: int = 50 << 20
    gcnArchName: str = ""  # noqa: N815 - a name of torch's

    @property
    def capability(self) -> int:
        """Compute capability in one number: 90 for 9.0."""
        return 10 * self.major + self.minor

    @property
    def shared_memory_per_multiprocessor(self) -> int:
        """One kilobyte more than a block may have."""
        return self.shared_memory_per_block_optin + 1024


# shared memory a block may opt in to: CUDA C++ Programming Guide, table of technical specifications per capability
A100 = Card("NVIDIA A100-SXM4-80GB", 8, 0, 108, 163 << 10)
H100 = Card("NVIDIA H100 80GB HBM3", 9, 0, 132, 227 << 10)
B200 = Card("NVIDIA B200", 10, 0, 148, 227 << 10)


class _Driver:
    """Triton's active driver: it knows its target and nothing else."""

    def __init__(self, card: Card) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", card.capability, card.warp_size)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def insert(card: Card) -> None:
    """Answer for ``card`` from now on, in this process."""
    from torch._dynamo.device_interface import CudaInterface
    from triton.runtime.driver import driver

    _guard_cuda_like_cpu()
    torch.cuda.get_device_properties = lambda device=None: card
    torch.cuda.get_device_capability = lambda device=None: (card.major, card.minor)
    torch.cuda.get_device_name = lambda device=None: card.name
    torch.cuda.current_device = lambda: 0
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(lambda device=None: card)
        interface.current_device = staticmethod(lambda: 0)
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: card.capability)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    CudaInterface.is_dtype_supported = classmethod(lambda cls, dtype, including_emulation=False: True)
    CudaInterface.is_triton_capable = staticmethod(lambda device=None: True)
    CudaInterface.raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    driver.set_active(_Driver(card))


def _guard_cuda_like_cpu() -> None:
    """Let fake CUDA tensors be indexed: a CPU build has no device guard for them, and the CPU's does nothing either."""
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cpu, cuda = 0, 1  # c10::DeviceType
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[cuda]:
        guards[cuda] = guards[cpu]
