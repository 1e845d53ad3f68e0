"""The images of prompts: made by a processor into what a model is given, and what a tokenised row remembers of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from flexdpo.data.cache import tokenizer_digest
from flexdpo.data.draft import IMAGES_COLUMN
from flexdpo.data.pictures import opened
from flexdpo.errors import FlexdpoError, first_line
from flexdpo.layout.groups import PromptImage
from flexdpo.layout.images import joined_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

# what a processor says about tokens and not about images
_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")


# --- what a processor makes of them ----------------------------------------------------------------------------------


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """A tokenizer, or that of a processor."""
    return processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else processing_class.tokenizer


def is_processor(processing_class: object) -> bool:
    """Whether it reads images beside text."""
    return isinstance(processing_class, ProcessorMixin) and hasattr(processing_class, "image_processor")


def processing_digest(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """All that decides what becomes of text and images, in a few letters, the same in every process."""
    tokenizer = tokenizer_digest(tokenizer_of(processing_class))
    if not is_processor(processing_class):
        return tokenizer
    import PIL

    about = {
        "class": f"{type(processing_class).__module__}.{type(processing_class).__qualname__}",
        "settings": json.loads(processing_class.to_json_string()),
        "images": json.loads(processing_class.image_processor.to_json_string()),
        "image class": type(processing_class.image_processor).__qualname__,
        "chat_template": processing_class.chat_template,
        # which decode and scale
        "versions": [transformers.__version__, PIL.__version__],
        "tokenizer": tokenizer,
    }
    return hashlib.blake2b(json.dumps(about, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()


# processors by their digests: pictures come from the data as paths and bytes wherever a row is made
_READERS: dict[str, ImageReader] = {}


@dataclass(frozen=True, eq=False)
class ImageReader:
    """Makes a processor's inputs of pictures; known in its process by the processor's digest.

    A data loader's workers get it with the collator, and pictures travel without it.
    """

    processor: Any

    def __post_init__(self) -> None:
        _READERS[self.digest] = self

    def __reduce__(self) -> Any:
        return ImageReader, (self.processor,)

    @cached_property
    def digest(self) -> str:
        """Of the processor, see :func:`processing_digest`."""
        return processing_digest(self.processor)

    @property
    def placeholder(self) -> str:
        """What stands for one image in a text.

        Raises:
            FlexdpoError: if the processor has no such text.
        """
        text = getattr(self.processor, "image_token", None)
        if not isinstance(text, str) or not text:
            raise FlexdpoError(
                f"{type(self.processor).__name__} has no image_token, so nothing says where an image stands in a text; "
                "it is not supported"
            )
        return text

    def read(self, text: str, stored: Sequence[Mapping[str, Any]], place: str, **kwargs: Any) -> Prompt:
        """Token ids of a text with images at its placeholders, and each image as the model gets it.

        Raises:
            FlexdpoError: if there are more or fewer placeholders than images, a picture cannot be read, or the
                processor does not take them, or makes other things of several images than of each alone.
        """
        places = text.count(self.placeholder)
        if places != len(stored):
            raise FlexdpoError(
                f"{place}: {len(stored)} image{'s' * (len(stored) != 1)} and {places} placeholder"
                f"{'s' * (places != 1)} {self.placeholder!r} in its prompt; give each image one: a part "
                f"{{'type': 'image'}} of a message, or that text where the prompt is text"
            )
        if not stored:
            return Prompt(_ids(self._run(None, text, place, **kwargs)), -1, [])
        pictures = [opened(each, place) for each in stored]
        whole = self._run(pictures, text, place, **kwargs)
        ids, inputs = _ids(whole), _of_images(whole)
        if len(pictures) == 1:
            alone = [inputs]
            tokens = [[*ids]]
        else:
            runs = [self._run([picture], self.placeholder, place, add_special_tokens=False) for picture in pictures]
            alone, tokens = [_of_images(run) for run in runs], [_ids(run) for run in runs]
        token_id = self._token_id(tokens[0])
        counts = [each.count(token_id) for each in tokens]
        if sum(counts) != ids.count(token_id) or not _add_up(alone, inputs):
            raise FlexdpoError(
                f"{place}: {type(self.processor).__name__} makes other things of its {len(pictures)} images together "
                "than of each alone, and each distinct image is encoded once here; give one image a prompt"
            )
        images = [PromptImage(_digest(each), n, each) for each, n in zip(alone, counts, strict=True)]
        return Prompt(ids, token_id, images)

    def inputs(self, stored: Mapping[str, Any], place: str) -> dict[str, Tensor]:
        """What the model is given of one picture."""
        return _of_images(self._run([opened(stored, place)], self.placeholder, place, add_special_tokens=False))

    def _token_id(self, ids: list[int]) -> int:
        """The id of which an image's tokens are: of those that a processor names, the one that it repeats."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        named = [*getattr(processor, "image_token_ids", ()), getattr(processor, "image_token_id", None)]
        named.append(getattr(tokenizer, "image_token_id", None))
        return max((each for each in named if isinstance(each, int)), key=ids.count, default=-1)

    def _run(self, pictures: list[Image] | None, text: str, place: str, **kwargs: Any) -> Any:
        try:
            # images of each text in a list of their own, as TRL gives them
            images = None if pictures is None else [pictures]
            return self.processor(images=images, text=[text], return_tensors="pt", **kwargs)
        except MemoryError:
            raise
        except Exception as error:  # each processor has conditions of its own
            many = "" if pictures is None else f" with {len(pictures)} image{'s' * (len(pictures) != 1)}"
            raise FlexdpoError(
                f"{place}: {type(self.processor).__name__} cannot read its prompt{many} ({type(error).__name__}: "
                f"{first_line(error)})"
            ) from error


@lru_cache(maxsize=8)
def reader_of(processor: Any) -> ImageReader:
    """A processor's reader; one for each, since its digest takes a look at the whole vocabulary."""
    return ImageReader(processor)


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, the id that image tokens have (-1: there are none), and its images in order."""

    ids: list[int]
    token_id: int
    images: list[PromptImage]


def _ids(run: Any) -> list[int]:
    ids: list[int] = run["input_ids"][0].tolist()
    return ids


def _of_images(run: Any) -> dict[str, Tensor]:
    return {name: value for name, value in run.items() if name not in _OF_TOKENS and isinstance(value, torch.Tensor)}


def _add_up(alone: Sequence[dict[str, Tensor]], together: dict[str, Tensor]) -> bool:
    """Whether the inputs of several images are those of each alone, one after the other, padded or not."""
    if len(alone) == 1:
        return True
    joined = joined_inputs(alone)
    if joined.keys() != together.keys():
        return False
    for name, value in joined.items():
        # tiles of all images may stand side by side, where a row's images are filled up to as many tiles each
        side_by_side = torch.cat([each[name].flatten() for each in alone])
        if not any(torch.equal(each, together[name].flatten()) for each in (value.flatten(), side_by_side)):
            return False
    return True


def _digest(inputs: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(inputs.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- images of tokenised rows ----------------------------------------------------------------------------------------


class StoredImage(PromptImage):
    """An image of a tokenised row, which is read and processed where its inputs are asked for."""

    column: Mapping[str, Any]  # as ``IMAGES_COLUMN`` has it
    name: str  # how errors call its row

    def __init__(self, column: Mapping[str, Any], name: str) -> None:
        held = {"digest": column["digest"], "tokens": column["tokens"], "column": column, "name": name}
        for field, value in held.items():
            object.__setattr__(self, field, value)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is given.

        Raises:
            FlexdpoError: if the picture is not the one that the data were tokenised with.
        """
        column, name = self.column, self.name
        reader = _READERS.get(column["processor"])
        if reader is None:
            raise FlexdpoError(
                f"{name}: its images were tokenised with a processor that is not here; give the same one as "
                "processing_class, or tokenise the data again"
            )
        inputs = reader.inputs(column, name)
        if _digest(inputs) != self.digest:
            raise FlexdpoError(
                f"{name}: {column['path'] or 'an image'} is not what it was when the data were tokenised; tokenise "
                "them again (FLEXDPO_CACHE=/another/folder, or datasets.disable_caching())"
            )
        return inputs


def images_of_row(row: Mapping[str, Any]) -> tuple[tuple[PromptImage, ...], int]:
    """The images of a tokenised row, and the id of their tokens; none and -1 where it has none."""
    columns = row.get(IMAGES_COLUMN) or ()
    images = tuple(StoredImage(each, f"row {row['row']}") for each in columns)
    return images, columns[0]["token_id"] if columns else -1


def told_of_images(table: Any) -> list[list[dict[str, Any]]]:
    """Digest, tokens and their id of each row's images, from an Arrow table; what they look like stays where it is."""
    held = table.column(IMAGES_COLUMN).combine_chunks()
    names = ("digest", "tokens", "token_id")
    fields = [held.flatten().field(name).to_pylist() for name in names]
    each = [dict(zip(names, values, strict=True)) for values in zip(*fields, strict=True)]
    stops = held.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).cumsum().tolist()
    return [each[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
