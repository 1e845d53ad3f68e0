"""The dense definition of attention over tries, every pair of tokens and every score written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.attention.mask_mods import MaskMod


def dense_mask(mask_mod: MaskMod, batch_size: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Evaluate a ``mask_mod`` at every pair of tokens.

    Returns:
        ``[B, S, S]`` bool, ``True`` where query (dim 1) may attend to key (dim 2).
    """
    index = torch.arange(length, device=device)
    batch = torch.arange(batch_size, device=device)
    mask = mask_mod(batch[:, None, None], 0, index[None, :, None], index[None, None, :])
    return mask.expand(batch_size, length, length)


def ancestor_mask(parents: Tensor) -> Tensor:
    """Let every token see itself and its ancestors, found by walking up from it: the definition of the tree mask.

    Args:
        parents: Index of the token before each token, ``-1`` at a root, ``[S]`` int64.

    Returns:
        ``[S, S]`` bool.
    """
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for query in range(len(parents)):
        key = query
        while key >= 0:
            mask[query, key] = True
            key = int(parents[key])
    return mask


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention by the formula, every score held in memory.

    Shapes: ``B`` rows, ``Hq`` query and ``Hkv`` key heads (``Hq`` a multiple), ``S`` tokens, ``D``/``Dv`` head sizes.

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        mask: ``[B, S, S]`` bool.
        scaling: Factor on the scores, ``D ** -0.5`` by default.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks: One extra logit per query head that takes part in the softmax and carries no value, ``[Hq]`` (GPT-OSS).

    Returns:
        ``[B, Hq, S, Dv]``.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1] @ value
    return scores.softmax(dim=-1) @ value
