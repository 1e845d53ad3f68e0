"""A scan along the trie: each segment begins with the final state of the segment that it continues.

The segments of one level of the trie run together, in a few padded batches of similar lengths, and the next level
begins where they end: no token is run twice. A kernel that takes no state to begin with runs the path to each leaf
instead, and a token that several paths hold is read from the first.

Shapes: ``B`` rows of ``S`` tokens; ``M`` runs of tokens in a padded batch, ``L`` places each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexdpo.layout.row import on_device
from flexdpo.layout.segments import Segments

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.layout.row_layout import RowLayout
    from flexdpo.layout.segments import Bucket

# of inputs ``[M, L, ...]``, states to begin with (``None``: zeros) and whether final ones are wanted
Scan = Callable[[dict[str, "Tensor"], "Tensor | None", bool], "tuple[Tensor, Tensor | None]"]


def tree_scan(scan: Scan, inputs: dict[str, Tensor], layout: RowLayout) -> Tensor:
    """Run ``scan`` level by level.

    Args:
        scan: Runs a padded batch; where all its inputs are 0, it must leave the state as it is.
        inputs: What has one entry per token, ``[B, S, ...]`` each.
        layout: Of the rows.

    Returns:
        ``[B, S, ...]``, 0 at padding.
    """
    plan = _plan(layout, "levels")
    known = {name: _with_zeros(values) for name, values in inputs.items()}
    pieces: list[Tensor] = []
    above: Tensor | None = None
    for level in plan.levels:
        finals = []
        for batch in level:
            begin = None if above is None else above[batch.parents]
            out, final = scan({n: v[batch.tokens] for n, v in known.items()}, begin, batch.needs_final_state)
            pieces.append(out.flatten(0, 1))
            if batch.needs_final_state:
                assert final is not None
                finals.append(final)
        above = torch.cat(finals) if finals else None
    return _in_row_order(pieces, plan, layout)


def path_scan(scan: Scan, inputs: dict[str, Tensor], layout: RowLayout) -> Tensor:
    """:func:`tree_scan` for a kernel that takes no state: the path to each leaf as a whole."""
    plan = _plan(layout, "paths")
    known = {name: _with_zeros(values) for name, values in inputs.items()}
    pieces = []
    for batch in plan.levels[0]:
        # the gradients of copies are added up in float32
        copies = {n: v.to(torch.promote_types(v.dtype, torch.float32))[batch.tokens].to(v) for n, v in known.items()}
        out, _ = scan(copies, None, False)
        pieces.append(out.flatten(0, 1))
    return _in_row_order(pieces, plan, layout)


@dataclass(frozen=True, eq=False)
class PathBatch:
    """Whole paths to leaves, one below the other."""

    tokens: Tensor  # number of the token at each place, at padding that of the path's first, ``[M, L]``
    real: Tensor  # whether a place is none of padding, ``[M, L]`` bool


def path_batches(layout: RowLayout) -> list[PathBatch]:
    """The paths to all leaves in padded batches, for what is run whole."""
    batches = [batch.tokens for batch in _plan(layout, "paths").levels[0]]
    reals = [tokens < layout.position_ids.numel() for tokens in batches]
    # of padding a module makes whatever it makes of a token, and no NaN, as of zeros it might
    return [
        PathBatch(torch.where(real, tokens, tokens[:, :1]), real) for tokens, real in zip(batches, reals, strict=True)
    ]


def in_row_order(pieces: list[Tensor], layout: RowLayout) -> Tensor:
    """Results of :func:`path_batches`, ``[M * L, ...]`` each, as ``[B, S, ...]``; 0 at padding."""
    return _in_row_order(pieces, _plan(layout, "paths"), layout)


def _with_zeros(values: Tensor) -> Tensor:
    """All tokens ``[B * S + 1, ...]``, with one more that padding is made of."""
    tokens = values.flatten(0, 1)
    return torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])


def _in_row_order(pieces: list[Tensor], plan: _Plan, layout: RowLayout) -> Tensor:
    found = torch.cat([*pieces, pieces[0].new_zeros(1, *pieces[0].shape[1:])])
    ordered: Tensor = found[plan.places].unflatten(0, (layout.batch_size, layout.length))
    return ordered


@dataclass(frozen=True, eq=False)
class _Batch:
    """A bucket on the device; its padding is token ``B * S``."""

    tokens: Tensor  # ``[M, L]``
    parents: Tensor  # where the final states of the level above hold each one's, ``[M]``
    needs_final_state: bool


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is scanned after what, and where each token's result is in the end."""

    levels: list[list[_Batch]]
    places: Tensor  # place of each token among all batches, one after the other; the last one more at padding


def _plan(layout: RowLayout, kind: str) -> _Plan:
    memo = ("scan", kind)
    if memo not in layout.memo:
        segments = Segments.of(layout)
        levels = segments.scan_plan() if kind == "levels" else [segments.path_plan()]
        # what is made in inference mode could not be used in training
        with torch.inference_mode(False):
            layout.memo[memo] = _made(levels, segments, layout.device)
    found: _Plan = layout.memo[memo]
    return found


def _made(levels: list[list[Bucket]], segments: Segments, device: torch.device) -> _Plan:
    def moved(values: Any) -> Tensor:
        return on_device(values, torch.int64, device)

    above = np.zeros(len(segments), dtype=np.int64)
    made: list[list[_Batch]] = []
    for level in levels:
        batches = []
        for bucket in level:
            parents = above[segments.parents[bucket.members]] if made else np.zeros_like(bucket.members)
            tokens = np.where(bucket.tokens < 0, segments.places, bucket.tokens)
            batches.append(_Batch(moved(tokens), moved(parents), bucket.needs_final_state))
        ending = [bucket.members for bucket in level if bucket.needs_final_state]
        if ending:
            members = np.concatenate(ending)
            above[members] = np.arange(members.size)
        made.append(batches)
    order = np.concatenate([bucket.tokens.reshape(-1) for level in levels for bucket in level])
    places = np.full(segments.places, order.size, dtype=np.int64)
    # backwards, so that the first of several places stays
    real = np.flatnonzero(order >= 0)[::-1]
    places[order[real]] = real
    return _Plan(made, moved(places))
