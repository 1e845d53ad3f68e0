"""A processor for each kind of model in ``tests/images/models.py``, made in place without torchvision."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any, NamedTuple
from unittest.mock import patch

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from tests.images.models import BEGIN, BREAK, END, IMAGE, VOCABULARY
from tests.images.processors import TEMPLATE

# what tokenizers of these models call their special tokens; ids from the first on
_SPECIAL = {
    IMAGE: ("<image>", "image_token", "context_image_token"),
    BEGIN: ("<begin>", "boi_token", "start_image_token", "vision_start_token"),
    END: ("<end>", "eoi_token", "end_image_token", "vision_end_token"),
    BREAK: ("<break>",),
    BREAK + 1: ("<|video|>", "video_token"),
    BREAK + 2: ("<fake_token_around_image>", "fake_image_token", "boa_token"),
    BREAK + 3: ("<global-img>", "global_image_token", "eoa_token"),
    BREAK + 4: ("<end_of_utterance>", "end_of_utterance_token"),
}
_SQUARE = {"height": 16, "width": 16}
_PARTS = {"size": {"shortest_edge": 16}, "crop_size": _SQUARE, "image_grid_pinpoints": [[16, 32], [32, 16]]}
_GRID = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
_GRID["size"] = {"shortest_edge": 64, "longest_edge": 64 * 12}
_SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
_TILES = {"size": _SQUARE, "min_patches": 1, "max_patches": 3}


class _Kind(NamedTuple):
    processor: tuple[str, str]  # the folder in transformers, and the class
    images: tuple[str, str]  # the same of the image processor
    image_settings: dict[str, Any]
    settings: dict[str, Any]
    place: str = "<image>"  # what its template writes for an image


_QWEN_PLACE = "<begin><image><end>"
PROCESSORS = {
    "llava_next": _Kind(
        ("llava_next", "LlavaNextProcessor"),
        ("llava_next", "LlavaNextImageProcessorPil"),
        _PARTS,
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": _Kind(
        ("llava_onevision", "LlavaOnevisionProcessor"),
        ("llava_onevision", "LlavaOnevisionImageProcessorPil"),
        {**_PARTS, "size": _SQUARE, "crop_size": None},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_5_vl": _Kind(
        ("qwen2_5_vl", "Qwen2_5_VLProcessor"), ("qwen2_vl", "Qwen2VLImageProcessorPil"), _GRID, {}, _QWEN_PLACE
    ),
    "qwen3_vl": _Kind(
        ("qwen3_vl", "Qwen3VLProcessor"), ("qwen2_vl", "Qwen2VLImageProcessorPil"), _GRID, {}, _QWEN_PLACE
    ),
    "gemma3": _Kind(
        ("gemma3", "Gemma3Processor"),
        ("gemma3", "Gemma3ImageProcessorPil"),
        {"size": _SQUARE},
        {"image_seq_length": 4},
        "<begin>",
    ),
    "gemma4": _Kind(
        ("gemma4", "Gemma4Processor"),
        ("gemma4", "Gemma4ImageProcessorPil"),
        {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2},
        {},
    ),
    "idefics3": _Kind(
        ("idefics3", "Idefics3Processor"), ("idefics3", "Idefics3ImageProcessorPil"), _SPLIT, {"image_seq_len": 4}
    ),
    "smolvlm": _Kind(
        ("smolvlm", "SmolVLMProcessor"), ("smolvlm", "SmolVLMImageProcessorPil"), _SPLIT, {"image_seq_len": 4}
    ),
    "internvl": _Kind(
        ("internvl", "InternVLProcessor"), ("got_ocr2", "GotOcr2ImageProcessorPil"), _TILES, {"image_seq_length": 4}
    ),
    "mistral3": _Kind(
        ("pixtral", "PixtralProcessor"),
        ("pixtral", "PixtralImageProcessorPil"),
        {"size": {"longest_edge": 32}, "patch_size": {"height": 4, "width": 4}},
        {"patch_size": 4, "spatial_merge_size": 2, "image_token": "<image>", "image_break_token": "<break>",
         "image_end_token": "<end>"},
    ),
}  # fmt: skip


class _SeesOnly(ProcessorMixin):
    """Without what reads videos, which needs torchvision, and sounds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{name: value for name, value in kwargs.items() if value is not None})

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def processor_of(name: str) -> Any:
    """That of the model ``make_model(name)``."""
    kind = PROCESSORS[name]
    images = getattr(_module(kind.images[0], "image_processing_pil"), kind.images[1])(**kind.image_settings)
    real = _processor_class(*kind.processor)
    # some ask what reads videos
    own = {"apply_chat_template": ProcessorMixin.apply_chat_template}
    taken = inspect.signature(real.__init__).parameters
    missing = {name: None for name in ("video_processor", "feature_extractor") if name in taken}
    template = TEMPLATE.replace("IMAGE", kind.place)
    seeing = type(real.__name__, (real, _SeesOnly), own)
    return seeing(image_processor=images, tokenizer=_tokenizer(), chat_template=template, **missing, **kind.settings)


def _processor_class(folder: str, name: str) -> Any:
    """Also where its module reads the image processor that needs torchvision, or asks for words of numbers."""
    if folder == "pixtral":
        beside = "transformers.models.pixtral.image_processing_pixtral"
        with patch.dict(sys.modules, {beside: _module(folder, "image_processing_pil")}):
            module = _module(folder, "processing")
    else:
        module = _module(folder, "processing")
    if getattr(module, "num2words", True) is None:
        module.num2words = str
    return getattr(module, name)


def _module(folder: str, of: str) -> Any:
    return importlib.import_module(f"transformers.models.{folder}.{of}_{folder}")


def _tokenizer() -> Any:
    names = {1: "<s>", 2: "</s>", **{i: names[0] for i, names in _SPECIAL.items()}}
    words = Tokenizer(WordLevel({names.get(i, f"w{i}"): i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="w0",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={called: names[0] for names in _SPECIAL.values() for called in names[1:]},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [names[0] for names in _SPECIAL.values()]})
    return tokenizer
