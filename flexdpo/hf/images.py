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
from typing import Any

import torch
from torch import Tensor, nn

from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.draws import RandomState, can_run, left_as_it_is
from flexdpo.hf.forward_layout import TOKEN_TYPES, packed_forward, without_layout
from flexdpo.hf.randomness import WAY_OUT, called_random, mark_of
from flexdpo.hf.versions import TAKES_IMAGES
from flexdpo.layout.images import RowImages
from flexdpo.layout.row import RowLayout
from flexdpo.layout.scan_plan import ScanCost, path_plan
from flexdpo.layout.segments import Segments

# what models put into the embeddings, and what they add behind their first layers, one for each of these
_FEATURES, _DEEPER_FEATURES = "pooler_output", "deepstack_features"


def image_part(module: Any) -> Any:
    """The part of a model that encodes images and hands embeddings to its decoder; ``None`` where there is none."""
    return module.base_model if TAKES_IMAGES and looks_at_images(module) else None


def looks_at_images(module: Any) -> bool:
    """Whether a part of a model encodes images."""
    return hasattr(type(module.base_model), "get_image_features")


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
    for name in TOKEN_TYPES:
        if name in inspect.signature(type(part).forward).parameters:
            added.setdefault(name, (layout.images.features >= 0).long())
    positions = kwargs.get("position_ids")
    if hasattr(part, "get_rope_index") and (positions is None or positions.ndim == 2):
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        added["position_ids"] = rope_positions(part, input_ids, layout)
    return args, added


class _HandedOut:
    """A part's ``get_image_features``, which on a packed row gives one feature for each image token."""

    def __init__(self, part: Any) -> None:
        self.part = part

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() encodes images ahead, with the arguments that it finds here
        return inspect.signature(type(self.part).get_image_features.__get__(self.part))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encode = type(self.part).get_image_features
        forward = packed_forward()
        images = None if forward is None else forward.layout.images
        if forward is None or images is None:
            return encode(self.part, *args, **kwargs)
        before = RandomState.now() if self.part.training and not torch.compiler.is_compiling() else None
        with without_layout(self.part):
            output = encode(self.part, *args, **kwargs)
        if before is not None and RandomState.now().differs(before) and _draws(self.part, args, kwargs):
            raise UnsupportedModelError(
                f"{type(self.part).__name__} draws random numbers while it encodes images, and an image that several "
                f"responses share would be drawn once where an ordinary run draws for each; {WAY_OUT}"
            )
        forward.images_encoded = True
        return handed_out(output, images, type(self.part).__name__)


def handed_out(output: Any, images: RowImages, model: str) -> Any:
    """What a model made of the distinct images, for each image token of the rows.

    ``output`` is that of ``get_image_features`` and is changed in place; its features are a tensor ``[..., H]``, or one
    for each image.

    Raises:
        UnsupportedModelError: if the output has no features, or not as many as the images have tokens.
    """
    # an attribute, which some versions set where no key is
    features = getattr(output, _FEATURES, None)
    if features is None:
        raise UnsupportedModelError(
            f"{model}.get_image_features gives no {_FEATURES}, so flexdpo cannot hand its features out to the image "
            "tokens of a packed row; train this model without flexdpo"
        )
    index = images.features[images.features >= 0]
    output._flexdpo_encoded = features
    setattr(output, _FEATURES, _for_each_token(features, index, images, model))
    deeper = getattr(output, _DEEPER_FEATURES, None)
    if deeper is not None:
        setattr(output, _DEEPER_FEATURES, [_for_each_token(each, index, images, model) for each in deeper])
    return output


def encoded_features(output: Any) -> tuple[str, Tensor, bool] | None:
    """The features of the distinct images in what a model returns of its encoder.

    Returns the name they have there, the features ``[F, H]``, and whether the model has one tensor for all images.
    """
    encoded = getattr(output, "_flexdpo_encoded", None)
    if encoded is None:
        return None
    one = isinstance(encoded, torch.Tensor)
    return _FEATURES, torch.cat([each.reshape(-1, each.shape[-1]) for each in ([encoded] if one else encoded)]), one


def tokens_of_images(part: Any, inputs: dict[str, Tensor]) -> int:
    """Ask a model how many tokens stand for some images; the caller puts back what it changes."""
    with torch.no_grad():
        features = getattr(type(part).get_image_features(part, **_taken(part, inputs)), _FEATURES)
    parts = [features] if isinstance(features, torch.Tensor) else features
    return sum(each.shape[:-1].numel() for each in parts)


def encoder_draws(part: Any, inputs: dict[str, Tensor], known: dict[int, bool]) -> bool:
    """Whether encoding images draws random numbers, in the mode and with the settings that a model has now.

    What was asked is remembered in ``known``. One that cannot run now is judged by what its settings are called.
    """
    if not any(module.training for module in part.modules()):
        return False
    mark = mark_of(part)
    if mark not in known:
        known[mark] = bool(called_random(part)) if not can_run(part) else _draws(part, (), _taken(part, inputs))
    return known[mark]


def _draws(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # others may draw meanwhile: it must be this model again and again
    with left_as_it_is(part, None), torch.no_grad(), without_layout(part):
        for _ in range(3):
            before = RandomState.now()
            type(part).get_image_features(part, *args, **kwargs)
            if not RandomState.now().differs(before):
                return False
    return True


def _taken(part: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What of the images' inputs the encoder itself is given."""
    names = inspect.signature(inspect.unwrap(type(part).get_image_features)).parameters
    return {"return_dict": True, **{name: value for name, value in inputs.items() if name in names}}


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
    # what has one entry for each image
    inputs = {n: v.cpu() for n, v in images.inputs.items() if len(v) == len(images.counts)}
    begins, image = (each.flatten() for each in images.first_tokens())
    positions: Tensor | None = None
    for bucket in path_plan(Segments.of(layout), ScanCost()).levels[0]:
        tokens = torch.from_numpy(bucket.tokens)
        real, at = tokens >= 0, tokens.clamp(min=0)
        order = image[at][begins[at] & real]
        is_image = (images.features.flatten()[at] >= 0) & real
        found = rope_index(part, input_ids.flatten()[at], real, is_image, {n: v[order] for n, v in inputs.items()})
        if positions is None:
            positions = found.new_zeros(len(found), layout.batch_size * layout.length)
        positions[:, tokens[real]] = found[:, real]
    assert positions is not None
    unfolded: Tensor = positions.unflatten(1, (layout.batch_size, layout.length))
    return unfolded


def rope_index(part: Any, input_ids: Tensor, real: Tensor, is_image: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Positions that a model gives to the sequences of a padded batch.

    ``real`` and ``is_image``, ``[N, T]`` bool, tell tokens from padding and images from text; ``inputs`` those of the
    images, in the order of their tokens. Returns ``[C, N, T]``.
    """
    call = {"attention_mask": real.long(), **dict.fromkeys(TOKEN_TYPES, is_image.long()), **inputs}
    takes = inspect.signature(type(part).get_rope_index).parameters
    with torch.no_grad():
        found: Tensor = part.get_rope_index(input_ids, **{n: v for n, v in call.items() if n in takes})[0]
    return found
