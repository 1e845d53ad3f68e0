"""Runs packed rows with images through a model of text and images: each distinct image is encoded once.

``prepare_model`` asks a model whether it encodes images by a ``get_image_features`` of its own; most do. On a row with
images (``layout.images``, :mod:`flexdpo.layout.images`) the model runs as ever, with the row's token ids and the inputs
of its distinct images, and three things are done around it:

- What ``get_image_features`` returns is handed out: one feature for each image token of the row, in row order, by
  ``layout.images.features``. The model puts them where its placeholders stand. What it adds in deeper layers (Qwen3-VL)
  is handed out alike. The tower itself runs without a layout, whatever its attention is.
- Positions in several dimensions are those that the model's own ``get_rope_index`` gives for each root path; where
  positions have one dimension, they are the logical ones as ever.
- The model is told which tokens are images (``token_type_ids``, ``mm_token_type_ids``), as its processor would; by that
  it decides whether images see themselves both ways (:attr:`flexdpo.attention.mask_mods.MaskKind.blocks`).

What stands in the call already, ``None`` included, is left as it is.

Shapes: ``B`` rows of ``S`` tokens, ``F`` features of all distinct images, ``P`` image tokens of the rows, hidden size
``H``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.forward_layout import packed_forward, without_layout
from flexdpo.layout.row import RowLayout
from flexdpo.layout.segments import Segments

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flexdpo.layout.images import RowImages

# arguments that say which tokens are images, 1 at these
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
# what models put into the embeddings, and what they add behind their first layers, one for each of these
_FEATURES, _DEEPER_FEATURES = "pooler_output", "deepstack_features"


def image_part(module: Any) -> Any:
    """The part of a model that encodes images and hands embeddings to its decoder; ``None`` where there is none."""
    inner = module.base_model
    return inner if hasattr(type(inner), "get_image_features") else None


def install_image_hooks(module: Any) -> None:
    """Let a model that takes layouts take those of rows with images, if it takes images. Safe to call again."""
    part = image_part(module)
    if part is None or hasattr(module, "_flexdpo_takes_images"):
        return
    part.get_image_features = _HandedOut(part)
    # before the hook that takes a row's layout
    module._flexdpo_takes_images = module.register_forward_pre_hook(
        _add_what_images_need, with_kwargs=True, prepend=True
    )


def remove_image_hooks(module: Any) -> None:
    """Undo :func:`install_image_hooks`. Safe to call again."""
    handle = module.__dict__.pop("_flexdpo_takes_images", None)
    if handle is not None:
        handle.remove()
        vars(image_part(module)).pop("get_image_features", None)


def _add_what_images_need(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    layout = kwargs.get("attention_mask")
    if not isinstance(layout, RowLayout) or layout.images is None:
        return None
    part, added = image_part(module), dict(kwargs)
    for name in _TOKEN_TYPES:
        if name in inspect.signature(type(part).forward).parameters:
            added.setdefault(name, (layout.images.features >= 0).long())
    positions = kwargs.get("position_ids")
    if hasattr(part, "get_rope_index") and (positions is None or positions.ndim == 2):
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        added["position_ids"] = rope_positions(part, input_ids, layout)
    return args, added


# --- features --------------------------------------------------------------------------------------------------------


class _HandedOut:
    """A part's ``get_image_features``, which on a packed row gives one feature for each image token."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encode = type(self.part).get_image_features
        forward = packed_forward()
        images = None if forward is None or forward.layout is None else forward.layout.images
        if forward is None or images is None:
            return encode(self.part, *args, **kwargs)
        with without_layout(self.part):
            output = encode(self.part, *args, **kwargs)
        forward.images_encoded = True
        return handed_out(output, images, type(self.part).__name__)


def handed_out(output: Any, images: RowImages, model: str) -> Any:
    """What a model made of the distinct images, for each image token of the rows.

    ``output`` is that of ``get_image_features`` and is changed in place; its features are a tensor ``[..., H]``, or one
    for each image.

    Raises:
        UnsupportedModelError: if the output has no features, or not as many as the images have tokens.
    """
    if getattr(output, _FEATURES, None) is None:
        raise UnsupportedModelError(
            f"{model}.get_image_features gives no {_FEATURES}, so flexdpo cannot hand its features out to the image "
            "tokens of a packed row; train this model without flexdpo"
        )
    index = images.features[images.features >= 0]
    output[_FEATURES] = _for_each_token(output[_FEATURES], index, images, model)
    deeper = getattr(output, _DEEPER_FEATURES, None)
    if deeper is not None:
        output[_DEEPER_FEATURES] = [_for_each_token(each, index, images, model) for each in deeper]
    return output


def _for_each_token(features: Any, index: Tensor, images: RowImages, model: str) -> Any:
    one = isinstance(features, torch.Tensor)
    parts = [each.reshape(-1, each.shape[-1]) for each in ([features] if one else features)]
    flat = torch.cat(parts)
    sizes = tuple(len(each) for each in parts)
    told = len(sizes) == len(images.counts)
    if len(flat) != sum(images.counts) or (told and sizes != images.counts):
        raise UnsupportedModelError(
            f"{model} makes {', '.join(map(str, sizes))} features of the distinct images of a packed row, which have "
            f"{', '.join(map(str, images.counts))} image tokens; flexdpo cannot tell which feature belongs to which"
        )
    # the gradients of what several tokens are given are added up in float32
    wide = torch.promote_types(flat.dtype, torch.float32)
    given = flat.to(wide)[index].to(flat.dtype)
    if one:
        return given if features.ndim == 2 else given[None]
    return [given]


# --- positions -------------------------------------------------------------------------------------------------------


def rope_positions(part: Any, input_ids: Tensor, layout: RowLayout) -> Tensor:
    """Positions that a model's own ``get_rope_index`` gives for each root path of rows with images.

    Found on the host, once for each model that runs the layout.

    Returns ``[C, B, S]`` in the model's ``C`` dimensions, 0 at padding.
    """
    memo = ("rope_positions", part)
    if memo not in layout.memo:
        with torch.inference_mode(False), torch.no_grad():
            layout.memo[memo] = _rope_positions(part, input_ids.cpu(), layout).to(layout.device)
    found: Tensor = layout.memo[memo]
    return found


def _rope_positions(part: Any, input_ids: Tensor, layout: RowLayout) -> Tensor:
    images = layout.on_host().images
    assert images is not None
    takes = inspect.signature(type(part).get_rope_index).parameters
    # what has one entry for each image
    inputs = {n: v.cpu() for n, v in images.inputs.items() if n in takes and len(v) == len(images.counts)}
    begins, image = (each.flatten() for each in images.first_tokens())
    positions: Tensor | None = None
    for bucket in Segments.of(layout).path_plan():
        tokens = torch.from_numpy(bucket.tokens)
        real, at = tokens >= 0, tokens.clamp(min=0)
        order = image[at][begins[at] & real]
        call = {
            "attention_mask": real.long(),
            **dict.fromkeys(_TOKEN_TYPES, (images.features.flatten()[at] >= 0).long() * real),
            **{name: value[order] for name, value in inputs.items()},
        }
        known = {name: value for name, value in call.items() if name in takes}
        found = part.get_rope_index(input_ids.flatten()[at], **known)[0]
        if positions is None:
            positions = found.new_zeros(len(found), layout.batch_size * layout.length)
        positions[:, tokens[real]] = found[:, real]
    assert positions is not None
    unfolded: Tensor = positions.unflatten(1, (layout.batch_size, layout.length))
    return unfolded
