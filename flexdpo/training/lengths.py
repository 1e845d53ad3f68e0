"""How long the examples of a tokenised dataset are, read from its Arrow columns without touching a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.errors import FlexdpoError
from flexdpo.layout.trie import Trie
from flexdpo.training.data import group_from_row

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


def token_counts(dataset: Dataset, *, shared: bool) -> NDArray[np.int64]:
    """Tokens of each example, ``[N]`` int64.

    Args:
        dataset: A tokenised dataset.
        shared: Count the prompt once (at most what a trie of the example holds), or once for each response.
    """
    counts = []
    for table in dataset.with_format("arrow").iter(batch_size=8192):
        prompts = _lengths(table.column("prompt_ids"))
        responses = table.column("response_ids").combine_chunks()
        number = _lengths(responses)
        tokens = _lengths(responses.flatten())
        first = np.concatenate([[0], number.cumsum()])
        running = np.concatenate([[0], tokens.cumsum()])
        counts.append(prompts * (1 if shared else number) + running[first[1:]] - running[first[:-1]])
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


def predicted_costs(dataset: Dataset, hidden_size: int) -> NDArray[np.float64]:
    """What each example costs to run, in units of a short example's token, ``[N]`` float64.

    The linear layers of a decoder take about ``24 * hidden_size**2`` operations per token forward, and attention
    ``2 * hidden_size`` for each token before it, half of them on average.
    """
    tokens = token_counts(dataset, shared=True).astype(np.float64)
    return tokens * (1 + tokens / (12 * hidden_size))


def has_one_pair_each(dataset: Dataset) -> bool:
    """Whether every example of a tokenised dataset holds exactly one preference."""
    tables = dataset.with_format("arrow").iter(batch_size=8192)
    return all((_lengths(table.column("edges")) == 1).all() for table in tables)


def _lengths(column: Any) -> NDArray[np.int64]:
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return np.asarray(array.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)


def require_room(dataset: Dataset, max_tokens_per_row: int, pad_to_multiple_of: int) -> None:
    """Refuse a dataset with an example that fits no row, before anything is trained on it.

    Raises:
        FlexdpoError: naming the first such example, its size and the room.
    """
    room = max_tokens_per_row // pad_to_multiple_of * pad_to_multiple_of
    # responses may share their beginnings, so only the tries of the suspects are counted
    for index in np.flatnonzero(token_counts(dataset, shared=True) > room):
        group = group_from_row(dataset[int(index)])
        size = len(Trie.from_sequences(group.sequences))
        if size > room:
            raise FlexdpoError(
                f"{group.name} has {size} distinct tokens but max_tokens_per_row={max_tokens_per_row} leaves room for "
                f"{room}; raise max_tokens_per_row or lower max_length"
            )
