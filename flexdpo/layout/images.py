"""The images of packed rows: which image each image token stands for, and what the model is given of each image.

A prompt's image stands in it as a block of placeholder tokens, the image tokens, that all have the same id. Two blocks
are the same tokens only where their images are: so a trie is built over *keys*, in which every token of text has its id
and an image token a number below 0 that says which image it is of, which place it has there, and how long the run of
image tokens is that it stands in. Equal text with another image never merges, and neither does a block that was cut.

How an image gets into a row, and through the model:

- ``Group.images`` are the images of a prompt, in the order of their tokens. ``Row.from_groups`` and ``pack`` build
  tries over keys; ``row.input_ids`` hold the placeholder's id again.
- ``row.layout.images`` is a :class:`RowImages`: each distinct image once, and at every image token which of their
  features it is. The same image in several prompts, tries and groups of a row is one image there.
- ``row.inputs()`` holds the distinct images' inputs (``pixel_values`` and so on) for ``model(**row.inputs())``. A
  prepared model encodes them once and hands the features out (:mod:`flexdpo.hf.images`), and finds positions and token
  types itself.

Shapes: ``B`` rows of ``S`` tokens, ``F`` features (image tokens) of all distinct images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from flexdpo.layout.groups import Group, PromptImage

# what processors fill up with zeros to the largest image of a batch; the model knows each image's own size
_PIXELS = frozenset({"pixel_values", "pixel_attention_mask"})


@dataclass(frozen=True, eq=False)
class RowImages:
    """The distinct images of a batch of rows, and which of their features stands at each image token."""

    # number of the feature at each token, counted through all distinct images, -1 at text, ``[B, S]`` int64
    features: Tensor
    counts: tuple[int, ...]  # features of each distinct image, in the order of ``inputs``; ``F`` in all
    inputs: dict[str, Tensor]  # what a processor made of the distinct images, for the model

    def map(self, change: Callable[[Tensor], Tensor]) -> RowImages:
        """The same with every tensor changed."""
        inputs = {name: change(value) for name, value in self.inputs.items()}
        return RowImages(change(self.features), self.counts, inputs)

    def padded(self, missing: int) -> RowImages:
        """The same of rows that have so many tokens more."""
        features = torch.nn.functional.pad(self.features, (0, missing), value=-1)
        return RowImages(features, self.counts, self.inputs)

    @classmethod
    def stack(cls, images: Sequence[RowImages | None], rows: Sequence[Tensor]) -> RowImages | None:
        """Put the images of several batches together; ``rows`` are ``[B, S]`` each, for those that have none."""
        present = [each for each in images if each is not None]
        if not present:
            return None
        before = accumulate((0 if each is None else sum(each.counts) for each in images), initial=0)
        features = [
            torch.full_like(row, -1) if each is None else torch.where(each.features < 0, -1, each.features + first)
            for each, row, first in zip(images, rows, before, strict=False)
        ]
        counts = tuple(count for each in present for count in each.counts)
        return cls(torch.cat(features), counts, joined_inputs([each.inputs for each in present]))

    def first_tokens(self) -> tuple[Tensor, Tensor]:
        """Where images begin: whether the first feature of one stands at each token, and of which, ``[B, S]`` each."""
        device = self.features.device
        starts = torch.tensor([0, *accumulate(self.counts)][:-1], device=device)
        image = torch.bucketize(self.features, starts, right=True) - 1
        return (self.features >= 0) & (starts[image.clamp(min=0)] == self.features), image


def joined_inputs(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs of several images as those of one batch; pixels are filled up to a common size, as processors do.

    Raises ``FlexdpoError`` if they are not of the same kinds, or others than pixels have shapes that differ beyond the
    first dimension.
    """
    joined = {}
    for name in dict.fromkeys(name for each in inputs for name in each):
        values = [each[name] for each in inputs if name in each]
        if len({value.ndim for value in values}) == 1 and name in _PIXELS:
            sizes = [max(lengths) for lengths in zip(*(value.shape[1:] for value in values), strict=True)]
            values = [_filled_up(value, sizes) for value in values]
        if len(values) < len(inputs) or len({value.shape[1:] for value in values}) > 1:
            shapes = ", ".join(sorted({str(list(value.shape)) for value in values}))
            raise FlexdpoError(
                f"the images of one row have {name} of the shapes {shapes}{' or none' * (len(values) < len(inputs))}; "
                "a processor must make the same of each"
            )
        joined[name] = torch.cat(values)
    return joined


def _filled_up(value: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - length for size, length in zip(sizes, value.shape[1:], strict=True)]
    return torch.nn.functional.pad(value, [each for size in reversed(missing) for each in (0, size)])


# --- tries over keys -------------------------------------------------------------------------------------------------


@dataclass
class ImageKeys:
    """Gives image tokens the numbers that a trie is built over: equal where image, place and run of tokens are.

    A table for each trie, or for all tries of a call; keys of two tables have nothing in common.
    """

    # where the numbers of each run begin
    known: dict[tuple[tuple[str, int, int], ...], int] = field(default_factory=dict)
    used: int = 0  # keys given out

    def sequences(self, group: Group) -> list[NDArray[np.int64]]:
        """``group.sequences`` with keys in place of image tokens."""
        keys = self.of_prompt(group) if group.images else group.prompt_ids
        return [np.concatenate((keys, response)) for response in group.response_ids]

    def of_prompt(self, group: Group) -> NDArray[np.int64]:
        """``group.prompt_ids`` with keys, all below 0, in place of image tokens."""
        images = group.images
        keys = group.prompt_ids.copy()
        image, place = image_places(keys, group.image_token_id, [each.tokens for each in images])
        at = np.flatnonzero(image >= 0)
        for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
            # where another image begins within the run
            parts = np.split(run, np.flatnonzero(np.diff(image[run])) + 1)
            of = tuple((images[image[part[0]]].digest, int(place[part[0]]), part.size) for part in parts if part.size)
            keys[run] = -1 - self.first(of) - np.arange(run.size)
        return keys

    def first(self, run: tuple[tuple[str, int, int], ...]) -> int:
        """The number, from 0, of the first token of a run; those of the others follow it.

        ``run`` holds each image in it: its digest, its first place there, and its tokens.
        """
        if run not in self.known:
            self.known[run] = self.used
            self.used += sum(tokens for *_, tokens in run)
        return self.known[run]


def image_places(
    token_ids: NDArray[np.int64], image_token_id: int, tokens: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which image each token is of, -1 at text, and its place among the image's tokens, ``[L]`` each.

    ``tokens`` are the image tokens of each image.

    Raises ``FlexdpoError`` if there are more or fewer of them than the images need.
    """
    at = np.flatnonzero(token_ids == image_token_id)
    if at.size != sum(tokens):
        raise FlexdpoError(
            f"a prompt has {at.size} image tokens (id {image_token_id}) and its {len(tokens)} images stand for "
            f"{sum(tokens)}; a prompt that was cut within an image cannot be trained on, so leave it out or raise "
            "max_length"
        )
    image = np.full(token_ids.size, -1, dtype=np.int64)
    place = np.zeros(token_ids.size, dtype=np.int64)
    image[at] = np.repeat(np.arange(len(tokens)), tokens)
    place[at] = np.concatenate([np.arange(count) for count in tokens] or [at])
    return image, place


def row_images(groups: Sequence[Group], sequences: Sequence[NDArray[np.int64]], length: int) -> RowImages:
    """The images of a row of ``length`` tokens.

    ``sequences`` holds, for every response of every group, the row index of each of its tokens, the prompt included.

    Raises ``FlexdpoError`` at an image token for which there is no image: the model would want a feature for it.
    """
    distinct: dict[str, PromptImage] = {}
    token_id = next(group.image_token_id for group in groups if group.images)
    for group in groups:
        texts = {f"response {k}": response for k, response in enumerate(group.response_ids)}
        for part, text in (texts if group.images else {"the prompt": group.prompt_ids, **texts}).items():
            if (text == token_id).any():
                raise FlexdpoError(
                    f"{group.name}: token {int((text == token_id).argmax())} of {part} is the image token (id "
                    f"{token_id}) and stands for no image; take its text out of the data"
                )
        for each in group.images:
            known = distinct.setdefault(each.digest, each)
            if known.tokens != each.tokens:
                raise FlexdpoError(
                    f"{group.name}: an image stands for {each.tokens} tokens here and for {known.tokens} elsewhere in "
                    "the row, under one digest; digests must tell whatever the processor made of an image"
                )
    counts = tuple(each.tokens for each in distinct.values())
    starts = dict(zip(distinct, [0, *accumulate(counts)], strict=False))
    features = np.full(length, -1, dtype=np.int64)
    path = iter(sequences)
    for group in groups:
        paths = [next(path) for _ in group.response_ids]
        if group.images:
            image, place = image_places(group.prompt_ids, group.image_token_id, [each.tokens for each in group.images])
            first = np.asarray([starts[each.digest] for each in group.images])
            of_prompt = np.where(image < 0, -1, first[image] + place)
            # responses share their prompt, but for a model that goes by their lengths
            for tokens in paths:
                features[tokens[: of_prompt.size]] = of_prompt
    return RowImages(
        torch.from_numpy(features)[None], counts, joined_inputs([each.inputs for each in distinct.values()])
    )
