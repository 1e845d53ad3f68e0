"""Regional compilation: each decoder layer on its own, so that one compiled layer serves them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.hf.rules import backbone_of, unwrap_model

if TYPE_CHECKING:
    from torch import nn


# a length counts up to four times: with gradients, and without them, of the policy and of its reference. Past torch's
# limit of 8 a layer would run uncompiled, with no more than a warning
_MOST_VARIANTS = 96


def compile_decoder_layers(model: nn.Module, *, dynamic: bool = True, **options: Any) -> int:
    """Compile the decoder layers of a prepared model, in place and one by one.

    Layers are alike, so the first one compiled serves the others; the mask is made outside of them, once per row. On
    CUDA the attention is compiled into the layer. Where attention runs in pieces (CPU training) the layer pauses for
    it. The self-test of the first row does not reach into a compiled layer.

    Args:
        model: After :func:`flexdpo.prepare_model`, before DDP or FSDP wrap it.
        dynamic: One compiled layer for all row lengths; with ``False`` one for each, for rows padded to few lengths.
        options: For ``torch.compile``: ``mode``, ``backend``, ``options``.

    Returns:
        How many layers were found.

    Raises:
        FlexdpoError: if the model keeps its layers nowhere that is known.
    """
    backbone = backbone_of(unwrap_model(model))
    layers = next((found for name in ("layers", "h", "blocks") if (found := getattr(backbone, name, None))), None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise FlexdpoError(
            f"{type(backbone).__name__} keeps its decoder layers under another name than layers, h or blocks, so they "
            "cannot be compiled one by one; leave compilation off"
        )
    if not dynamic:
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    for layer in layers:
        layer.compile(dynamic=dynamic, **options)
    return len(layers)
