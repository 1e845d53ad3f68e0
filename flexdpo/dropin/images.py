"""Which images of a padded batch are the same, and which of them each image token stands for.

Images are compared by what the model is given of them: pixels, sizes, grids. A batch holds each as often as rows need
it; the packed row holds it once. What cannot be told apart with certainty passes through.

Shapes: ``N`` rows of ``T`` places, ``U`` images of the batch, ``P`` image tokens.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexdpo.dropin.batch_trie import BatchTrie
from flexdpo.hf.draws import can_run, left_as_it_is
from flexdpo.hf.forward_layout import TOKEN_TYPES
from flexdpo.hf.images import encoder_draws, rope_index, tokens_of_images
from flexdpo.layout.images import ImageKeys, RowImages, joined_inputs

# what models are given of images: pixels, in patches or whole, and what has one entry for each image or its pixels
_PIXELS, _GRID, _PER_ROW = "pixel_values", "image_grid_thw", "batch_num_images"
IMAGE_INPUTS = frozenset(
    {_PIXELS, _GRID, _PER_ROW, "image_sizes", "image_position_ids", "pixel_attention_mask", *TOKEN_TYPES}
)
# token ids are less
_FIRST_KEY = 1 << 31


@dataclass(frozen=True, eq=False)
class BatchImages:
    """The images of one batch."""

    keys: Tensor  # token ids, and at image tokens numbers above them that are equal where image and place are, [N, T]
    features: Tensor  # number of the feature among those of the distinct images, -1 at text, [N, T] int64
    counts: tuple[int, ...]  # image tokens of each distinct image
    inputs: dict[str, Tensor]  # what the model is given of the distinct images
    members: tuple[int, ...]  # which distinct image each image of the batch is, ``U``
    together: tuple[int, ...]  # of how many images the model's features stand in one tensor each; ``U`` in all
    position_ids: Tensor | None  # in several dimensions, as the model would have made them, ``[C, N, T]``
    omitted: dict[str, None]  # arguments about images that the model has and the caller left out

    def of_row(self, trie: BatchTrie, length: int) -> RowImages:
        """The same of the batch's packed row of ``length`` tokens."""
        features = torch.nn.functional.pad(self.features.reshape(-1)[trie.sources], (0, length - len(trie)), value=-1)
        return RowImages(features[None], self.counts, self.inputs)

    def positions_of_row(self, trie: BatchTrie, length: int) -> Tensor | None:
        """``position_ids`` of the packed row, ``[C, 1, length]``."""
        if self.position_ids is None:
            return None
        positions = self.position_ids.flatten(1)[:, trie.sources]
        return torch.nn.functional.pad(positions, (0, length - len(trie)))[:, None]

    def same_along(self, trie: BatchTrie) -> bool:
        """Whether all rows that share a token have it at the same positions; waits for the device."""
        if self.position_ids is None:
            return True
        back = self.position_ids.flatten(1)[:, trie.sources][:, trie.nodes.clamp(min=0)]
        return bool(((back == self.position_ids) | (trie.nodes < 0)).all())


@dataclass(eq=False)
class ImageKnowledge:
    """What was asked of a model about its images; asked once."""

    draws: dict[int, bool] = field(default_factory=dict)  # whether encoding draws random numbers, by state of the model
    tokens: dict[str, int] = field(default_factory=dict)  # image tokens of an image, by what is known of its size


def without_image_inputs(part: Any, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that say nothing of images; also without labels that a model without a head ignores."""
    plain = {name: value for name, value in named.items() if name not in IMAGE_INPUTS}
    if plain.get("labels") is not None and part.get_output_embeddings() is None and not _reads(part, "labels"):
        del plain["labels"]
    return plain


def _reads(part: Any, name: str) -> bool:
    """Whether a model's forward does anything with one of its arguments."""
    code = inspect.unwrap(type(part).forward).__code__
    return any(step.argval == name and step.opname.startswith("LOAD") for step in dis.get_instructions(code))


def image_count(named: dict[str, Any]) -> int:
    """Images that a call brings, padding among them included."""
    of_each = named.get(_GRID) if named.get(_GRID) is not None else named.get(_PIXELS)
    if not isinstance(of_each, torch.Tensor):
        return 0
    return of_each.shape[:2].numel() if _is_nested(named) else len(of_each)


def _is_nested(named: dict[str, Any]) -> bool:
    """Whether images stand in ``[N, most images of a row, ...]``, filled up with zeros (Idefics 3, SmolVLM)."""
    return named[_PIXELS].ndim == 5 and named.get("image_sizes") is None and named.get(_GRID) is None


def find_images(part: Any, named: dict[str, Any], knowledge: ImageKnowledge) -> BatchImages | str | None:
    """Tell the images of a batch apart.

    ``named`` are the arguments of a call of ``part``, ``[N, T]`` token ids among them.

    Returns the images, ``None`` where there are none, or the reason why the batch is not shared, one of
    :data:`flexdpo.dropin.rules.REASONS`. Waits for the device.
    """
    try:
        if named.get(_PIXELS) is None:
            types = [named[name] for name in TOKEN_TYPES if named.get(name) is not None]
            _require(not any(bool(each.any()) for each in types), "token_types")
            return None
        return _found(part, named, knowledge)
    except _NotSharedError as reason:
        return str(reason)


class _NotSharedError(Exception):
    """The reason why a batch passes through."""


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise _NotSharedError(reason)


def _found(part: Any, named: dict[str, Any], knowledge: ImageKnowledge) -> BatchImages:
    input_ids, mask = named["input_ids"], named.get("attention_mask")
    image_token_id = getattr(part.config, "image_token_id", getattr(part.config, "image_token_index", None))
    _require(image_token_id is not None, "image_inputs")
    images = _images(named)
    is_image = input_ids == image_token_id
    real = torch.ones_like(is_image) if mask is None else mask != 0
    _require_token_types(named, is_image, real)
    rows, columns = is_image.nonzero().cpu().numpy().T
    runs = _runs(rows, columns)
    counts = _image_tokens(part, images, runs, knowledge)
    _require(sum(counts) == rows.size and not bool((is_image & ~real).any()), "image_tokens")
    members = _distinct([each.inputs for each in images])
    first = [members.index(number) for number in range(max(members) + 1)]
    distinct = joined_inputs([images[number].inputs for number in first])
    if named.get(_PER_ROW) is not None:
        distinct[_PER_ROW] = named[_PER_ROW].new_ones(len(first))
    _require(not encoder_draws(part, images[0].call, knowledge.draws), "random")
    position_ids = None
    if hasattr(part, "get_rope_index") and named.get("position_ids") is None:
        _require(any(named.get(name) is not None for name in TOKEN_TYPES), "token_types")
        position_ids = rope_index(part, input_ids, real, is_image, {n: named[n] for n in distinct})
    keys, features = _numbered(input_ids, (rows, columns), runs, counts, members)
    parameters = inspect.signature(type(part).forward).parameters
    omitted = dict.fromkeys(name for name in TOKEN_TYPES if name in parameters and named.get(name) is None)
    of_distinct = tuple(counts[number] for number in first)
    together = (1,) * len(images)
    if _is_nested(named):
        together = tuple((named[_PIXELS] != 0).flatten(2).any(dim=2).sum(dim=1).tolist())
    inputs = _nested_again(distinct, named)
    return BatchImages(keys, features, of_distinct, inputs, tuple(members), together, position_ids, omitted)


def _require_token_types(named: dict[str, Any], is_image: Tensor, real: Tensor) -> None:
    for name in TOKEN_TYPES:
        types = named.get(name)
        if types is not None:
            same = types.shape == is_image.shape and not bool((((types == 1) != is_image) & real).any())
            _require(same, "token_types")


@dataclass(frozen=True, eq=False)
class _Image:
    """What the model is given of one image."""

    inputs: dict[str, Tensor]
    call: dict[str, Tensor]  # the same, as of the only image of a batch
    size: str  # what says how many tokens it has: its shape, and all that the model is given of it besides pixels


def _nested_again(inputs: dict[str, Tensor], named: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value[None] for name, value in inputs.items()} if _is_nested(named) else inputs


def _images(named: dict[str, Any]) -> list[_Image]:
    """The images of a batch one by one."""
    given = {name: named[name] for name in IMAGE_INPUTS - {*TOKEN_TYPES} if named.get(name) is not None}
    _require(all(isinstance(value, torch.Tensor) for value in given.values()), "image_inputs")
    pixels = given[_PIXELS]
    per_row = given.pop(_PER_ROW, None)
    # several images in a row are encoded otherwise than one
    _require(per_row is None or not bool((per_row != 1).any()), "image_inputs")
    if _GRID in given:
        pieces = given[_GRID].prod(dim=-1).tolist()
        parts = {name: value.split(1) for name, value in given.items() if name != _PIXELS}
        _require(sum(pieces) == len(pixels), "image_inputs")
        parts[_PIXELS] = pixels.split(pieces)
    elif _is_nested(named):
        # the model leaves out what is 0 throughout
        real = (pixels != 0).flatten(2).any(dim=2)
        parts = {name: value[real].split(1) for name, value in given.items()}
    else:
        parts = {name: value.split(1) for name, value in given.items()}
    _require(len({len(each) for each in parts.values()}) == 1 and len(parts[_PIXELS]) > 0, "image_inputs")
    found = [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
    others = [[_checksum(value) for name, value in each.items() if name != _PIXELS] for each in found]
    known = torch.stack([torch.stack(each) for each in others]).tolist() if others[0] else [()] * len(found)
    return [
        _Image(each, _nested_again(each, named), str((each[_PIXELS].shape, other)))
        for each, other in zip(found, known, strict=True)
    ]


def _distinct(images: list[dict[str, Tensor]]) -> list[int]:
    """Number the distinct images in the order of first use; which of them each image is."""
    sums = torch.stack([torch.stack([_checksum(value) for value in each.values()]).sum() for each in images]).tolist()
    alike: dict[int, list[int]] = {}
    members: list[int] = []
    leaders: list[int] = []
    for number, image in enumerate(images):
        candidates = alike.setdefault(sums[number], [])
        same = next((each for each in candidates if _equal(images[leaders[each]], image)), None)
        if same is None:
            same = len(leaders)
            leaders.append(number)
            candidates.append(same)
        members.append(same)
    return members


def _checksum(value: Tensor) -> Tensor:
    """A number that follows from a tensor's content, on its device."""
    whole = value.double().reshape(-1)
    place = torch.arange(whole.numel(), device=value.device) % 8191 + 1
    return (whole.nan_to_num() * place).sum().view(torch.int64) if whole.numel() else whole.sum().view(torch.int64)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _runs(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Numbers of the image tokens of each unbroken run within a row."""
    number = np.arange(rows.size)
    breaks = np.flatnonzero((np.diff(rows) != 0) | (np.diff(columns) != 1)) + 1
    return np.split(number, breaks) if number.size else []


def _image_tokens(
    part: Any, images: list[_Image], runs: list[NDArray[np.int64]], knowledge: ImageKnowledge
) -> list[int]:
    """How many tokens stand for each image."""
    known = knowledge.tokens
    if len(runs) == len(images) and all(
        known.setdefault(image.size, run.size) == run.size for image, run in zip(images, runs, strict=True)
    ):
        return [run.size for run in runs]
    _require(can_run(part), "image_tokens")
    # asked of the model itself, in place of what an image that was cut may have told
    for image in {image.size: image for image in images}.values():
        with left_as_it_is(part, training=False):
            known[image.size] = tokens_of_images(part, image.call)
    return [known[image.size] for image in images]


def _numbered(
    input_ids: Tensor,
    places: tuple[NDArray[np.int64], NDArray[np.int64]],
    runs: list[NDArray[np.int64]],
    counts: list[int],
    members: list[int],
) -> tuple[Tensor, Tensor]:
    """Keys and features of all places, ``[N, T]`` each."""
    image = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    distinct = np.asarray(members)[image]
    sizes = np.zeros(max(members) + 1, dtype=np.int64)
    sizes[np.asarray(members)] = counts
    feature = (np.cumsum(sizes) - sizes)[distinct] + place
    table, key = ImageKeys(), np.empty(image.size, dtype=np.int64)
    for run in runs:
        parts = np.split(run, np.flatnonzero(np.diff(image[run])) + 1)
        of = tuple((str(distinct[each[0]]), int(place[each[0]]), each.size) for each in parts)
        key[run] = _FIRST_KEY + table.first(of) + np.arange(run.size)
    at = torch.from_numpy(places[0] * input_ids.shape[1] + places[1]).to(input_ids.device)
    keys, features = input_ids.long().flatten(), torch.full((input_ids.numel(),), -1, device=input_ids.device)
    keys = keys.scatter(0, at, torch.from_numpy(key).to(at.device))
    features = features.scatter(0, at, torch.from_numpy(feature).to(at.device))
    return keys.reshape(input_ids.shape), features.reshape(input_ids.shape)
