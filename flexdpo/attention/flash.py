"""What FlashAttention-4 must be and be given before FlexAttention runs on it (``BACKEND="FLASH"``)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from packaging.version import Version

from flexdpo.errors import FlexdpoError

# the first release whose backward on Hopper waits for the sums it needs; before, 0.1 to 1 % of its launches under a
# BlockMask read them too early, which no comparison of a few launches would find
FIRST_SOUND_VERSION = Version("4.0.0b26")
_HOPPER, _BLACKWELL = 9, (10, 11)
# what its backward takes in blocks of 128 keys
_LARGEST_HEAD = 128


class FlashCall(NamedTuple):
    """What decides whether FlashAttention-4 can do a call."""

    head_dim: int  # ``D``
    value_dim: int  # ``Dv``
    dtype: torch.dtype  # of query, key and value
    sinks: bool  # whether there are attention sinks, which need the gradient of the log-sum-exp
    grad: bool  # whether a backward follows


def flash_block_size(capability: tuple[int, int]) -> tuple[int, int]:
    """Queries and keys of a BlockMask's tile: on Blackwell a block runs two tiles of queries side by side."""
    return (256, 128) if capability[0] in _BLACKWELL else (128, 128)


def installed_flash() -> Version | None:
    """The version of ``flash-attn-4``, or ``None`` where there is none."""
    try:
        return Version(version("flash-attn-4"))
    except PackageNotFoundError:
        return None


def flash_refusal(call: FlashCall, capability: tuple[int, int], installed: Version | None) -> str | None:
    """Say why FlashAttention-4 cannot be trusted with a call; ``None`` where nothing speaks against it."""
    largest = max(call.head_dim, call.value_dim)
    obstacles = (
        (installed is None, f"it is not installed (pip install --pre 'flash-attn-4>={FIRST_SOUND_VERSION}')"),
        (
            installed is not None and installed < FIRST_SOUND_VERSION,
            f"flash-attn-4 {installed} has a backward that now and then reads sums before they are written (on Hopper, "
            f"in one launch out of a hundred to a thousand); install {FIRST_SOUND_VERSION} or later",
        ),
        (
            capability[0] not in (_HOPPER, *_BLACKWELL),
            f"it has no backward under a BlockMask for compute capability {capability[0]}.{capability[1]}",
        ),
        (
            call.dtype not in (torch.float16, torch.bfloat16),
            f"it computes in float16 and bfloat16, and this model in {call.dtype}",
        ),
        (
            largest > _LARGEST_HEAD,
            f"its backward for head sizes above {_LARGEST_HEAD} works in blocks of keys other than the BlockMask's "
            f"128, and this model's head size is {largest}",
        ),
        (
            call.head_dim % 8 != 0 or call.value_dim % 8 != 0,
            f"it needs head sizes that 8 divides, and this model's are {call.head_dim} and {call.value_dim}",
        ),
        (
            call.sinks and call.grad,
            "its backward has no gradient of the log-sum-exp, which this model's attention sinks need",
        ),
    )
    return next((reason for stands, reason in obstacles if stands), None)


def require_flash(call: FlashCall, device: torch.device) -> None:
    """Raise ``FlexdpoError`` with the reason where FlashAttention-4 cannot be trusted with a call on a CUDA device."""
    reason = flash_refusal(call, torch.cuda.get_device_capability(device), installed_flash())
    if reason is not None:
        raise FlexdpoError(f"kernel_options BACKEND='FLASH': {reason}; leave BACKEND out of kernel_options")
