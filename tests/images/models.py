"""Tiny models of text and images, one of each kind, and images as their processors would hand them over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from flexdpo.layout.groups import PromptImage

IMAGE, BEGIN, END, BREAK = 120, 121, 122, 123
VOCABULARY = 128
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def pixels(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def digest_of(inputs: dict[str, torch.Tensor]) -> str:
    return str({name: (list(value.shape), value.numpy().tobytes()) for name, value in inputs.items()})


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    make: Callable[[], Any]  # the model
    # of a seed and a size from 0 to 1: what its processor makes of one image, and the tokens that stand for it
    image: Callable[[int, int], tuple[dict[str, torch.Tensor], list[int]]]
    types: str | None = None  # the argument that says which tokens are images
    left: bool = True  # whether its stock run is right with padding on the left
    nested: bool = False  # whether a batch holds the images of each row side by side

    def picture(self, seed: int, size: int = 0) -> tuple[PromptImage, list[int]]:
        """An image, and the tokens that stand for it in a prompt."""
        inputs, tokens = self.image(seed, size)
        return PromptImage(digest_of(inputs), tokens.count(IMAGE), inputs), tokens


def block(count: int) -> list[int]:
    return [BEGIN, *[IMAGE] * count, END]


# --- one part of fixed size ------------------------------------------------------------------------------------------


def clip_llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def square(count: int, side: int = 16) -> Callable[[int, int], Any]:
    def image(seed: int, size: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        return {"pixel_values": pixels(seed, 1, 3, side, side)}, block(count)

    return image


def internvl() -> Any:
    vision = transformers.InternVLVisionConfig(
        **{**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}, use_qk_norm=False
    )
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.InternVLForConditionalGeneration(config)


def tiles(count: int) -> Callable[[int, int], Any]:
    """As many tiles as the size says and one more, in one block."""

    def image(seed: int, size: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        return {"pixel_values": pixels(seed, size + 1, 3, 16, 16)}, block(count * (size + 1))

    return image


def gemma3() -> Any:
    text = transformers.Gemma3TextConfig(
        **{**TEXT, "num_hidden_layers": 3},
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=7,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        text_config=text,
        image_token_id=IMAGE,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4() -> Any:
    text = transformers.Gemma4TextConfig(
        **{**TEXT, "num_hidden_layers": 3},
        head_dim=8,
        global_head_dim=8,
        sliding_window=7,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
        use_bidirectional_attention="vision",
    )
    vision = transformers.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        pooling_kernel_size=2,
        position_embedding_size=64,
    )
    config = transformers.Gemma4Config(
        vision_config=vision, text_config=text, audio_config=None, image_token_id=IMAGE, boi_token_id=BEGIN
    )
    return transformers.Gemma4ForConditionalGeneration(config)


def patched(seed: int, size: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Of 4 x 4 or 4 x 6 patches in room for 24, padding at -1; four patches to a token."""
    height, width = 4, 4 + 2 * size
    places = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), dim=-1).reshape(
        1, -1, 2
    )
    missing = 24 - places.shape[1]
    values = pixels(seed, 1, 24, 48)
    values[:, 24 - missing :] = 0
    inputs = {
        "pixel_values": values,
        "image_position_ids": torch.nn.functional.pad(places, (0, 0, 0, missing), value=-1),
    }
    return inputs, block(height * width // 4)


# --- sizes of their own ----------------------------------------------------------------------------------------------


def qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        image_token_id=IMAGE, vision_start_token_id=BEGIN, vision_end_token_id=END, video_token_id=124,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32, "num_heads": 2,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE, vision_start_token_id=BEGIN, vision_end_token_id=END, video_token_id=124,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32, "num_heads": 2,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE, vision_start_token_id=BEGIN, vision_end_token_id=END, video_token_id=124,
    )  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(config)


def grid(seed: int, size: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Of 4 x 4 or 4 x 8 patches, four to a token."""
    height, width = 4, 4 + 4 * size
    inputs = {
        "pixel_values": pixels(seed, height * width, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
    return inputs, block(height * width // 4)


def llava_next() -> Any:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16]],
        vision_feature_layer=-2,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> Any:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=124,
        image_grid_pinpoints=[[16, 32], [32, 16]],
        vision_feature_layer=-1,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def anyres(seed: int, size: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A whole view and two parts of 4 x 4 patches, side by side or one above the other, and a newline for each line."""
    sizes = [32, 16] if size else [16, 32]
    lines, columns = sizes[0] // 4, sizes[1] // 4
    inputs = {"pixel_values": pixels(seed, 1, 3, 3, 16, 16), "image_sizes": torch.tensor([sizes])}
    return inputs, block(16 + lines * (columns + 1))


def mistral3() -> Any:
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**{**TOWER, "image_size": 32}, head_dim=16),
        text_config=transformers.MistralConfig(**TEXT, head_dim=8, sliding_window=None),
        image_token_id=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def lines(seed: int, size: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Of 16 x 16 or 16 x 24 pixels: lines of tokens with a break behind each but the last."""
    height, width = 16, 16 + 8 * size
    inputs = {"pixel_values": pixels(seed, 1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}
    line = [*[IMAGE] * (width // 8), BREAK]
    return inputs, [*(line * (height // 8))[:-1], END]


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        vision_config={**TOWER, "patch_size": 4},
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def smolvlm() -> Any:
    config = transformers.SmolVLMConfig(
        vision_config={**TOWER, "patch_size": 4},
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def split_tiles(seed: int, size: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """One tile, or two of which each has its own block."""
    count = 1 + size
    mask = torch.ones(1, count, 16, 16, dtype=torch.long)
    mask[:, :, 12:] = 0
    inputs = {"pixel_values": pixels(seed, 1, count, 3, 16, 16), "pixel_attention_mask": mask}
    return inputs, block(4) * count


KINDS = {
    "llava": Kind(clip_llava, square(16)),
    "llava_next": Kind(llava_next, anyres),
    "llava_onevision": Kind(llava_onevision, anyres),
    "qwen2_vl": Kind(qwen2_vl, grid, "mm_token_type_ids"),
    "qwen2_5_vl": Kind(qwen2_5_vl, grid, "mm_token_type_ids"),
    "qwen3_vl": Kind(qwen3_vl, grid, "mm_token_type_ids"),
    "gemma3": Kind(gemma3, square(4), "token_type_ids"),
    "gemma4": Kind(gemma4, patched, "mm_token_type_ids"),
    "idefics3": Kind(idefics3, split_tiles, nested=True),
    "smolvlm": Kind(smolvlm, split_tiles, nested=True),
    "internvl": Kind(internvl, tiles(4)),
    "mistral3": Kind(mistral3, lines),
}


def make_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A tiny model in train mode, its weights large enough that everything depends on everything."""
    torch.manual_seed(seed)
    model = KINDS[name].make().to(dtype).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.15 * noise).to(dtype))
    return model


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(8, 110, count).tolist()
