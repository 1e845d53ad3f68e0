"""Rows that are token ids already: our own columns and TRL's, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flexdpo.data.draft import EMPTY_RESPONSE
from flexdpo.errors import FlexdpoError, found

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexdpo.data.draft import Draft


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
    responses, edges = (_as_lists(values[column]) or [] for column in ("response_ids", "edges"))
    for column, value in (("response_ids", responses), ("edges", edges)):
        if not isinstance(value, list):
            raise FlexdpoError(f"{draft.place}, column {column!r}: expected a list of lists, found {found(value)}")
    draft.response_ids = [_token_ids(ids, draft.place, "response_ids", largest_id) for ids in responses]
    if not responses:
        draft.skip = EMPTY_RESPONSE
        return
    for edge in edges:
        known = isinstance(edge, list) and len(edge) == 2 and all(_is_index(end, len(responses)) for end in edge)
        if not known or edge[0] == edge[1]:
            raise FlexdpoError(
                f"{draft.place}, column 'edges': {edge} must name two different responses among 0 to "
                f"{len(responses) - 1}"
            )
    draft.edges = edges


def _as_lists(value: Any) -> Any:
    """Arrays, of which a stream may be made, as lists."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _is_index(value: object, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size


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
