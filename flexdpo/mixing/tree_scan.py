"""A scan along the trie: each run of tokens begins with the final state of the run that it continues.

The runs of one level of the trie are scanned together, in a few padded batches of similar lengths, and the next level
begins where they end. A kernel that takes no state to begin with runs the path to each leaf instead, and a token that
several runs hold is read from the first.

Shapes: ``B`` rows of ``S`` tokens; ``M`` runs of tokens in a padded batch, ``L`` places each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexdpo.layout.row import on_device
from flexdpo.layout.row_layout import RowLayout
from flexdpo.layout.scan_plan import ScanCost, ScanPlan, path_plan, scan_plan
from flexdpo.layout.segments import Segments
from flexdpo.mixing.gather import Moves, moved

# of inputs ``[M, L, ...]``, states to begin with (``None``: zeros) and whether final ones are wanted
Scan = Callable[[dict[str, "Tensor"], "Tensor | None", bool], "tuple[Tensor, Tensor | None]"]


def tree_scan(scan: Scan, inputs: dict[str, Tensor], plan: TreePlan) -> Tensor:
    """Run ``scan`` level by level.

    Args:
        scan: Runs a padded batch; where all its inputs are 0, it must leave the state as it is.
        inputs: What has one entry per token, ``[B, S, ...]`` each.
        plan: Of the rows.

    Returns:
        ``[B, S, ...]``, 0 at padding.
    """
    batches = plan.batches_of(inputs)
    pieces: list[Tensor] = []
    above: Tensor | None = None
    for level in plan.levels:
        finals = []
        for batch in level:
            begin = None if above is None else above.index_select(0, batch.parents)
            out, final = scan(next(batches), begin, batch.needs_final_state)
            pieces.append(out.flatten(0, 1))
            if batch.needs_final_state:
                assert final is not None
                finals.append(final)
        above = torch.cat(finals) if finals else None
    return plan.in_row_order(pieces)


def path_scan(scan: Scan, inputs: dict[str, Tensor], plan: TreePlan) -> Tensor:
    """:func:`tree_scan` for a kernel that takes no state: the path to each leaf as a whole."""
    return plan.in_row_order([scan(batch, None, False)[0].flatten(0, 1) for batch in plan.batches_of(inputs)])


@dataclass(frozen=True, eq=False)
class PathBatch:
    """Whole paths to leaves, one below the other."""

    tokens: Tensor  # number of the token at each place, at padding that of the path's first, ``[M, L]``
    real: Tensor  # whether a place is none of padding, ``[M, L]`` bool


def path_batches(layout: RowLayout) -> list[PathBatch]:
    """The paths to all leaves in padded batches, for what is run whole."""
    batches = [batch.tokens for batch in plan_of_paths(layout).levels[0]]
    reals = [tokens < layout.position_ids.numel() for tokens in batches]
    # of padding a module makes whatever it makes of a token, and no NaN, as of zeros it might
    return [
        PathBatch(torch.where(real, tokens, tokens[:, :1]), real) for tokens, real in zip(batches, reals, strict=True)
    ]


def in_row_order(pieces: list[Tensor], layout: RowLayout) -> Tensor:
    """Results of :func:`path_batches`, ``[M * L, ...]`` each, as ``[B, S, ...]``; 0 at padding."""
    return plan_of_paths(layout).in_row_order(pieces)


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch of runs on the device; its padding is token ``B * S``."""

    tokens: Tensor  # ``[M, L]``
    parents: Tensor  # where the final states of the level above hold each one's, ``[M]``
    needs_final_state: bool


@dataclass(frozen=True, eq=False)
class TreePlan:
    """What is scanned after what, and where each token's result is in the end."""

    levels: list[list[_Batch]]
    chunk: int  # tokens that the kernel is to compute at once
    rows: tuple[int, int]  # ``(B, S)``
    tokens: Moves  # from the tokens to all places, batch by batch
    places: Moves  # from there to the tokens; of several places of a token, from the first

    def batches_of(self, inputs: dict[str, Tensor]) -> Any:
        """The inputs of each batch, ``[M, L, ...]``, 0 at padding."""
        shapes = [batch.tokens.shape for level in self.levels for batch in level]
        sizes = [shape.numel() for shape in shapes]
        # all at once: a piece would get its gradient as a row full of zeros
        parts = {name: moved(values.flatten(0, 1), self.tokens).split(sizes) for name, values in inputs.items()}
        for number, shape in enumerate(shapes):
            yield {name: pieces[number].unflatten(0, shape) for name, pieces in parts.items()}

    def in_row_order(self, pieces: list[Tensor]) -> Tensor:
        """Results of all batches, ``[M * L, ...]`` each, as ``[B, S, ...]``; 0 at padding."""
        ordered: Tensor = moved(torch.cat(pieces), self.places).unflatten(0, self.rows)
        return ordered


def plan_of_levels(layout: RowLayout, costs: Sequence[ScanCost]) -> TreePlan:
    """The plan for a kernel that takes a state, of what it costs with chunks of each length."""
    return _memoised(layout, ("levels", *costs), lambda segments: scan_plan(segments, costs))


def plan_of_paths(layout: RowLayout, cost: ScanCost = ScanCost()) -> TreePlan:  # noqa: B008
    """The plan for what takes no state."""
    return _memoised(layout, ("paths", cost), lambda segments: path_plan(segments, cost))


def _memoised(layout: RowLayout, key: Any, plan: Callable[[Segments], ScanPlan]) -> TreePlan:
    memo = ("scan", key)
    if memo not in layout.memo:
        segments = Segments.of(layout)
        # what is made in inference mode could not be used in training
        with torch.inference_mode(False):
            layout.memo[memo] = _made(plan(segments), layout)
    found: TreePlan = layout.memo[memo]
    return found


def _made(plan: ScanPlan, layout: RowLayout) -> TreePlan:
    def on(values: Any) -> Tensor:
        return on_device(values, torch.int64, layout.device)

    places = layout.position_ids.numel()
    above = np.zeros_like(plan.parents)
    levels: list[list[_Batch]] = []
    for level in plan.levels:
        batches = []
        for bucket in level:
            parents = above[plan.parents[bucket.members]] if levels else np.zeros_like(bucket.members)
            tokens = np.where(bucket.tokens < 0, places, bucket.tokens)
            batches.append(_Batch(on(tokens), on(parents), bucket.needs_final_state))
        ending = [bucket.members for bucket in level if bucket.needs_final_state]
        if ending:
            members = np.concatenate(ending)
            above[members] = np.arange(members.size)
        levels.append(batches)
    tokens = np.concatenate([bucket.tokens.reshape(-1) for level in plan.levels for bucket in level])
    there, back = Moves.both_ways(tokens, places, on)
    return TreePlan(levels, plan.chunk, (layout.batch_size, layout.length), there, back)
