"""Counts the tokens of a tokenised dataset, with and without sharing, from its Arrow columns.

No trie is built: the distinct tokens of some sequences are those of all of them less, once the sequences are sorted,
what each has in common with the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexdpo.data.draft import IMAGES_COLUMN
from flexdpo.data.images import told_of_images
from flexdpo.data.lengths import copies_of_prompts
from flexdpo.layout.packing import MIN_SHARED

if TYPE_CHECKING:
    from datasets import Dataset

Ints = NDArray[np.int64]

# bounds memory: a batch of rows is held as flat arrays, several times
ROWS_PER_BATCH = 1024


@dataclass(frozen=True, eq=False)
class RowTokens:
    """Sizes of the ``N`` rows of a dataset, ``[N]`` each but for their ``R`` responses."""

    prompts: Ints  # tokens of each prompt
    responses: Ints  # number of responses
    edges: Ints  # number of preferences
    response_tokens: Ints  # tokens of each response, row by row, ``[R]``
    copies: Ints  # times that each row's trie holds its prompt; see :func:`count_rows`
    targets: Ints  # distinct response tokens: a beginning that responses share counts once
    longest: Ints  # tokens of each row's prompt with its longest response
    prompt_keys: NDArray[np.uint64]  # equal for equal prompts only, up to chance of 2**-64
    prefix_keys: NDArray[np.uint64]  # the same for their first 128 tokens; meaningless where ``prompts < 128``
    with_first: Ints  # tokens that each prompt has in common with the first row's

    @property
    def unshared(self) -> Ints:
        """Tokens of each row with its prompt once for each response, ``[N]``."""
        return self.prompts * self.responses + np.add.reduceat(self.response_tokens, _starts(self.responses))

    @property
    def distinct(self) -> Ints:
        """Tokens of each row's trie, ``[N]``."""
        return self.prompts * self.copies + self.targets


def count_rows(dataset: Dataset, rows_per_batch: int = ROWS_PER_BATCH, *, limits: Sequence[int] = ()) -> RowTokens:
    """Count the tokens of every row of a tokenised dataset of at least one, so many held at a time.

    ``limits`` are the model's, as in :func:`flexdpo.pack`: sequences on either side of one share no tokens.
    """
    parts: list[RowTokens] = []
    first: NDArray[np.int32] | None = None
    for batch in batches(dataset, rows_per_batch):
        first = batch.prompt_ids[: batch.prompts[0]] if first is None else first
        rows, starts = np.repeat(np.arange(batch.responses.size), batch.responses), _starts(batch.prompts)
        whole, beginning = _keys(batch.prompt_ids, starts, batch.prompts)
        both, common = np.concatenate((first, batch.prompt_ids)), np.minimum(batch.prompts, first.size)
        part = RowTokens(
            prompts=batch.prompts,
            responses=batch.responses,
            edges=batch.edges,
            response_tokens=batch.response_tokens,
            copies=copies_of_prompts(batch.prompts, batch.response_tokens, batch.responses, limits),
            targets=_distinct_targets(batch, rows, limits),
            longest=batch.prompts + np.maximum.reduceat(batch.response_tokens, _starts(batch.responses)),
            prompt_keys=whole,
            prefix_keys=beginning,
            with_first=common_lengths(both, np.zeros_like(starts), starts + first.size, common),
        )
        parts.append(part)
    return RowTokens(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Some rows as flat arrays: token ids of all prompts and of all responses, one after the other, and their sizes."""

    prompt_ids: NDArray[np.int32]
    prompts: Ints
    response_ids: NDArray[np.int32]
    response_tokens: Ints
    responses: Ints
    edges: Ints


def batches(dataset: Dataset, rows_per_batch: int = ROWS_PER_BATCH) -> Iterator[TokenBatch]:
    """The rows of a tokenised dataset, some at a time."""
    pictured = [IMAGES_COLUMN] if IMAGES_COLUMN in dataset.column_names else []
    columns = dataset.select_columns(["prompt_ids", "response_ids", "edges", *pictured]).with_format("arrow")
    for table in columns.iter(batch_size=rows_per_batch):
        prompts = table.column("prompt_ids").combine_chunks()
        rows = table.column("response_ids").combine_chunks()
        responses = rows.flatten()
        ids = _told_apart(_values(prompts), _lengths(prompts), table) if pictured else _values(prompts)
        edges = _lengths(table.column("edges").combine_chunks())
        yield TokenBatch(ids, _lengths(prompts), _values(responses), _lengths(responses), _lengths(rows), edges)


def _told_apart(ids: NDArray[np.int32], lengths: Ints, table: Any) -> NDArray[np.int32]:
    """Prompts with what stands for its image in place of each image token."""
    ids, start = ids.copy(), 0
    for length, images in zip(lengths.tolist(), told_of_images(table), strict=True):
        for image in images:
            at = start + np.flatnonzero(ids[start : start + length] == image["token_id"])[: image["tokens"]]
            ids[at] = -1 - int(image["digest"][:7], 16)
        start += length
    return ids


def _values(array: Any) -> NDArray[np.int32]:
    # flatten() minds the offsets of a slice, which .values does not
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False), dtype=np.int32)


def _lengths(array: Any) -> Ints:
    return np.asarray(array.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)


def _distinct_targets(batch: TokenBatch, rows: Ints, limits: Sequence[int]) -> Ints:
    """Distinct response tokens of each of some rows, ``[N]``, where ``rows[r]`` says whose response ``r`` is."""
    lengths = batch.response_tokens
    sides = np.searchsorted(np.asarray(limits, dtype=np.int64), np.repeat(batch.prompts, batch.responses) + lengths)
    parts = rows * (len(limits) + 1) + sides
    # responses of a row on the same side stand together, as those that share tokens must
    order = np.argsort(parts, kind="stable")
    kinds, numbers = np.unique(parts[order], return_inverse=True)
    counted = distinct_tokens(batch.response_ids, _starts(lengths)[order], lengths[order], numbers.reshape(-1))
    totals = np.zeros(int(rows.max(initial=-1)) + 1, dtype=np.int64)
    np.add.at(totals, kinds // (len(limits) + 1), counted)
    return totals


def _starts(lengths: Ints) -> Ints:
    return np.concatenate(([0], lengths.cumsum()[:-1])) if lengths.size else lengths


def _keys(ids: NDArray[np.int32], starts: Ints, lengths: Ints) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Digests of each prompt and of its first 128 tokens; equal prefixes of different prompts have equal digests."""
    raw = memoryview(ids.tobytes())
    whole, beginning = bytearray(), bytearray()
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        middle = start + min(length, MIN_SHARED)
        head = blake2b(raw[4 * start : 4 * middle], digest_size=8)
        beginning += head.digest()
        head.update(raw[4 * middle : 4 * (start + length)])
        whole += head.digest()
    return np.frombuffer(bytes(whole), np.uint64), np.frombuffer(bytes(beginning), np.uint64)


def distinct_tokens(ids: NDArray[np.int32], starts: Ints, lengths: Ints, rows: Ints) -> Ints:
    """Count the nodes of the trie of each row's sequences, ``[N]``.

    Sequence ``r`` of ``R`` stands at ``starts[r] : starts[r] + lengths[r]`` of ``ids`` and belongs to row ``rows[r]``,
    0 to ``N - 1``, ascending.
    """
    totals = np.bincount(rows, weights=lengths).astype(np.int64)
    order = _sorted_within_rows(ids, starts, lengths, rows)
    starts, lengths = starts[order], lengths[order]
    # only neighbours of the same row are compared
    second = np.flatnonzero(rows[1:] == rows[:-1]) + 1
    common = common_lengths(ids, starts[second - 1], starts[second], np.minimum(lengths[second - 1], lengths[second]))
    np.subtract.at(totals, rows[second], common)
    return totals


def _sorted_within_rows(ids: NDArray[np.int32], starts: Ints, lengths: Ints, rows: Ints) -> Ints:
    """An order of the sequences in which those of a row are sorted; of two it does not matter which comes first."""
    order, counts = np.arange(rows.size), np.bincount(rows)
    many = np.flatnonzero(counts > 2)
    # big-endian bytes sort as the numbers do
    raw = memoryview(ids.astype(">i4").tobytes() if many.size else b"")

    def key(sequence: int) -> bytes:
        return bytes(raw[4 * int(starts[sequence]) : 4 * int(starts[sequence] + lengths[sequence])])

    for begin, count in zip(np.searchsorted(rows, many).tolist(), counts[many].tolist(), strict=True):
        order[begin : begin + count] = sorted(range(begin, begin + count), key=key)
    return order


def common_lengths(ids: NDArray[np.int32], first: Ints, second: Ints, limit: Ints) -> Ints:
    """How many tokens the sequences of each couple have in common, ``[C]``.

    They begin at ``first`` and ``second`` of ``ids``, ``[C]`` each; ``limit``, ``[C]``, are the shorter one's tokens.
    """
    result = limit.copy()
    alive = np.flatnonzero(limit > 0)
    depth, step = 0, 8
    # couples that differ early are done early; those that agree are looked at in ever longer stretches
    while alive.size:
        span = np.minimum(limit[alive] - depth, step)
        offset = np.arange(int(span.sum())) - np.repeat(_starts(span), span)
        left = ids[np.repeat(first[alive] + depth, span) + offset]
        right = ids[np.repeat(second[alive] + depth, span) + offset]
        agreed = np.minimum.reduceat(np.where(left == right, step, offset), _starts(span))
        differs = agreed < span
        result[alive[differs]] = depth + agreed[differs]
        depth += step
        alive = alive[~differs]
        alive = alive[limit[alive] > depth]
        step *= 4
    return result


def classes_of(keys: NDArray[np.uint64]) -> tuple[Ints, Ints]:
    """Number the distinct keys in order of value; the number of each key, and how often each number occurs."""
    _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return numbers, counts


def regrouped_tokens(
    dataset: Dataset, counted: RowTokens, rows_per_batch: int = ROWS_PER_BATCH, *, limits: Sequence[int] = ()
) -> int:
    """Distinct tokens of a dataset once rows with the same prompt are one group each, without further sharing."""
    numbers, counts = classes_of(counted.prompt_keys)
    repeated = counts[numbers] > 1
    total = int(counted.distinct[~repeated].sum())
    if not repeated.any():
        return total
    members = np.flatnonzero(repeated)
    # rows with the same prompt side by side; one prompt's rows never end up in two parts
    members = members[np.argsort(numbers[members], kind="stable")]
    first_of_prompt = np.searchsorted(numbers[members], numbers[members])
    for part in np.split(members, np.flatnonzero(np.diff(first_of_prompt // rows_per_batch)) + 1):
        held = next(batches(dataset.select(part.tolist()), part.size))
        _, kept, classes = np.unique(numbers[part], return_index=True, return_inverse=True)
        responses = np.bincount(classes.reshape(-1), weights=held.responses).astype(np.int64)
        prompts = held.prompts[kept]
        total += int((prompts * copies_of_prompts(prompts, held.response_tokens, responses, limits)).sum())
        total += int(_distinct_targets(held, np.repeat(classes.reshape(-1), held.responses), limits).sum())
    return total


@dataclass(frozen=True)
class SharedPrefixes:
    """Which rows begin alike for at least 128 tokens, so that training can share more than their own prompts."""

    common_to_all: int  # tokens that all prompts begin with
    classes: int  # distinct beginnings that at least two rows have
    rows: int  # with such a beginning
    largest_rows: int  # with the most frequent one
    largest_tokens: int  # that all of those have in common, 128 or more; 0 where there is none


def shared_prefixes(dataset: Dataset, counted: RowTokens) -> SharedPrefixes:
    """Find beginnings of prompts that several rows have in common."""
    common_to_all = int(counted.with_first.min())
    long_enough = np.flatnonzero(counted.prompts >= MIN_SHARED)
    numbers, counts = classes_of(counted.prefix_keys[long_enough])
    shared = counts > 1
    if not shared.any():
        return SharedPrefixes(common_to_all, 0, 0, 0, 0)
    largest = int(counts.argmax())
    members = long_enough[numbers == largest]
    tokens = int(count_rows(dataset.select(members.tolist())).with_first.min())
    return SharedPrefixes(common_to_all, int(shared.sum()), int(counts[shared].sum()), int(counts[largest]), tokens)
