"""Reference log-probabilities computed once for a whole dataset, before training.

Equal responses are computed once, and sequences that begin alike share a trie across examples. ``plan.safetensors`` in
the cache's folder remembers what shares a row, so that a run that is continued computes the very same rows.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import MIN_SHARED, best_fit_decreasing
from flexdpo.layout.row import Row, idle_row
from flexdpo.reference.cache import Key, ReferenceCache, read, response_key, write

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from flexdpo.layout.groups import PromptImage
    from flexdpo.objective.logps import ResponseLogps

_PACKED_TOGETHER = 2048  # clusters at a time, since packing compares each with every open row


@dataclass(frozen=True, eq=False)
class _Item:
    """A sequence whose last ``tail`` tokens, a response, are wanted."""

    key: Key
    sequence: NDArray[np.uint32]
    tail: int
    name: str
    wanted: dict[int, Key]  # how much of the response, from its beginning on: all, and under LD-DPO less too
    images: tuple[PromptImage, ...] = ()
    image_token_id: int = -1

    @property
    def pictured(self) -> tuple[str, ...]:
        """What its images are; sequences with others share nothing, since equal tokens are not the same there."""
        return tuple(image.digest for image in self.images)

    @property
    def fewest(self) -> int:
        """Tokens that it must share with a relative: all its images."""
        return int(np.flatnonzero(self.sequence == self.image_token_id)[-1]) + 1 if self.images else 0


_PlannedRow = list[list[_Item]]  # its clusters


def _wanted(groups: Iterable[Group], with_beginnings: bool) -> dict[Key, _Item]:
    """Every distinct response of the groups once, in a reproducible order."""
    items: dict[Key, _Item] = {}
    for group in groups:
        pictured = (group.images, group.image_token_id)
        keys = [response_key(group.prompt_ids, response, group.images) for response in group.response_ids]
        for key, response in zip(keys, group.response_ids, strict=True):
            sequence = np.concatenate([group.prompt_ids, response]).astype(np.uint32)
            wanted = {response.size: key}
            items.setdefault(key, _Item(key, sequence, response.size, group.name, wanted, *pictured))
        for edge in group.edges if with_beginnings else ():
            shared = min(group.response_ids[end].size for end in edge)
            for end in edge:
                part = response_key(group.prompt_ids, group.response_ids[end][:shared], group.images)
                items[keys[end]].wanted[shared] = part
    return items


def _common(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    """Length of the common beginning of two sequences."""
    length = min(a.size, b.size)
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _clusters(items: Sequence[_Item], settings: PrecomputeSettings) -> list[tuple[int, list[_Item]]]:
    """Sorted sequences that share a prompt or ``min_shared`` tokens and fit a row, and how many tokens are distinct."""

    def side(item: _Item) -> int:
        return bisect_left(settings.limits, item.sequence.size)

    clusters: list[tuple[int, list[_Item]]] = []
    # big-endian bytes sort like the tokens themselves
    for item in sorted(
        items, key=lambda item: (side(item), item.pictured, item.sequence.astype(">u4").tobytes(), item.tail)
    ):
        length = item.sequence.size
        if length > settings.budget:
            raise FlexdpoError(
                f"{item.name} has a sequence of {length} tokens but rows have room for {settings.budget}; raise "
                "max_tokens_per_row or lower max_length"
            )
        if clusters:
            size, members = clusters[-1]
            previous = members[-1]
            shared = _common(previous.sequence, item.sequence)
            same_prompt = shared >= length - item.tail and previous.sequence.size - previous.tail == length - item.tail
            related = (same_prompt or shared >= settings.min_shared) and side(previous) == side(item)
            related = related and previous.pictured == item.pictured and shared >= item.fewest
            # in sorted order a sequence adds to the trie what its predecessor does not begin with
            size += length - shared
            if related and size <= settings.budget:
                members.append(item)
                clusters[-1] = size, members
                continue
        clusters.append((length, [item]))
    return clusters


def _save_plan(path: Path, rows: Sequence[_PlannedRow]) -> None:
    placed = [
        (*item.key, row, cluster)
        for row, clusters in enumerate(rows)
        for cluster, items in enumerate(clusters)
        for item in items
    ]
    table = np.array(placed, dtype=np.int64)
    write(path, {"keys": table[:, :2].copy(), "rows": table[:, 2].copy(), "clusters": table[:, 3].copy()})


def _load_plan(path: Path, wanted: dict[Key, _Item], missing: set[Key]) -> list[_PlannedRow] | None:
    """The plan of an interrupted run, if it covers what is missing and asks for nothing else; ``None`` otherwise."""
    if not path.exists():
        return None
    tensors = read(path, "keys", "rows", "clusters")
    keys: list[Key] = [(first, second) for first, second in tensors["keys"].tolist()]
    if not missing <= set(keys):
        return None
    places = zip(tensors["rows"].tolist(), tensors["clusters"].tolist(), keys, strict=True)
    rows: list[_PlannedRow] = []
    for _, in_row in groupby(places, key=lambda place: place[0]):
        clusters = [[key for *_, key in members] for _, members in groupby(in_row, key=lambda place: place[1])]
        if all(missing.isdisjoint(cluster) for cluster in clusters):
            rows.append([])  # it is done; the others keep their numbers, and with them the process that runs them
        elif all(key in wanted for cluster in clusters for key in cluster):
            rows.append([[wanted[key] for key in cluster] for cluster in clusters])
        else:
            return None
    return rows


@dataclass(frozen=True)
class PrecomputeReport:
    """What precomputing did in this process."""

    responses: int  # distinct ones of the groups
    found: int  # of these, how many the cache held already
    rows_run: int
    tokens_run: int  # distinct tokens in them, padding not counted
    tokens_unshared: int  # tokens that an ordinary run would take for the same responses, each behind its own prompt


@dataclass(frozen=True, kw_only=True)
class PrecomputeSettings:
    """How the reference of a dataset is laid out in rows, where it runs, and who runs it."""

    max_tokens_per_row: int | None = None  # longest row, padding included
    clusters_per_row: int = 8  # sets of related sequences in a row, where there is no token budget
    pad_to_multiple_of: int = 1  # tokens
    min_shared: int = MIN_SHARED  # tokens that sequences with different prompts must share to be brought together
    with_beginnings: bool = False  # also what LD-DPO needs: the beginning of each pair's longer response
    limits: Sequence[int] = ()  # as in :func:`flexdpo.pack`
    device: torch.device | str = "cpu"
    process_index: int = 0
    num_processes: int = 1
    equal_forwards: bool = False  # run as many forwards in every process, as sharded models need
    save_every_s: float = 30.0
    progress: bool = True
    description: str = "Reference log-probabilities"

    @property
    def budget(self) -> int:
        """Most real tokens of a row."""
        most = sys.maxsize if self.max_tokens_per_row is None else self.max_tokens_per_row
        return most // self.pad_to_multiple_of * self.pad_to_multiple_of


def precompute_reference(
    cache: ReferenceCache,
    groups: Iterable[Group],
    run: Callable[[Row], ResponseLogps],
    settings: PrecomputeSettings = PrecomputeSettings(),
) -> PrecomputeReport:
    """Fill a cache with the reference log-probability of every response of a dataset, continuing where it stopped.

    ``run`` gives those of a row and is called without gradients. Several processes open the cache and wait for each
    other, call this with the same groups, wait again and reload. What fits no row or is not finite is an error.
    """
    wanted = _wanted(groups, settings.with_beginnings)
    missing = {key for key, item in wanted.items() if any(part not in cache.values for part in item.wanted.values())}
    path = cache.folder / "plan.safetensors"
    rows = _load_plan(path, wanted, missing)
    if rows is None:
        clusters, rows = _clusters([wanted[key] for key in wanted if key in missing], settings), []
        at_once = settings.clusters_per_row if settings.max_tokens_per_row is None else _PACKED_TOGETHER
        for start in range(0, len(clusters), at_once):
            part = clusters[start : start + at_once]
            bins = best_fit_decreasing([size for size, _ in part], settings.budget)
            rows += [[part[i][1] for i in members] for members in bins]
        if settings.process_index == 0 and rows:
            _save_plan(path, rows)
    shares = [[row for row in rows[i :: settings.num_processes] if row] for i in range(settings.num_processes)]
    mine = shares[settings.process_index]
    idle = max(map(len, shares)) - len(mine) if settings.equal_forwards else 0
    pending: dict[Key, float] = {}
    tokens, unshared, saved = 0, 0, time.monotonic()
    total = sum(len(cluster) for planned in mine for cluster in planned)
    disabled = not settings.progress
    with tqdm(total=total, desc=settings.description, unit="response", disable=disabled) as bar, torch.no_grad():
        try:
            for planned in mine:
                items = [item for cluster in planned for item in cluster]
                row = _row_of(planned, settings.pad_to_multiple_of)
                values = _values(items, row, run(row.to(settings.device)))
                # what an interrupted run has written stays as it is
                pending.update({key: value for key, value in values.items() if key not in cache.values})
                if time.monotonic() - saved >= settings.save_every_s:
                    cache.add(pending, settings.process_index)
                    pending, saved = {}, time.monotonic()
                tokens += row.num_tokens
                unshared += sum(item.sequence.size for item in items)
                bar.update(len(items))
            for _ in range(idle):
                # sharded weights are gathered by all processes, so one without work runs as often as the others
                run(idle_row().to(settings.device))
        finally:
            cache.add(pending, settings.process_index)
    return PrecomputeReport(len(wanted), len(wanted) - len(missing), len(mine), tokens, unshared)


def _row_of(clusters: _PlannedRow, pad_to_multiple_of: int) -> Row:
    """One row of several clusters; its targets are the tokens wanted, and nothing of the prompts."""
    groups = []
    for cluster in clusters:
        first = cluster[0]
        # what all of them begin with is the prompt; in sorted order, what the first and the last share all do
        shared = min(
            _common(first.sequence, cluster[-1].sequence), *(item.sequence.size - item.tail for item in cluster)
        )
        responses = tuple(item.sequence[shared:].astype(np.int64) for item in cluster)
        images: dict[str, Any] = {"images": first.images, "image_token_id": first.image_token_id}
        groups.append(Group(first.sequence[:shared].astype(np.int64), responses, name=first.name, **images))
    row = Row.from_groups(groups, pad_to_multiple_of=pad_to_multiple_of)
    tails = torch.tensor([item.tail for cluster in clusters for item in cluster], device="cpu")
    ends = torch.bincount(row.member_responses, minlength=row.num_responses).cumsum(0)
    wanted = torch.arange(len(row.member_responses), device="cpu") >= (ends - tails)[row.member_responses]
    targets, members = row.member_targets[wanted].unique(return_inverse=True)
    kept: dict[str, Any] = {"predictors": row.predictors[targets], "labels": row.labels[targets]}
    return replace(row, member_targets=members, member_responses=row.member_responses[wanted], **kept)


def _values(items: Sequence[_Item], row: Row, logps: ResponseLogps) -> dict[Key, float]:
    """The sum over every wanted response and beginning of a row, summed in float64."""
    targets = logps.targets.detach().double().cpu().numpy()[row.member_targets.numpy()]
    values: dict[Key, float] = {}
    ends = np.cumsum([item.tail for item in items])
    for item, own in zip(items, np.split(targets, ends[:-1]), strict=True):
        running = own.cumsum()
        if not np.isfinite(running[-1]):
            raise FlexdpoError(
                f"{item.name}: the log-probability of a response under the reference is {running[-1]}; the reference "
                "model is damaged, or its precision too low"
            )
        values |= {key: float(running[length - 1]) for length, key in item.wanted.items()}
    return values
