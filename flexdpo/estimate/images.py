"""The images of a dataset, and what encoding them takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.data.draft import IMAGES_COLUMN
from flexdpo.data.images import images_of_row, told_of_images
from flexdpo.training.model_size import ModelSize

if TYPE_CHECKING:
    from datasets import Dataset

# whose sizes stand for all
_LOOKED_AT = 8


@dataclass(frozen=True)
class ImageCounts:
    """Images of one epoch."""

    encoded: int  # each prompt's distinct images once: the trainer's ``images/run`` where no row has one of another's
    unshared: int  # each prompt's images for each of its responses: the trainer's ``images/unshared``
    tokens: int  # of the prompts, each once
    flops: float  # of the parts that see, forward, for one image; 0 where the model is not known

    def line(self) -> str:
        """For people."""
        told = (
            f"images: {self.encoded:,} encoded in an epoch where an ordinary run encodes {self.unshared:,}; they stand "
            f"for {self.tokens:,} tokens of the prompts"
        )
        if not self.flops:
            return told
        ours, theirs = (f"{count * self.flops:.2e}" for count in (self.encoded, self.unshared))
        return (
            f"{told};\n    {ours} FLOPs to encode them once, {theirs} the ordinary way (in no figure below, nor is "
            "what\n    a trained encoder keeps in memory)"
        )


def count_images(dataset: Dataset, size: ModelSize) -> ImageCounts | None:
    """Those of a tokenised dataset, ``None`` where it has none."""
    if IMAGES_COLUMN not in dataset.column_names:
        return None
    encoded = unshared = tokens = 0
    for row, responses in _rows(dataset):
        encoded += len({image["digest"] for image in row})
        unshared += len(row) * responses
        tokens += sum(image["tokens"] for image in row)
    if not encoded:
        return None
    pictured = (row for row in dataset if row[IMAGES_COLUMN])
    images = [image for row in islice(pictured, _LOOKED_AT) for image in images_of_row(row)[0]][:_LOOKED_AT]
    numbers = np.mean([sum(v.numel() for v in each.inputs.values() if v.is_floating_point()) for each in images])
    flops = 2 * size.tower * float(numbers) / size.patch if size.patch else 0.0
    return ImageCounts(encoded, unshared, tokens, flops)


def _rows(dataset: Dataset) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """What is told of the images of each row, and how many responses it has."""
    for table in dataset.select_columns([IMAGES_COLUMN, "response_ids"]).with_format("arrow").iter(batch_size=1024):
        responses = table.column("response_ids").combine_chunks().value_lengths().to_pylist()
        yield from zip(told_of_images(table), responses, strict=True)
