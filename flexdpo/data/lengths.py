"""How long the examples of a tokenised dataset are, read from its Arrow columns without touching a token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from flexdpo.config import DPOConfig
from flexdpo.data.draft import LABELS_COLUMN
from flexdpo.data.tokenize import group_from_row
from flexdpo.errors import FlexdpoError
from flexdpo.layout.packing import pack
from flexdpo.layout.trie import Trie


def token_counts(dataset: Dataset, *, shared: bool, limits: Sequence[int] = ()) -> NDArray[np.int64]:
    """Tokens of each example of a tokenised dataset, ``[N]`` int64, with its prompt once for each response.

    With ``shared`` it counts once, at most what a trie holds, or on each side of ``limits`` (see :func:`flexdpo.pack`).
    """
    counts = [np.zeros(0, dtype=np.int64)]
    for table in _tables(dataset):
        prompts, responses = _lengths(table.column("prompt_ids")), table.column("response_ids").combine_chunks()
        number, tokens = _lengths(responses), _lengths(responses.flatten())
        running = np.concatenate([[0], tokens.cumsum()])[np.concatenate([[0], number.cumsum()])]
        copies = copies_of_prompts(prompts, tokens, number, limits) if shared else number
        counts.append(prompts * copies + np.diff(running))
    return np.concatenate(counts)


def copies_of_prompts(
    prompts: NDArray[np.int64], response_tokens: NDArray[np.int64], responses: NDArray[np.int64], limits: Sequence[int]
) -> NDArray[np.int64]:
    """How many times the trie of each example holds its prompt: once for each side of a limit, ``[N]`` int64.

    Args:
        prompts: Tokens of each prompt, ``[N]`` int64.
        response_tokens: Tokens of each response, example by example, ``[R]`` int64.
        responses: Responses of each example, ``[N]`` int64.
        limits: Increasing lengths of whole sequences; none of them shares tokens with one on the other side.
    """
    if not len(limits):
        return (responses > 0).astype(np.int64)
    copies = np.zeros(len(prompts), dtype=np.int64)
    examples = np.repeat(np.arange(len(prompts)), responses)
    sides = np.searchsorted(np.asarray(limits, dtype=np.int64), prompts[examples] + response_tokens)
    np.add.at(copies, np.unique(np.stack([examples, sides]), axis=1)[0], 1)
    return copies


def tokens_needed(
    dataset: Dataset, *, unrelated_responses: bool = False, limits: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Most tokens that the trie of each example can hold with ``limits``, as in :func:`token_counts`, ``[N]`` int64.

    With ``unrelated_responses`` the longest response of the others too, once for each label and on a side of its own:
    :func:`~flexdpo.objective.unpaired.with_unrelated_responses` may put as many there.
    """
    counts = token_counts(dataset, shared=True, limits=limits)
    if not unrelated_responses or not len(counts):
        return counts
    own = _longest_responses(dataset)
    first, *others = np.argsort(own)[::-1][:2]
    longest = np.where(np.arange(len(own)) == first, own[others].sum(), own[first])
    added: NDArray[np.int64] = _label_counts(dataset) * longest
    if limits:
        # at worst a prompt for each side
        counts = token_counts(dataset, shared=True) + len(limits) * _lengths_of(dataset, "prompt_ids")
    return counts + added


def _label_counts(dataset: Dataset) -> NDArray[np.int64]:
    """How many labelled responses each example has, by its labels or else by its edges."""
    found = 2 * _lengths_of(dataset, "edges")
    return np.maximum(found, _lengths_of(dataset, LABELS_COLUMN)) if LABELS_COLUMN in dataset.column_names else found


def _longest_responses(dataset: Dataset) -> NDArray[np.int64]:
    return np.concatenate([_longest_of(table) for table in _tables(dataset)])


def _longest_of(table: Any) -> NDArray[np.int64]:
    responses = table.column("response_ids").combine_chunks()
    starts = np.concatenate([[0], _lengths(responses).cumsum()[:-1]])
    longest: NDArray[np.int64] = np.maximum.reduceat(_lengths(responses.flatten()), starts)
    return longest


def longest_sequence(dataset: Dataset, *, unrelated_responses: bool = False) -> int:
    """Tokens of the longest prompt with a response: its own, or one of other examples as the kto loss may put there."""
    prompt = response = both = 0
    for table in _tables(dataset):
        prompts, responses = _lengths(table.column("prompt_ids")), _longest_of(table)
        prompt, response = max(prompt, prompts.max()), max(response, responses.max())
        both = max(both, (prompts + responses).max())
    return int(prompt + response if unrelated_responses else both)


def predicted_costs(dataset: Dataset, hidden_size: int, limits: Sequence[int] = ()) -> NDArray[np.float64]:
    """What each example costs to run, see :func:`costs_of`, ``[N]`` float64."""
    return costs_of(token_counts(dataset, shared=True, limits=limits), hidden_size)


def costs_of(tokens: NDArray[np.int64], hidden_size: int) -> NDArray[np.float64]:
    """What examples of so many distinct tokens cost to run, in units of a short example's token.

    The linear layers of a decoder take about ``24 * hidden_size**2`` operations per token forward, and attention
    ``2 * hidden_size`` for each token before it, half of them on average.
    """
    return tokens * (1 + tokens / (12 * hidden_size))


def has_one_pair_each(dataset: Dataset) -> bool:
    """Whether every example of a tokenised dataset holds exactly one preference."""
    return all((_lengths(table.column("edges")) == 1).all() for table in _tables(dataset))


def _tables(dataset: Dataset) -> Any:
    return dataset.with_format("arrow").iter(batch_size=8192)


def _lengths_of(dataset: Dataset, column: str) -> NDArray[np.int64]:
    return np.concatenate([_lengths(table.column(column)) for table in _tables(dataset)])


def _lengths(column: Any) -> NDArray[np.int64]:
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return np.asarray(array.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)


def require_room(
    dataset: Dataset,
    max_tokens_per_row: int,
    pad_to_multiple_of: int,
    *,
    unrelated_responses: bool = False,
    limits: Sequence[int] = (),
    in_pieces: bool = False,
) -> None:
    """Refuse a dataset with an example that fits no row; ``in_pieces`` only its longest sequence must fit."""
    room = max_tokens_per_row // pad_to_multiple_of * pad_to_multiple_of
    alone = token_counts(dataset, shared=True, limits=limits)
    needed = tokens_needed(dataset, unrelated_responses=unrelated_responses, limits=limits)
    # responses may share their beginnings, so only the tries of the suspects are counted
    for index in np.flatnonzero(needed > room):
        group = group_from_row(dataset[int(index)])
        if in_pieces:
            pack([group], max_tokens_per_row, pad_to_multiple_of=pad_to_multiple_of, limits=limits)
            added = int(_longest_responses(dataset).max()) if unrelated_responses else 0
            if group.prompt_ids.size + added > room:
                raise FlexdpoError(
                    f"{group.name} has a prompt of {group.prompt_ids.size} tokens and may get a response of {added} "
                    f"behind it for the kto loss, but max_tokens_per_row={max_tokens_per_row} leaves room for {room}; "
                    "raise max_tokens_per_row or lower max_length"
                )
            continue
        own, added = len(Trie.from_sequences(group.sequences, limits=limits)), int(needed[index] - alone[index])
        if own + added > room:
            others = f", and may get {added} of other examples' responses for the kto loss," if added else ""
            raise FlexdpoError(
                f"{group.name} has {own} distinct tokens{others} but max_tokens_per_row={max_tokens_per_row} leaves "
                f"room for {room}; raise max_tokens_per_row or lower max_length"
            )


def require_batches(dataset: Dataset, args: DPOConfig, name: str) -> None:
    """Refuse a dataset of which ``dataloader_drop_last`` leaves no batch."""
    size = _batch_size(args, name) * args.world_size
    if args.dataloader_drop_last and len(dataset) < size:
        processes = f" in {args.world_size} processes" if args.world_size > 1 else ""
        raise FlexdpoError(
            f"{name}: {len(dataset)} examples fill no batch of {size}{processes}, and dataloader_drop_last=True drops "
            f"what fills none, so nothing would run; leave it out, or set {_size_setting(name)} to at most "
            f"{max(1, len(dataset) // args.world_size)}"
        )


def require_company(dataset: Dataset, args: DPOConfig, name: str) -> None:
    """Refuse a dataset of which some batch is sure to hold one prompt, whose responses the kto loss cannot compare."""
    size, count = _batch_size(args, name), len(dataset)
    why = f"{name}: the kto loss compares a batch's responses with those to other prompts, and"
    if size == 1:
        raise FlexdpoError(
            f"{why} {_size_setting(name)}=1 holds one prompt; set it to 2 or more, or use loss_type 'apo_zero_unpaired'"
        )
    # with several processes the last batch is filled up
    if args.world_size == 1 and not args.dataloader_drop_last and count % size == 1:
        raise FlexdpoError(
            f"{why} the last batch of {count} examples in batches of {size} holds one; set dataloader_drop_last=True "
            f"or another {_size_setting(name)}"
        )
    # the second prompt is another one in most data, so this looks at few
    prompts = (group_from_row(row).prompt_key for row in dataset)
    first = next(prompts)
    if all(prompt == first for prompt in prompts):
        raise FlexdpoError(f"{why} all {count} examples have the same one; use loss_type 'apo_zero_unpaired'")


def _size_setting(name: str) -> str:
    return f"per_device_{'train' if name == 'train' else 'eval'}_batch_size"


def _batch_size(args: DPOConfig, name: str) -> int:
    return int(args.train_batch_size if name == "train" else args.eval_batch_size)
