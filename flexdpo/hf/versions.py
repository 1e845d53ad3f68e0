"""What differs between the versions of transformers that flexdpo runs under, and stands nowhere else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import integrations, masking_utils

# from 5.15 on model files name the kernels of their layers that carry a state, by which those run along the trie
NAMES_KERNELS = hasattr(integrations, "use_kernel_func_from_hub_with_fallback")
# earlier versions give image tokens the positions of the batch before (Qwen2-VL), or other images to see (Gemma 3)
TAKES_IMAGES = NAMES_KERNELS
# where several sequences stand in a row, earlier versions cut chunks of the row and not of each sequence
CHUNKS_BEGIN_ANEW = hasattr(masking_utils, "remap_positions_for_packed_sequence")
# 5.3 gives a mask function the positions of its queries, later versions their number and where they begin
_MASKS_TAKE_POSITIONS = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters


def as_mask_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a mask function of today's arguments be called as this version of transformers calls its own."""
    if not _MASKS_TAKE_POSITIONS:
        return function

    @functools.wraps(function)
    def called_with_positions(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(masking_utils.sdpa_mask).bind(*args, **kwargs).arguments
        more = given.pop("kwargs", {})
        return function(**given, **more, q_length=given["cache_position"].shape[0])

    return called_with_positions


def sdpa_mask(**kwargs: Any) -> Any:
    """Transformers' SDPA mask, by the arguments of :func:`as_mask_function`'s function."""
    if _MASKS_TAKE_POSITIONS:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("q_length", "q_offset")}
    return masking_utils.sdpa_mask(**kwargs)
