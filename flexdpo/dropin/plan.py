"""Finds the packed row that stands for a padded batch, or the reason why there is none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexdpo.dropin.batch_trie import row_spans, sequence_places, sort_batch, trie_of
from flexdpo.dropin.gather import SharedBatch
from flexdpo.dropin.images import BatchImages
from flexdpo.dropin.rules import Positions

# every sequence is compared with every other; more are mostly padding, each token of which is a sequence
_MOST_SEQUENCES = 1024


class PlanKey(NamedTuple):
    """What a plan follows from, besides the batch."""

    min_gain: float
    min_prefix: int
    positions: Positions
    multiple: int
    packed: bool = False  # whether rows may hold sequences one behind the other, which their positions tell apart
    lone_rows: bool = False  # whether it does so in a batch of one row only


def plan_batch(
    input_ids: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    plan_key: PlanKey,
    images: BatchImages | None = None,
) -> SharedBatch | str:
    """Find the trie of a batch of ``N`` rows with ``T`` places each and lay it out as one row.

    ``mask``, ``[N, T]``, is nonzero at real tokens; without it all are real. ``position_ids``, ``[N, T]`` or
    ``[1, T]``, are those of the caller, who need not give any.

    Returns the row, or the reason why the batch is not shared, one of :data:`flexdpo.dropin.rules.REASONS`.
    """
    rows, columns = input_ids.shape
    if position_ids is not None:
        position_ids = position_ids.expand(rows, columns).contiguous()
    elif plan_key.positions.behind_padding == "columns":
        position_ids = torch.arange(columns, device=input_ids.device).expand(rows, columns).contiguous()
    places = sequence_places(position_ids) if plan_key.packed and position_ids is not None else None
    if places is not None and len(places) > rows:
        # FlashAttention keeps those of a lone row apart
        told = plan_key.positions.sequences == "apart" and (rows == 1 or not plan_key.lone_rows)
        if not told or len(places) > _MOST_SEQUENCES:
            return "position_ids"
    keys = input_ids if images is None else images.keys
    keys = keys if position_ids is None else keys.long() | position_ids.long() << 32
    if places is not None:
        keys, mask = keys.reshape(-1)[places.clamp(min=0)], places >= 0
    spans = row_spans(torch.ones_like(input_ids) if mask is None else mask)
    batch = sort_batch(keys, spans, min_prefix=plan_key.min_prefix)
    last = input_ids.new_tensor(columns - 1) if position_ids is None else position_ids.max()
    facts = torch.stack([batch.num_tokens, spans.starts.max(), spans.gaps.long(), last])
    # the one time that the device is waited for
    tokens, latest_start, gaps, last_position = facts.tolist()
    reason = _reason_by_facts(plan_key, (rows * columns, tokens, latest_start, gaps, last_position + 1))
    if reason is not None:
        return reason
    trie = trie_of(batch, tokens)
    if places is not None:
        trie = trie.elsewhere(places, (rows, columns))
    if images is not None and not images.same_along(trie):
        return "position_ids"
    return SharedBatch.of(
        input_ids,
        trie,
        position_ids=position_ids,
        reach=last_position + 1,
        pad_to_multiple_of=plan_key.multiple,
        images=images,
    )


def _reason_by_facts(plan_key: PlanKey, facts: tuple[int, int, int, int, int]) -> str | None:
    places, tokens, latest_start, gaps, reach = facts
    positions = plan_key.positions
    if gaps:
        return "gaps"
    if latest_start and not positions.relative and positions.behind_padding == "unknown":
        return "left_padding"
    if positions.limits.open_end is not None and reach > positions.limits.open_end:
        return "rope_scaling"
    length = -(-tokens // plan_key.multiple) * plan_key.multiple
    return "little_gain" if tokens == 0 or places < plan_key.min_gain * length else None
