"""Processors of tiny models that see, made in place without torchvision, their models, and rows with drawn pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.conftest import VOCABULARY, strengthen

# one word for each turn, so that prompts of different lengths differ
TEMPLATE = (
    "{% for m in messages %} w3 {% for part in m['content'] %}{% if part['type'] == 'image' %} IMAGE {% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% if m['role'] == 'assistant' %} </s> {% endif %} w4 {% endfor %}"
    "{% if add_generation_prompt %} w3 {% endif %}"
)


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    names = {1: "<s>", 2: "</s>"}  # w1 would be found within w11
    words = Tokenizer(models.WordLevel({names.get(i, f"w{i}"): i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def llava_processor() -> Any:
    """Four tokens an image."""
    side = {"height": 28, "width": 28}
    return transformers.LlavaProcessor(
        LlavaImageProcessorPil(size=side, crop_size=side),
        _tokenizer("<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


class QwenProcessor(transformers.Qwen2VLProcessor):
    """Without a video processor, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(
            tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen_processor() -> Any:
    """A token for each 8 pixels squared of an image."""
    size = {"shortest_edge": 8 * 8, "longest_edge": 8 * 8 * 30}
    return QwenProcessor(
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size),
        _tokenizer("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"),
        TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


_TEXT = {
    "vocab_size": VOCABULARY + 7,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def llava_model() -> Any:
    """The model of :func:`llava_processor`, with weights that all show in the result."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=VOCABULARY,
        image_seq_length=4,
        vision_feature_layer=-2,
    )
    return _made(transformers.LlavaForConditionalGeneration, config)


def qwen_model() -> Any:
    """The model of :func:`qwen_processor`."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        vision_config={**vision, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={
            **_TEXT,
            "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_start_token_id=VOCABULARY,
        image_token_id=VOCABULARY + 1,
        video_token_id=VOCABULARY + 2,
        vision_end_token_id=VOCABULARY + 3,
    )
    return _made(transformers.Qwen2VLForConditionalGeneration, config)


def _made(kind: Callable[[Any], Any], config: Any) -> Any:
    torch.manual_seed(0)
    return strengthen(kind(config), 0)


def picture(seed: int, width: int = 30, height: int = 24) -> Image.Image:
    """Noise, which no two seeds share."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def words(rng: np.random.Generator, low: int, high: int) -> str:
    """Text of so many words."""
    return " ".join(f"w{i}" for i in rng.integers(5, VOCABULARY, rng.integers(low, high)))


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """Prompts that differ in the image alone, one image in several prompts, several in one, none, several turns."""
    rng = np.random.default_rng(seed)
    asked, a, b, c = words(rng, 3, 5), picture(1), picture(2), picture(3, 40, 20)
    two = [{"type": "image"}, {"type": "text", "text": "w7 w8"}, {"type": "image"}]
    turns = [
        {"role": "user", "content": words(rng, 2, 4)},
        {"role": "assistant", "content": "w9 w9"},
        {"role": "user", "content": words(rng, 2, 4)},
    ]
    prompts: list[tuple[Any, list[Image.Image]]] = [
        ([{"role": "user", "content": asked}], [a]),
        ([{"role": "user", "content": asked}], [b]),
        ([{"role": "user", "content": two}], [c, a]),
        ([{"role": "user", "content": asked}], []),
        (turns, [b]),
    ]
    return [
        {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": "w11 " + words(rng, 2, 7)}],
            "rejected": [{"role": "assistant", "content": "w11 " + words(rng, 2, 7)}],
            "images": images,
        }
        for prompt, images in prompts
    ]


def in_parts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with all messages in parts, since a column of a dataset holds texts or lists."""
    found = []
    for row in rows:
        waiting = [] if isinstance(row["prompt"][0]["content"], list) else row["images"]
        parted = {}
        for column in ("prompt", "chosen", "rejected"):
            parted[column] = []
            for message in row[column]:
                content = message["content"]
                if isinstance(content, str):
                    content = [*({"type": "image"} for _ in waiting), {"type": "text", "text": content}]
                    waiting = []
                parted[column].append({**message, "content": content})
        found.append({**row, **parted})
    return found


def written_rows(folder: Path, count: int = 10) -> Path:
    """A file of rows beside the pictures that it names by relative paths."""
    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(1)
    lines = []
    for number in range(count):
        path = f"pictures/{number % 4}.png"
        picture(number % 4).save(folder / path)
        chosen, rejected = ([{"role": "assistant", "content": words(rng, 2, 7)}] for _ in range(2))
        prompt = [{"role": "user", "content": words(rng, 2, 4)}]
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": [path]}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
