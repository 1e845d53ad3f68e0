"""Groups with images, run one sequence at a time by the stock model and packed on shared rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flexdpo import Group, Row
from flexdpo.layout.groups import PromptImage
from flexdpo.layout.images import joined_inputs
from tests.hf.equivalence import Run, _run
from tests.images.models import IMAGE, Kind, words


def example_groups(kind: Kind) -> list[Group]:
    """Prompts that differ in the image alone, one of another size, one image in several prompts, several in one.

    Two of the three responses begin alike, so that tries are of depth two.
    """
    (a, in_a), (b, in_b), (c, in_c) = kind.picture(1), kind.picture(2), kind.picture(3, 1)
    before, after = words(9, 5), words(8, 4)
    prompts = [
        (before + in_a + after, [a]),
        (before + in_b + after, [b]),
        (before + in_c + words(7, 4) + in_a + after, [c, a]),
        # both begin with the same image, which must not be one token for both
        (before + in_a + in_b + after, [a, b]),
        (before + after, []),
    ]
    return [group_of(prompt, images, 10 * number) for number, (prompt, images) in enumerate(prompts)]


def group_of(prompt: list[int], images: list[PromptImage], seed: int) -> Group:
    beginning = words(seed, 2)
    responses = (beginning + words(seed + 1, 5), beginning + words(seed + 2, 4), words(seed + 3, 3))
    return Group(np.asarray(prompt), tuple(map(np.asarray, responses)), ((0, 1),), f"row {seed}", tuple(images), IMAGE)


def cast(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Pixels in the model's dtype."""
    floats = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {**inputs, **{name: value.to(model.dtype) for name, value in floats.items()}}


def stock_run(model: Any, kind: Kind, groups: list[Group]) -> Run:
    """Run one sequence at a time, as the processor's outputs would be run."""
    logits = []
    for group in groups:
        for sequence in group.sequences:
            logits.append(model(**call_of(model, kind, torch.from_numpy(sequence), group.images)).logits[0])
    return _run(model, logits)


def call_of(model: Any, kind: Kind, sequence: torch.Tensor, images: Sequence[PromptImage]) -> dict[str, Any]:
    """One sequence with its images, as its processor would hand it over."""
    inputs = joined_inputs([image.inputs for image in images])
    if kind.types is not None:
        inputs[kind.types] = (sequence[None] == IMAGE).long()
    return {"input_ids": sequence[None], "use_cache": False, **cast(inputs, model)}


def whole_paths(row: Row) -> list[torch.Tensor]:
    """Row indices of every token of every sequence, prompt included, also where groups share a trie."""
    ends = row.subtree_end[0].numpy()
    index = np.arange(ends.size)
    paths = ((index < path[0]) & (ends > path[0]) for path in row.response_paths)
    return [
        torch.from_numpy(np.concatenate([np.flatnonzero(before), path]))
        for before, path in zip(paths, row.response_paths, strict=True)
    ]


def packed_run(model: Any, rows: list[Row], count: int, **kwargs: Any) -> Run:
    """Run rows that hold ``count`` groups, whose responses come out in the groups' order."""
    found: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        logits = model(**cast({**row.inputs(), **kwargs}, model)).logits[0]
        paths = iter(whole_paths(row))
        for number, group in zip(row.numbers or range(count), row.groups, strict=True):
            found[number] = [logits[next(paths)] for _ in group.response_ids]
    return _run(model, [each for number in range(count) for each in found[number]])


def padded_batch(model: Any, kind: Kind, groups: list[Group], side: str = "right") -> dict[str, Any]:
    """All sequences as one padded batch, with the images of each, as a collator makes it."""
    sequences = [sequence for group in groups for sequence in group.sequences]
    longest = max(len(sequence) for sequence in sequences)
    ids, mask = torch.zeros(2, len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        places = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        ids[row, places], mask[row, places] = torch.from_numpy(sequence), 1
    of_rows = [group.images for group in groups for _ in group.response_ids]
    inputs = joined_inputs([image.inputs for images in of_rows for image in images])
    if kind.nested:
        inputs = _nested(of_rows)
    if kind.types is not None:
        inputs[kind.types] = (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": mask, **cast(inputs, model)}


def _nested(of_rows: list[tuple[PromptImage, ...]]) -> dict[str, torch.Tensor]:
    """The tiles of each row side by side, filled up with zeros to the most that a row has."""
    names = next(image.inputs for images in of_rows for image in images)
    found = {}
    for name in names:
        rows = [torch.cat([image.inputs[name][0] for image in images]) for images in of_rows if images]
        empty = rows[0][:0]
        filled = iter(rows)
        found[name] = torch.nn.utils.rnn.pad_sequence(
            [next(filled) if images else empty for images in of_rows], batch_first=True
        )
    return found


def batch_run(model: Any, batch: dict[str, Any]) -> Run:
    """Run a padded batch; logits at its tokens."""
    logits = model(**batch, use_cache=False).logits
    return _run(model, [line[real.bool()] for line, real in zip(logits, batch["attention_mask"], strict=True)])
