"""Rows that are token ids already: our own columns and TRL's, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from flexdpo.data.draft import EMPTY_RESPONSE, Draft, column_types
from flexdpo.errors import FlexdpoError, found

if TYPE_CHECKING:
    from datasets import Dataset


def read_pair_ids(draft: Draft, values: Mapping[str, Any], largest_id: int | None) -> None:
    """The columns of TRL's trainer, as it prepares them."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    draft.prompt_ids, *draft.response_ids = (_token_ids(values[c], draft.place, c, largest_id) for c in columns)
    draft.edges = [[0, 1]]


def read_own_ids(draft: Draft, values: Mapping[str, Any], largest_id: int | None) -> None:
    """What ``tokenize_preferences`` writes; such rows keep the numbers of their source."""
    own = values.get("row")
    if isinstance(own, int) and 0 <= own < 2**63:
        draft.row = own
    draft.prompt_ids = _token_ids(values["prompt_ids"], draft.place, "prompt_ids", largest_id)
    # a stream may be made of arrays
    held = (values["response_ids"], values["edges"])
    responses, edges = ((v.tolist() if isinstance(v, np.ndarray) else v) or [] for v in held)
    for column, value in (("response_ids", responses), ("edges", edges)):
        if not isinstance(value, list):
            raise FlexdpoError(f"{draft.place}, column {column!r}: expected a list of lists, found {found(value)}")
    draft.response_ids = [_token_ids(ids, draft.place, "response_ids", largest_id) for ids in responses]
    if not responses:
        draft.skip = EMPTY_RESPONSE
        return
    for edge in edges:
        ends = edge if isinstance(edge, list) and len(edge) == 2 else [None]
        if not all(type(end) is int and 0 <= end < len(responses) for end in ends) or edge[0] == edge[1]:
            raise FlexdpoError(
                f"{draft.place}, column 'edges': {edge} must name two different responses among 0 to "
                f"{len(responses) - 1}"
            )
    draft.edges = edges


def _token_ids(value: Any, place: str, column: str, largest_id: int | None) -> list[int]:
    """Check a list of token ids; ``None`` is an empty one."""
    if value is None:
        return []
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of unequal length inside
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise FlexdpoError(f"{place}, column {column!r}: expected a list of token ids, found {found(value)}")
    if ids.size and not 0 <= ids.min() <= ids.max() <= (largest_id or 0):
        raise FlexdpoError(
            f"{place}, column {column!r}: token ids reach from {ids.min()} to {ids.max()}, the tokenizer's from 0 to "
            f"{largest_id}; was the dataset tokenised with another tokenizer?"
        )
    return value if isinstance(value, list) else cast("list[int]", ids.tolist())


# --- datasets that need nothing done ---------------------------------------------------------------------------------


class _Lists(NamedTuple):
    """Lists of lists of numbers: how many each row has, how long each of them is, where it begins, and the numbers."""

    number: NDArray[np.int64]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    values: NDArray[np.int64]

    @classmethod
    def of(cls, column: Any) -> _Lists:
        outer = column.combine_chunks()
        inner = outer.flatten()
        lengths = inner.value_lengths().to_numpy(zero_copy_only=False)
        values = inner.flatten().to_numpy(zero_copy_only=False)
        return cls(outer.value_lengths().to_numpy(zero_copy_only=False), lengths, lengths.cumsum() - lengths, values)


def longest_if_usable(dataset: Dataset, max_length: int | None, largest_id: int) -> int | None:
    """Look at the Arrow columns of a tokenised dataset; nothing is copied.

    Returns:
        Tokens of the longest prompt with one response behind it, or ``None`` where a row has to be looked at for what
        is wrong with it, cut or left out.
    """
    wanted = column_types({})
    if any(dataset.features.get(column) != kind for column, kind in wanted.items()):
        return None
    longest = 0
    for table in dataset.select_columns(list(wanted)).with_format("arrow").iter(batch_size=8192):
        found = _longest_of_usable(table, largest_id)
        if found is None or (max_length is not None and found > max_length):
            return None
        longest = max(longest, found)
    return longest


def _longest_of_usable(table: Any, largest_id: int) -> int | None:
    columns = [table.column(name).combine_chunks() for name in ("prompt_ids", "response_ids", "edges")]
    nested = [*columns, *(column.flatten() for column in columns), *(c.flatten().flatten() for c in columns[1:])]
    rows = table.column("row").combine_chunks()
    if any(part.null_count for part in (rows, *nested)) or not len(rows):
        return None
    prompts = columns[0].value_lengths().to_numpy(zero_copy_only=False)
    responses, edges = _Lists.of(table.column("response_ids")), _Lists.of(table.column("edges"))
    tokens = np.concatenate([columns[0].flatten().to_numpy(zero_copy_only=False), responses.values])
    sizes = (prompts, responses.number, responses.lengths)
    if any(size.min(initial=1) < 1 for size in sizes) or (edges.lengths != 2).any():
        return None
    if rows.to_numpy().min() < 0 or tokens.min() < 0 or tokens.max() > largest_id:
        return None
    # the responses that edges compare, counted over all rows
    ends = edges.values.reshape(-1, 2)
    row_of_edge = np.repeat(np.arange(len(prompts)), edges.number)
    if (ends < 0).any() or (ends >= responses.number[row_of_edge, None]).any() or (ends[:, 0] == ends[:, 1]).any():
        return None
    first, second = (ends + (responses.number.cumsum() - responses.number)[row_of_edge, None]).T
    for a, b in zip(
        *((end[responses.lengths[first] == responses.lengths[second]]) for end in (first, second)), strict=True
    ):
        one, other = responses.starts[a], responses.starts[b]
        size = responses.lengths[a]
        if np.array_equal(responses.values[one : one + size], responses.values[other : other + size]):
            return None
    row_of_response = np.repeat(np.arange(len(prompts)), responses.number)
    return int((prompts[row_of_response] + responses.lengths).max())
