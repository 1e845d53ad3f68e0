"""A causal convolution along the trie: every token sees its own ancestors, whatever stands before it in the row."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexdpo.layout.row import on_device
from flexdpo.layout.row_layout import RowLayout
from flexdpo.layout.segments import Segments


def tree_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, layout: RowLayout) -> Tensor:
    """Convolve every channel with a kernel of its own, over each token and its nearest ancestors.

    Shapes: ``B`` rows, ``C`` channels, ``S`` tokens, ``K`` taps.

    Args:
        x: ``[B, C, S]``, any float dtype.
        weight: ``[C, K]``; the last tap is for the token itself.
        bias: ``[C]``.
        layout: Of the rows.

    Returns:
        ``[B, C, S]`` in the dtype of ``x``; sums are taken in float32 at least.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    tokens = rearrange(x.to(wide), "b c s -> (b s) c")
    out: Tensor = _TreeConv.apply(tokens, weight.to(wide), _ancestors(layout, weight.shape[-1] - 1))
    if bias is not None:
        out = out + bias
    return rearrange(out, "(b s) c -> b c s", b=layout.batch_size).to(x.dtype)


def _ancestors(layout: RowLayout, count: int) -> Tensor:
    """The nearest ancestors of each token, ``[count, B * S]``; ``B * S`` where there are no more."""
    memo = ("ancestors", count)
    if memo not in layout.memo:
        segments = Segments.of(layout)
        found = segments.ancestors(count)
        found[found < 0] = segments.places
        # what is made in inference mode could not be used in training
        with torch.inference_mode(False):
            layout.memo[memo] = on_device(found, torch.int64, layout.device)
    ancestors: Tensor = layout.memo[memo]
    return ancestors


class _TreeConv(torch.autograd.Function):
    """Keeps what it was given and gathers anew in the backward pass, instead of keeping one copy for each tap.

    Shapes: ``T`` tokens, ``C`` channels, ``K`` taps.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, ancestors: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight, ancestors)
        # before the first token of a sequence there are zeros
        known = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
        out = tokens * weight[:, -1]
        for taps, above in zip(weight.T[:-1].flip(0), ancestors, strict=True):
            out += known[above] * taps
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        tokens, weight, ancestors = ctx.saved_tensors
        known = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
        into = torch.zeros_like(known)
        into[:-1] = gradient * weight[:, -1]
        of_taps = [(gradient * tokens).sum(0)]
        for taps, above in zip(weight.T[:-1].flip(0), ancestors, strict=True):
            into.index_add_(0, above, gradient * taps)
            of_taps.append((gradient * known[above]).sum(0))
        return into[:-1], torch.stack(of_taps[::-1], dim=1), None
