"""BlockMasks straight from the layout vectors, without looking at any pair of tokens.

``create_block_mask`` evaluates the mask at all ``S * S`` pairs. Here a tile is classified from few numbers: the
largest and smallest ``subtree_end`` of its keys, the ranges of logical positions of its keys and queries, and where
images see themselves both ways, how far those of its queries reach.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdpo.attention.mask_mods import CAUSAL, MaskKind, mask_mod_for
from flexdpo.errors import UnsupportedModelError
from flexdpo.layout.row import TILE, RowLayout


class RowBlockMask(BlockMask):
    """The BlockMask of packed rows, which a model must hand to its attention as it is; adding it to scores raises."""

    def __getitem__(self, index: Any) -> RowBlockMask:
        """All of the mask, by slices that leave nothing out; a part of it would no longer know its row."""
        parts = index if isinstance(index, tuple) else (index,)
        if all(part in (slice(None), slice(0, None), Ellipsis) for part in parts):
            return self
        raise UnsupportedModelError(
            f"the model takes the part {index} of its attention mask, and a part of a packed row's mask is none; leave "
            "logits_to_keep out, or train it without flexdpo"
        )

    def _refuse(self, *_: object) -> NoReturn:
        raise UnsupportedModelError(
            "the model computes with its attention mask itself instead of handing it to its attention function, so "
            "packed rows cannot be exact in it; train it without flexdpo"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __invert__ = __neg__ = _refuse


def build_block_mask(
    layout: RowLayout, kind: MaskKind = CAUSAL, *, block_size: int | tuple[int, int] = TILE
) -> BlockMask:
    """Build the BlockMask of one mask kind on a batch of packed rows, on the layout's device, without synchronising.

    The causal mask equals ``create_block_mask`` tile by tile. With a window or chunks, tiles are judged by the ranges
    of their positions: none that holds an allowed pair is missing and every full tile is full, but a tile may count as
    partial though its ``mask_mod`` allows nothing in it. An unknown mask function makes every tile in reach partial.

    ``block_size`` is the side of a tile in tokens, or its queries and its keys. Returns a BlockMask of ``M`` tiles of
    queries and ``N`` of keys with ``[B, 1, M, N]`` indices, in time and memory ``O(B (S + M N))``.
    """
    non_empty, full = classify_tiles(layout, kind, block_size)
    partial = non_empty & ~full
    # left to itself, torch would find the queries of each key tile by sorting again
    block_mask: BlockMask = RowBlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod_for(layout, kind),
        seq_lengths=(layout.position_ids.shape[1], (layout.keys or layout).position_ids.shape[1]),
        compute_q_blocks=False,
    )
    block_mask.q_num_blocks, block_mask.q_indices = _ordered(rearrange(partial, "b m n -> b n m"))
    block_mask.full_q_num_blocks, block_mask.full_q_indices = _ordered(rearrange(full, "b m n -> b n m"))
    return block_mask


class Tiles(NamedTuple):
    """Which tiles a kernel must visit, and in which of them it may skip the mask. ``[B, M, N]`` bool each."""

    non_empty: Tensor
    full: Tensor


def classify_tiles(layout: RowLayout, kind: MaskKind, block_size: int | tuple[int, int]) -> Tiles:
    """Classify every tile of the mask; rows of tiles are queries, columns are keys, those of a path first."""
    queries, keys = (block_size, block_size) if isinstance(block_size, int) else block_size
    seen, device = layout.keys or layout, layout.position_ids.device
    ends, length = _ranges(seen.subtree_end, keys), seen.position_ids.shape[1]
    first_key = torch.arange(ends.low.shape[-1], device=device) * keys
    own = layout.position_ids.shape[1]
    # counted through the path's keys, at whose end a tile need not begin
    first_query = length - own + torch.arange(-(-own // queries), device=device)[:, None] * queries
    below_diagonal = first_query >= first_key + keys

    # a tile on the diagonal holds tokens that see themselves, and above the diagonal it is empty
    on_diagonal = (first_query < first_key + keys) & (first_key < first_query + queries)
    non_empty = (below_diagonal & (first_query < ends.high[:, None, :])) | on_diagonal
    seen_from_behind = first_query + queries - 1 < ends.low[:, None, :]
    full = below_diagonal & seen_from_behind
    if kind.blocks:
        # unless images see themselves both ways, past a tile on the diagonal too
        blocks, above = _ranges(layout.block_end(), queries), first_key >= first_query + queries
        non_empty = non_empty | (above & (first_key < blocks.high[:, :, None]))
        seen_from_before = first_key + keys - 1 < blocks.low[:, :, None]
        full = seen_from_before & (seen_from_behind | above)
    # the last queries of a ragged row do not exist, so their tiles need the mask
    full = full & (first_query + queries <= length)
    if kind.name == "causal":
        return Tiles(non_empty, full)
    near, all_near = _reach(_ranges(layout.position_ids, queries), _ranges(seen.position_ids, keys), kind)
    if kind.name == "other":
        return Tiles(non_empty & near if kind.size else non_empty, torch.zeros_like(full))
    return Tiles(non_empty & near, full & all_near)


class _Range(NamedTuple):
    """Smallest and largest value per block, ``[B, N]`` each."""

    low: Tensor
    high: Tensor


def _ranges(values: Tensor, block_size: int) -> _Range:
    batch_size, length = values.shape
    missing = -length % block_size
    # repeating the last value changes neither bound of the last block
    padded = torch.cat([values, values[:, -1:].expand(batch_size, missing)], dim=1) if missing else values
    blocks = rearrange(padded, "b (n t) -> b n t", t=block_size)
    return _Range(blocks.amin(dim=-1), blocks.amax(dim=-1))


def _reach(queries: _Range, keys: _Range, kind: MaskKind) -> tuple[Tensor, Tensor]:
    """Whether some pair, and whether every pair, of a tile's query and key positions is near enough."""
    query_low, query_high = queries.low[:, :, None], queries.high[:, :, None]
    key_low, key_high = keys.low[:, None, :], keys.high[:, None, :]
    if kind.name != "chunked":
        return query_low - key_high < kind.size, query_high - key_low < kind.size
    first_query, last_query = query_low // kind.size, query_high // kind.size
    first_key, last_key = key_low // kind.size, key_high // kind.size
    overlap = (last_key >= first_query) & (first_key <= last_query)
    return overlap, (first_query == last_query) & (first_key == first_query) & (last_key == first_query)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of tiles: how many are set, and their columns first, both ascending. ``[B, 1, N]``, ``[B, 1, N, N]``.

    Contiguous, whatever the strides of ``tiles``: FlexAttention's backward reads ``q_indices`` with a stride of one
    and does not check it, so that a transposed list gives wrong gradients of keys and values and nothing else.
    """
    tiles = tiles.contiguous()
    rank = tiles.cumsum(dim=-1, dtype=torch.int32)
    count = rank[..., -1].contiguous()
    column = torch.arange(tiles.shape[-1], device=tiles.device, dtype=torch.int32).expand_as(tiles)
    # set columns come first, each at its rank; the others follow, each at its rank among them
    place = torch.where(tiles, rank - 1, count[..., None] + column - rank)
    indices = torch.empty(tiles.shape, dtype=torch.int32, device=tiles.device).scatter_(-1, place.long(), column)
    return rearrange(count, "b m -> b 1 m"), rearrange(indices, "b m n -> b 1 m n")
