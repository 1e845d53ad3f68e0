"""What ``attn_implementation="flexdpo"`` stands for in transformers: an attention function and a mask function.

While a packed row is being run (:mod:`flexdpo.hf.forward_layout`), the mask function returns a BlockMask for every mask
kind the model asks for, and the attention function runs what that BlockMask says. Without a layout both do what
transformers does, so that ``generate()`` and evaluation just work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import CellType, FunctionType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from flexdpo.attention.formula import softmax_attention
from flexdpo.attention.inputs import AttentionInputs
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import row_mask_for, row_mask_of
from flexdpo.attention.selftest import is_compared
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.forward_layout import packed_forward, runs_along_paths
from flexdpo.hf.randomness import WAY_OUT
from flexdpo.hf.row_dependence import scaled_by_position
from flexdpo.hf.versions import as_mask_function, sdpa_mask
from flexdpo.layout.row import RowLayout

# what models hand to every attention function and what changes nothing in it: the mask already knows the window,
# and positions were applied before
# fmt: off
HARMLESS_KWARGS = frozenset({
    "position_ids", "cache_position", "use_cache", "sliding_window", "output_hidden_states", "output_router_logits",
    "num_items_in_batch", "return_dict", "logits_to_keep", "past_key_values", "cache", "layer_idx",
})
# fmt: on
# what the stock functions do besides, along the path to each leaf too
_STOCK_KWARGS = frozenset(("position_bias", "sinks"))
# of a variable that is not set yet, whose contents cannot even be looked at
_EMPTY_CELL = CellType()
_LOOKS_AHEAD = (
    "the model's attention also looks ahead, and a shared prompt must not see its responses; train it without flexdpo"
)


@as_mask_function
def flexdpo_mask(**kwargs: Any) -> Any:
    """A BlockMask for the row being run, or without a row transformers' SDPA mask, whose arguments it takes."""
    forward = packed_forward()
    if forward is None:
        return sdpa_mask(**kwargs)
    layout, mask_function = forward.layout, kwargs.get("mask_function", causal_mask_function)
    rows, queries, keys = kwargs["batch_size"], kwargs["q_length"], kwargs["kv_length"]
    if (rows, queries, keys) != (*layout.position_ids.shape, layout.position_ids.shape[1]):
        raise FlexdpoError(
            f"the layout is for {layout.batch_size} rows of {layout.length} tokens, but "
            f"{type(forward.module).__name__} asks for a mask of {rows} rows with {queries} queries and {keys} keys; "
            "a packed row cannot be combined with a cache or with extra tokens (prompt tuning)"
        )
    if mask_function is bidirectional_mask_function:
        raise UnsupportedModelError(_LOOKS_AHEAD)
    if torch.compiler.is_compiling() and mask_function is not causal_mask_function:
        if layout.images is not None:
            raise UnsupportedModelError(
                "a model compiled whole cannot run rows with images whose tokens see each other both ways; compile its "
                "layers one by one"
            )
        # Dynamo cannot look into closures; the function itself is traced, and local_size bounds how far it reaches
        kind = MaskKind("other", kwargs.get("local_size") or 0, mask_function)
    else:
        kind = mask_kind_of(mask_function)
    row_mask = row_mask_for(layout, kind, forward.impl)
    if torch.compiler.is_compiling() and is_compared(row_mask, layout.device):
        row_mask.tested = forward.tested(torch.is_grad_enabled())
    return row_mask.block_mask


def mask_kind_of(mask_function: Callable[..., Any]) -> MaskKind:
    """Recognise a mask function of transformers, so that the window is known as a number; others are evaluated.

    Raises ``UnsupportedModelError`` if the function looks ahead, or depends on more than the two positions.
    """
    if mask_function is causal_mask_function:
        return CAUSAL
    parts = _closure(mask_function, "or_masks").get("mask_functions", ())
    if len(parts) == 2 and "block_sequence_ids" in (blocks := _closure(parts[1], "blockwise_overlay")):
        return replace(mask_kind_of(parts[0]), blocks=_has_blocks(blocks["block_sequence_ids"]))
    parts = _closure(mask_function, "and_masks").get("mask_functions", ())
    for one, other in (parts, parts[::-1]) if len(parts) == 2 else ():
        window = _closure(one, "sliding_window_overlay").get("sliding_window")
        if isinstance(window, int) and (inner := mask_kind_of(other)).name == "causal":
            return replace(inner, name="sliding", size=window)
        chunk_size = _closure(one, "chunked_overlay").get("chunk_size")
        if isinstance(chunk_size, int) and other is causal_mask_function:
            return MaskKind("chunked", chunk_size)
    _require_positions_only(mask_function)
    _require_causal(mask_function)
    return MaskKind("other", function=mask_function)


def _has_blocks(block_sequence_ids: Tensor) -> bool:
    """Whether images of the row being run see themselves both ways (Gemma 3 and 4); text has the block id -1."""
    forward = packed_forward()
    if forward is not None and forward.layout.images is not None:
        return True
    # where nothing but text came in, the model made these ids itself; a look at them would wait for the device
    looked_at = forward is None or forward.brings_token_types
    if looked_at and bool((block_sequence_ids != -1).any()):
        raise UnsupportedModelError(
            "a packed row holds image or audio tokens, which attend to each other both ways, without their images; "
            "rows with images come from Group.images"
        )
    return False


def _require_positions_only(mask_function: Callable[..., Any]) -> None:
    """Stop where a mask looks tokens up by their index, which positions shared by several responses are not."""
    pending: list[Any] = [mask_function]
    # by identity: what a function captures may lead back to the function itself
    seen: dict[int, Any] = {}
    while pending:
        found = pending.pop()
        if id(found) in seen:
            continue
        seen[id(found)] = found
        if isinstance(found, torch.Tensor) and found.numel() > 1:
            raise UnsupportedModelError(
                "the model's attention mask depends on which token stands where and not on distance alone, which "
                "packed rows cannot honour; train it without flexdpo"
            )
        # and whatever a function or a container holds: closures, defaults, partial arguments, items
        if isinstance(found, tuple | list | set | frozenset):
            pending += found
        elif isinstance(found, dict):
            pending += found.values()
        elif isinstance(found, functools.partial):
            pending += [found.func, *found.args, *found.keywords.values()]
        elif isinstance(found, FunctionType):
            pending += [cell.cell_contents for cell in found.__closure__ or () if cell != _EMPTY_CELL]
            pending += [*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()]


def _require_causal(mask_function: Callable[..., Any]) -> None:
    """Stop before a mask that looks ahead is cut down to the part of it that does not."""
    try:
        ahead = mask_function(0, 0, torch.tensor(0, device="cpu"), torch.tensor(1, device="cpu"))
    except RecursionError as error:
        raise UnsupportedModelError(
            "the model's attention mask function calls itself without end, so it says nothing about any two "
            "positions; train it without flexdpo"
        ) from error
    if bool(torch.as_tensor(ahead)):
        raise UnsupportedModelError(_LOOKS_AHEAD)


def _closure(function: Callable[..., Any], factory: str) -> dict[str, Any]:
    """The captured variables of a function made by ``transformers.masking_utils.<factory>``, or nothing."""
    made_by = getattr(function, "__qualname__", "").split(".<locals>")[0]
    if function.__module__ != "transformers.masking_utils" or made_by != factory:
        return {}
    cells = zip(function.__code__.co_freevars, getattr(function, "__closure__", None) or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def flexdpo_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend along the branches of the row, or without a row as transformers' SDPA and eager functions do.

    ``query``, ``key``, ``value``, ``scaling``, ``softcap`` and the sinks, ``s_aux``, are those of
    :class:`~flexdpo.attention.inputs.AttentionInputs`, ``attention_mask`` is what :func:`flexdpo_mask` returned. On a
    packed row ``dropout`` must be 0, since shared tokens cannot be dropped differently for each response, and anything
    else is refused unless it is known to change nothing.

    Returns ``([B, S, Hq, Dv], None)``, as transformers expects.
    """
    sinks = kwargs.pop("s_aux", None)
    row_mask, forward = row_mask_of(attention_mask), packed_forward()
    row = None if forward is None else forward.layout
    if attention_mask is None and row is not None and query.shape[:2] == key.shape[:2] == row.position_ids.shape:
        # over parts of each token, as its states at earlier layers, and not over the row
        row = row if key.shape[2] == row.length else None
    if row is not None and (row_mask is None or row_mask.layout is not row):
        raise UnsupportedModelError(
            f"{type(module).__name__} received a mask that is not the packed row's own "
            f"({type(attention_mask).__name__}); it would mix responses, so train this model without flexdpo"
        )
    if row_mask is None:
        if runs_along_paths():
            _refuse_unknown(module, dropout, {name: kwargs[name] for name in kwargs.keys() - _STOCK_KWARGS})
        # those of each query have a name of their own
        sinks = kwargs.pop("sinks", None) if sinks is None else sinks
        inputs = AttentionInputs(query, key, value, scaling, softcap, sinks)
        return _stock_attention(module, inputs, attention_mask, dropout, kwargs)
    if forward is not None:
        # a flag and not a count, which a compiled layer would be traced again for
        forward.attention_ran = True
    _refuse_unknown(module, dropout, kwargs)
    query = scaled_by_position(module, query, row_mask.layout)
    if row_mask.layout.kept is not None:
        key, value = row_mask.layout.kept.behind_path(module, key, value, row_mask.layout.path)
    output = packed_attention(query, key, value, row_mask, scaling=scaling, softcap=softcap, sinks=sinks)
    if forward is not None and not torch.compiler.is_compiling() and is_compared(row_mask, query.device):
        forward.mark_tested(torch.is_grad_enabled())
    return rearrange(output, "b h s d -> b s h d").contiguous(), None


def _refuse_unknown(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses attention dropout {dropout}, which a shared prompt cannot reproduce; "
            f"{WAY_OUT}"
        )
    for name, value in kwargs.items():
        harmless = value is None or value is False or name in HARMLESS_KWARGS
        if not harmless and not (name == "is_causal" and value is True):
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name}= to its attention, which flexdpo does not know how to honour "
                "on a packed row; train this model without flexdpo"
            )
    if kwargs.get("is_causal") is False:
        raise UnsupportedModelError(f"{type(module).__name__} asks for attention that is not causal")


def _stock_attention(
    module: nn.Module, inputs: AttentionInputs, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> tuple[Tensor, None]:
    """What transformers would do: its SDPA function, and the formula where SDPA has no softcap and no sinks."""
    query, key, value = inputs[:3]
    if isinstance(attention_mask, RowLayout):
        raise FlexdpoError(
            "a packed row reached a model that was not prepared for it; call flexdpo.prepare_model(model)"
        )
    if inputs.softcap is None and inputs.sinks is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, inputs.scaling, **kwargs)
        return output, None
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        # transformers leaves the mask out for a single query, which sees everything, and for plain causal attention
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        attention_mask = mask.tril() if is_causal and queries > 1 else mask
    bias = attention_mask
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
    if kwargs.get("position_bias") is not None:
        bias = bias + kwargs["position_bias"]
    output = softmax_attention(inputs, bias, dropout=dropout)
    return rearrange(output, "b h s d -> b s h d").contiguous(), None
