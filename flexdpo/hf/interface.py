"""Registers ``attn_implementation="flexdpo"``, and carries a row's layout from the model call to the attention mask.

The layout arrives as the model's ``attention_mask``. A forward pre-hook takes it out, holds it for the duration of that
forward and leaves a 2-D mask of the real tokens; the registered mask function finds the held layout and returns a
BlockMask for every mask kind the model asks for; the attention function runs what that BlockMask says. A checkpoint
that reruns the whole model passes the layout again; one that reruns a layer passes the BlockMask itself. So nothing
depends on what was held before.

Without a layout both functions do what transformers does, so that ``generate()`` and evaluation just work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from flexdpo.attention.kernels import packed_attention, softmax_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import Impl, row_mask_for, row_mask_of
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.layout.row import RowLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

ATTN_IMPLEMENTATION = "flexdpo"

# what models hand to every attention function and what changes nothing in it: the mask already knows the window,
# and positions were applied before
# fmt: off
_HARMLESS_KWARGS = frozenset(
    (
        "position_ids", "cache_position", "use_cache", "sliding_window", "output_hidden_states",
        "output_router_logits", "num_items_in_batch", "return_dict", "logits_to_keep", "past_key_values",
        "layer_idx",
    )
)
# fmt: on


@dataclass(eq=False)
class _Held:
    """The layout of one forward in progress."""

    module: nn.Module
    layout: RowLayout
    impl: Impl
    attention_calls: int = 0


@dataclass(eq=False)
class _Forwards:
    """The packed forwards in progress, innermost last."""

    held: list[_Held] = field(default_factory=list)


_forwards = _Forwards()


# --- the mask function -----------------------------------------------------------------------------------------------


def flexdpo_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Return the mask of one kind: a BlockMask for the row being run, or without a row transformers' SDPA mask.

    The arguments are those of ``transformers.masking_utils.sdpa_mask``.
    """
    if not _forwards.held:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    held = _forwards.held[-1]
    layout = held.layout
    if (batch_size, q_length, kv_length) != (layout.batch_size, layout.length, layout.length):
        raise FlexdpoError(
            f"the layout is for {layout.batch_size} rows of {layout.length} tokens, but {type(held.module).__name__} "
            f"asks for a mask of {batch_size} rows with {q_length} queries and {kv_length} keys; "
            "a packed row cannot be combined with a cache or with extra tokens (prompt tuning)"
        )
    return row_mask_for(layout, mask_kind_of(mask_function), held.impl).block_mask


def mask_kind_of(mask_function: Callable[..., Any]) -> MaskKind:
    """Recognise a mask function of transformers, so that the window is known as a number.

    Whatever is not recognised is still honoured, evaluated at logical positions pair by pair.
    """
    if mask_function is causal_mask_function:
        return CAUSAL
    parts = _closure(mask_function, "and_masks").get("mask_functions", ())
    if len(parts) == 2 and parts[1] is causal_mask_function:
        window = _closure(parts[0], "sliding_window_overlay").get("sliding_window")
        if isinstance(window, int):
            return MaskKind("sliding", window)
        chunk_size = _closure(parts[0], "chunked_overlay").get("chunk_size")
        if isinstance(chunk_size, int):
            return MaskKind("chunked", chunk_size)
    return MaskKind("other", function=mask_function)


def _closure(function: Callable[..., Any], factory: str) -> dict[str, Any]:
    """The captured variables of a function made by ``transformers.masking_utils.<factory>``, or nothing."""
    made_by = getattr(function, "__qualname__", "").split(".<locals>")[0]
    if function.__module__ != "transformers.masking_utils" or made_by != factory:
        return {}
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


# --- the attention function ------------------------------------------------------------------------------------------


def flexdpo_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend along the branches of the row, or without a row as transformers' SDPA and eager functions do.

    Shapes: ``B`` rows, ``Hq``/``Hkv`` heads, ``S`` tokens, ``D``/``Dv`` head sizes.

    Args:
        module: The attention module that calls.
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        attention_mask: What :func:`flexdpo_mask` returned.
        dropout: Must be 0 on a packed row: shared tokens cannot be dropped differently for each response.
        scaling: Factor on the scores.
        softcap: Soft bound of the scores.
        s_aux: Attention sinks, ``[Hq]``.
        kwargs: Anything else is refused on a packed row unless it is known to change nothing.

    Returns:
        ``([B, S, Hq, Dv], None)``, as transformers expects.
    """
    row_mask = row_mask_of(attention_mask)
    if row_mask is None:
        if _forwards.held:
            raise UnsupportedModelError(
                f"{type(module).__name__} received a mask that is not the packed row's own "
                f"({type(attention_mask).__name__}); it would mix responses, so this model is refused"
            )
        return _stock_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            softcap=softcap,
            s_aux=s_aux,
            **kwargs,
        )
    if _forwards.held:
        _forwards.held[-1].attention_calls += 1
    _refuse_unknown(module, dropout, kwargs)
    output = packed_attention(query, key, value, row_mask, scaling=scaling, softcap=softcap, sinks=s_aux)
    return output.transpose(1, 2).contiguous(), None


def _refuse_unknown(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise FlexdpoError(
            f"{type(module).__name__} uses attention dropout {dropout}, which a shared prompt cannot reproduce; "
            "set attention_dropout=0 in the model's config (the trainer does with disable_dropout=True)"
        )
    for name, value in kwargs.items():
        harmless = value is None or value is False or name in _HARMLESS_KWARGS
        if not harmless and not (name == "is_causal" and value is True):
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name}= to its attention, which flexdpo does not know how to honour "
                "on a packed row; train this model without flexdpo"
            )
    if kwargs.get("is_causal") is False:
        raise UnsupportedModelError(f"{type(module).__name__} asks for attention that is not causal")


def _stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    *,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers would do: its SDPA function, and the formula where SDPA has no softcap and no sinks."""
    if isinstance(attention_mask, RowLayout):
        raise FlexdpoError(
            "a packed row reached a model that was not prepared for it; call flexdpo.prepare_model(model)"
        )
    if softcap is None and s_aux is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if dropout > 0:
        raise FlexdpoError(
            "attn_implementation='flexdpo' has no dropout with softcap or sinks; set attention_dropout=0"
        )
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        # transformers leaves the mask out for a single query, which sees everything, and for plain causal attention
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        attention_mask = mask if queries == 1 else mask.tril()
    bias = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
    output = softmax_attention(query, key, value, bias, scaling=scaling, softcap=softcap, sinks=s_aux)
    return output.transpose(1, 2).contiguous(), None


# --- from the model call to the mask function ------------------------------------------------------------------------


def install_layout_hooks(module: nn.Module, impl: Impl) -> None:
    """Let ``module`` take a :class:`~flexdpo.layout.row.RowLayout` as its ``attention_mask``. Safe to call again."""
    already = hasattr(module, "_flexdpo_impl")
    module._flexdpo_impl = impl  # type: ignore[assignment]
    if not already:
        module.register_forward_pre_hook(_take_layout, with_kwargs=True)
        module.register_forward_hook(_release_layout, with_kwargs=True, always_call=True)


def _take_layout(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    layout = kwargs.get("attention_mask")
    if not isinstance(layout, RowLayout):
        if any(isinstance(arg, RowLayout) for arg in args):
            raise FlexdpoError("pass a row by name, model(**row.inputs()); its layout came as a positional argument")
        return None
    tokens = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if t is not None), None)
    if tokens is None:
        raise FlexdpoError("a packed row's layout came without input_ids; call model(**row.inputs())")
    _require_match(layout, tokens)
    kwargs = dict(kwargs, attention_mask=_real_tokens(layout))
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = layout.position_ids
    impl: Impl = module._flexdpo_impl  # type: ignore[assignment]
    _forwards.held.append(_Held(module, layout, impl))
    return args, kwargs


def _release_layout(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
    if not _forwards.held or _forwards.held[-1].module is not module:
        return
    held = _forwards.held.pop()
    # output is None when the forward raised; its own error says more
    if held.attention_calls == 0 and output is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} never called flexdpo's attention on a packed row, so its result mixes responses; "
            f"load it with attn_implementation={ATTN_IMPLEMENTATION!r} and call flexdpo.prepare_model(model), "
            "or train this model without flexdpo"
        )


def _require_match(layout: RowLayout, tokens: Tensor) -> None:
    if tuple(tokens.shape[:2]) != (layout.batch_size, layout.length):
        raise FlexdpoError(
            f"the layout is for {layout.batch_size} rows of {layout.length} tokens, but the inputs are "
            f"{list(tokens.shape[:2])}; pass the layout that belongs to these input_ids"
        )
    if tokens.device != layout.device:
        raise FlexdpoError(
            f"the layout is on {layout.device} and the inputs on {tokens.device}; move the row with row.to(device)"
        )


def _real_tokens(layout: RowLayout) -> Tensor:
    """A 2-D attention mask, 1 at the tokens of the row and 0 at its padding, ``[B, S]`` int64."""
    count = torch.tensor(layout.num_tokens, device=layout.device)
    return (torch.arange(layout.length, device=layout.device) < count[:, None]).long()


def register() -> None:
    """Make ``attn_implementation="flexdpo"`` known to transformers."""
    AttentionInterface.register(ATTN_IMPLEMENTATION, flexdpo_attention)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, flexdpo_mask)
