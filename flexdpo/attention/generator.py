"""Masks, score functions and attention of packed rows, for torch's FlexAttention and for models of any make.

A packed row says who may look at whom (:class:`flexdpo.Row`); what a model wants besides (a window, chunks, a mask
function of its own) is counted in logical positions, so that it means what it means in one sequence alone.

Shapes: ``B`` rows, ``Hq`` query heads, ``Hkv`` key heads, ``S`` tokens, ``D`` and ``Dv`` head sizes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdpo.attention.block_masks import build_block_mask
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind, MaskMod, mask_mod_for
from flexdpo.attention.row_mask import Impl, row_mask_for
from flexdpo.attention.score_mods import ScoreMod, require_softcap
from flexdpo.errors import FlexdpoError, first_line, found
from flexdpo.layout.row import TILE, Row, RowLayout
from flexdpo.layout.sequences import is_count, is_finite

# what kernels compute in
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def mask_mod(
    row: Row | RowLayout, *, window: int | None = None, chunk: int | None = None, mask_function: MaskMod | None = None
) -> MaskMod:
    """Which token of a row may attend to which: itself and its ancestors, as far as the model looks back.

    Args:
        row: A packed row, or the layout of a batch of them.
        window: A token attends to this many tokens, itself included.
        chunk: A token attends within its own chunk of this many positions.
        mask_function: A mask of the model's own, ``(batch, head, q_position, kv_position) -> bool`` on 0-d tensors,
            evaluated at logical positions and intersected with the row's.

    Returns ``(batch, head, q_idx, kv_idx) -> bool`` on indices of the row, as FlexAttention takes it. Raises
    ``FlexdpoError`` if more than one of ``window``, ``chunk`` and ``mask_function`` is given, or one makes no mask.
    """
    return mask_mod_for(*_mask_of(row, window, chunk, mask_function))


def block_mask(
    row: Row | RowLayout,
    *,
    window: int | None = None,
    chunk: int | None = None,
    mask_function: MaskMod | None = None,
    block_size: int | tuple[int, int] = TILE,
) -> BlockMask:
    """The BlockMask of :func:`mask_mod` for torch's ``flex_attention``, made without looking at any pair of tokens.

    With a ``mask_function`` every tile that the row leaves open is evaluated. ``block_size`` is the side of a tile in
    tokens, or its queries and its keys; other arguments and errors are those of :func:`mask_mod`.
    """
    sides = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(sides) != 2 or not all(map(is_count, sides)):
        raise FlexdpoError(
            f"block_size must be at least 1 token, got {block_size!r}; give one number, or those of queries and keys"
        )
    return build_block_mask(*_mask_of(row, window, chunk, mask_function), block_size=(int(sides[0]), int(sides[1])))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Row | RowLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    mask_function: MaskMod | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend within the branches of a packed row, forward and backward, on CUDA and on a CPU.

    On CUDA this is compiled FlexAttention; on a CPU, which has no backward of it, the same attention in pieces of the
    row, exact in every dtype. Positions are the caller's to apply to queries and keys: ``row.position_ids``.

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``, ``Hkv`` divides ``Hq``.
        value: ``[B, Hkv, S, Dv]``.
        row: The packed row (``B = 1``), or the layout of a batch of them.
        scale: Factor on the scores, ``D ** -0.5`` by default.
        window: As in :func:`mask_mod`.
        chunk: As in :func:`mask_mod`.
        mask_function: As in :func:`mask_mod`.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: One extra logit per query head that takes part in the softmax and carries no value, ``[Hq]``.
        score_mod: Any other change of the scores, after the softcap, as FlexAttention takes it:
            ``(score, batch, head, q_idx, kv_idx) -> score`` on indices of the row (:func:`flexdpo.alibi_score_mod` and
            :func:`flexdpo.logical_score_mod` look up logical positions). What it captured gets its gradients.
        impl: ``"flex"``, ``"varlen"`` (FlashAttention, CUDA in half precision), ``"sdpa"`` (pieces, any device), or
            ``"auto"``.

    Returns ``[B, Hq, S, Dv]`` in the dtype of ``query``; a query that the mask leaves no key, not even itself, gets
    zeros. Raises ``FlexdpoError`` if shapes or devices do not fit the row, masks as in :func:`mask_mod`, or the kernel
    that was asked for cannot do this.
    """
    layout, kind = _mask_of(row, window, chunk, mask_function)
    _require_tensors({"query": query, "key": key, "value": value, "sinks": sinks}, layout.device)
    _require_numbers(softcap, scale)
    row_mask = row_mask_for(layout, kind, impl)
    if score_mod is not None:
        _require_score_mod(score_mod, query.shape[1], layout)
        row_mask = dataclasses.replace(row_mask, score_mod=score_mod)
    return packed_attention(query, key, value, row_mask, scaling=scale, softcap=softcap, sinks=sinks)


def _require_tensors(tensors: dict[str, Any], device: torch.device) -> None:
    for name, tensor in tensors.items():
        if name == "sinks" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise FlexdpoError(f"{name} must be a tensor, got {found(tensor)}")
        if tensor.device != device:
            raise FlexdpoError(
                f"{name} is on {tensor.device} and the row on {device}; move the row once with "
                f"row.to({str(tensor.device)!r})"
            )
        if name != "sinks" and tensor.ndim != 4:
            raise FlexdpoError(f"{name} must be [rows, heads, tokens, head size], got {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise FlexdpoError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {tensor.dtype}")
    query, key, value = (tensors[name].dtype for name in ("query", "key", "value"))
    # autocast gives them its own
    if not query == key == value and not torch.is_autocast_enabled(device.type):
        raise FlexdpoError(
            f"query, key and value must have one dtype, got {query}, {key} and {value}; convert them, as in "
            "key.to(query.dtype), or run under torch.autocast"
        )


def _require_numbers(softcap: Any, scale: Any) -> None:
    if softcap is not None:
        require_softcap(softcap)
    if scale is not None and not is_finite(scale):
        raise FlexdpoError(f"scale must be a finite number, got {found(scale)}; leave it out for head size ** -0.5")


def _require_score_mod(score_mod: Any, heads: int, layout: RowLayout) -> None:
    device, own = layout.device, layout.position_ids
    shape, of_row = getattr(score_mod, "shape", own.shape), getattr(score_mod, "of_row", None)
    theirs: Tensor = own if of_row is None else of_row
    # looking at the values on a GPU would make it wait
    comparable = theirs is not own and {theirs.device.type, device.type} == {"cpu"}
    if shape != own.shape or (comparable and not torch.equal(theirs, own)):
        raise FlexdpoError(
            f"score_mod has the positions of another row, of {list(shape)} tokens, and this one has "
            f"{list(own.shape)}; make it of the row that is attended to"
        )
    if (slopes := getattr(score_mod, "query_heads", heads)) != heads:
        raise FlexdpoError(
            f"score_mod has slopes for {slopes} query heads, and query {heads}; give alibi_score_mod one for each"
        )
    answer = _asked("score_mod", score_mod, device, torch.zeros(1, device=device))
    if answer is not None and (answer.ndim or not answer.is_floating_point()):
        raise FlexdpoError(
            "score_mod must return a score, a 0-d float tensor, for (score, batch, head, q_idx, kv_idx), "
            f"got {found(answer)}"
        )


def _mask_of(row: Any, window: Any, chunk: Any, mask_function: MaskMod | None) -> tuple[RowLayout, MaskKind]:
    if not isinstance(row, Row | RowLayout):
        raise FlexdpoError(
            f"a row must be a flexdpo.Row (Row.from_groups, from_sequences, from_documents or from_lengths makes one) "
            f"or a flexdpo.RowLayout, got {found(row)}"
        )
    layout = row if isinstance(row, RowLayout) else row.layout
    given = {"window": window, "chunk": chunk, "mask_function": mask_function}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise FlexdpoError(
            f"give one of window, chunk and mask_function, got {' and '.join(given)}; a mask_function may hold them all"
        )
    if mask_function is not None:
        answer = _asked("mask_function", mask_function, layout.device)
        if answer is not None and answer.dtype != torch.bool:
            raise FlexdpoError(
                "mask_function must return a bool tensor for (batch, head, q_position, kv_position), "
                f"got {found(answer)}"
            )
        return layout, MaskKind("other", function=mask_function)
    for name, size in given.items():
        if not is_count(size):
            raise FlexdpoError(f"{name} must be a number of tokens, at least 1, got {size!r}")
        return layout, MaskKind("sliding" if name == "window" else "chunked", int(size))
    return layout, CAUSAL


def _asked(name: str, function: Any, device: torch.device, *score: Tensor) -> Tensor | None:
    """What a function says of one pair of tokens; ``None`` inside a graph, where tracing it asks already."""
    if not callable(function):
        raise FlexdpoError(f"{name} must be a function, got {found(function)}")
    if torch.compiler.is_compiling():
        return None
    with torch.no_grad():
        try:
            answers: Tensor = torch.vmap(function)(*score, *torch.zeros(4, 1, dtype=torch.int64, device=device))
            return answers[0]
        except Exception as error:
            raise FlexdpoError(
                f"{name} cannot be evaluated at one pair of tokens ({first_line(error)}); it takes 0-d tensors on "
                f"{device}, and chooses with torch.where instead of Python's if"
            ) from error
