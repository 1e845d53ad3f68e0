"""What a packed row's layout may come with in the call of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache

from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.layout.row import RowLayout

if TYPE_CHECKING:
    from torch import nn

# fmt: off
_TEXT_INPUTS = frozenset(
    (
        "input_ids", "inputs_embeds", "position_ids", "cache_position", "token_type_ids", "mm_token_type_ids",
        "logits_to_keep", "num_items_in_batch",
    )
)
# fmt: on


def require_match(layout: RowLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``FlexdpoError`` where a layout is not that of the tokens, or positions, that it came with."""
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    tokens = next((tensor for tensor in candidates if tensor is not None), None)
    if tokens is None:
        raise FlexdpoError("a packed row's layout came without input_ids; call model(**row.inputs())")
    if tokens.shape[:2] != layout.position_ids.shape:
        raise FlexdpoError(
            f"the layout is for {layout.batch_size} rows of {layout.length} tokens, but the inputs are "
            f"{list(tokens.shape[:2])}; pass the layout that belongs to these input_ids"
        )
    if tokens.device != layout.position_ids.device:
        raise FlexdpoError(
            f"the layout is on {layout.device} and the inputs on {tokens.device}; move the row with row.to(device)"
        )
    positions = kwargs.get("position_ids")
    if positions is not None and positions.shape[-2:] != layout.position_ids.shape:
        raise FlexdpoError(
            f"position_ids have the shape {list(positions.shape)}, but the layout is for {layout.batch_size} rows of "
            f"{layout.length} tokens; leave position_ids out, or pass those of the same row"
        )


def require_known_inputs(module: nn.Module, layout: RowLayout, kwargs: dict[str, Any]) -> None:
    """Raise where a layout came with what would have to be shared between responses, and nobody knows how.

    Raises ``FlexdpoError`` naming the argument, or ``UnsupportedModelError`` where the row has images and the model
    takes none.
    """
    if layout.images is not None and not hasattr(module, "_flexdpo_takes_images"):
        raise UnsupportedModelError(
            f"a packed row has images, and {type(module).__name__} has no get_image_features to encode them; choose a "
            "model of text and images, or leave the images out"
        )
    if kwargs.get("labels") is not None:
        raise FlexdpoError(
            "labels= would be compared with the token before each in the row, which may belong to another response; "
            "leave them out and use flexdpo.response_logps(model, row)"
        )
    pictured = layout.images.inputs if layout.images is not None else {}
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise FlexdpoError(
                f"a packed row came with {name}=, but it cannot be combined with a cache or with extra tokens; "
                "leave it out"
            )
        plain = value is None or isinstance(value, bool | int | float | str | RowLayout)
        if not plain and name not in _TEXT_INPUTS and name not in pictured:
            raise FlexdpoError(
                f"a packed row came with {name}=, which flexdpo does not know how to share between responses; "
                "packed rows hold text and the images of Group.images, so leave it out or train without flexdpo"
            )
