"""Attention that runs packed rows where there are some, and a model's own attention everywhere else.

A model that shares prefixes runs both: shared batches as packed rows, and whatever cannot be shared exactly as before.
Which of the two a layer runs is told by the mask it is given, so that a checkpoint may run it again at any time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexdpo.attention.row_mask import row_mask_of
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.forward_layout import ATTN_IMPLEMENTATION, packed_forward
from flexdpo.hf.interface import flexdpo_attention, flexdpo_mask


def implementation_over(stock: str) -> str:
    """Register flexdpo's attention over another one that transformers knows, and return the name it has there."""
    if stock == ATTN_IMPLEMENTATION:
        return stock
    if stock not in ALL_MASK_ATTENTION_FUNCTIONS or (stock != "eager" and stock not in ALL_ATTENTION_FUNCTIONS):
        raise FlexdpoError(
            f"the model's attn_implementation={stock!r} has no attention or no mask function registered in "
            "transformers, so batches that cannot be shared could not run; load the model with 'sdpa' or 'eager'"
        )
    # transformers takes a name with "flash" in it for FlashAttention itself, and one with a slash for an address
    name = f"{ATTN_IMPLEMENTATION}_over_{stock.replace('flash', 'fa').replace('/', '_')}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(_attention_over, stock))
        AttentionMaskInterface.register(name, functools.partial(_mask_over, stock))
    return name


def _mask_over(stock: str, *args: Any, **kwargs: Any) -> Any:
    mask = ALL_MASK_ATTENTION_FUNCTIONS[stock] if packed_forward() is None else flexdpo_mask
    return mask(*args, **kwargs)


def _attention_over(
    stock: str, module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    attend: Callable[..., Any] = flexdpo_attention
    if row_mask_of(attention_mask) is None and packed_forward() is None:
        attend = _eager_attention_of(module) if stock == "eager" else ALL_ATTENTION_FUNCTIONS[stock]
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def _eager_attention_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the file a model's attention is written in; transformers registers none."""
    for made_by in type(module).__mro__:
        if found := getattr(sys.modules[made_by.__module__], "eager_attention_forward", None):
            eager: Callable[..., Any] = found
            return eager
    raise UnsupportedModelError(
        f"the file of {type(module).__name__} has no eager_attention_forward; load the model with "
        "attn_implementation='sdpa' before sharing prefixes"
    )
