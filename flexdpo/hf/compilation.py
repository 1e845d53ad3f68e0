"""Regional compilation: each decoder layer on its own, so that one compiled layer serves them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexdpo.attention.flex import sizes_told_apart
from flexdpo.attention.inputs import AttentionCall
from flexdpo.attention.kernels import attention_call_of
from flexdpo.attention.row_mask import RowMask, row_mask_of
from flexdpo.attention.selftest import is_compared, require_correct_call
from flexdpo.errors import FlexdpoError
from flexdpo.hf.unwrap import backbone_of, unwrap_model

# a length counts up to four times: with gradients, and without them, of the policy and of its reference. Past torch's
# limit of 8 a layer would run uncompiled, with no more than a warning
_MOST_VARIANTS = 96


def compile_decoder_layers(model: nn.Module, *, dynamic: bool = True, **options: Any) -> int:
    """Compile the decoder layers of a prepared model, in place and one by one.

    Layers are alike, so the first one compiled serves the others; the mask is made outside of them, once per row. On
    CUDA the attention is compiled into the layer, and before a layer first runs under a mask, its kernel is compared
    with dense attention by itself: the same FlexAttention with the same mask, options, heads and dtype. Where attention
    runs in query blocks (CPU training) the layer pauses for it.

    Args:
        model: After :func:`flexdpo.prepare_model`, before DDP or FSDP wrap it.
        dynamic: One compiled layer for all row lengths; with ``False`` one for each, for rows padded to few lengths.
        options: For ``torch.compile``: ``mode``, ``backend``, ``options``.

    Returns how many layers were found. Raises ``FlexdpoError`` if the model keeps them nowhere that is known.
    """
    layers = decoder_layers(model)
    if layers is None:
        raise FlexdpoError(
            f"{type(backbone_of(unwrap_model(model))).__name__} keeps its decoder layers under another name than "
            "layers, h or blocks, so they cannot be compiled one by one; leave compilation off"
        )
    if not dynamic:
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    for layer in layers:
        layer.compile(dynamic=dynamic, **options)
        compiled = layer._compiled_call_impl
        assert compiled is not None
        layer._compiled_call_impl = _CompiledLayer(layer, compiled, dynamic)
    return len(layers)


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The decoder layers of a model, or ``None`` where it keeps them under no name that is known."""
    backbone = backbone_of(unwrap_model(model))
    layers = next((found for name in ("layers", "h", "blocks") if (found := getattr(backbone, name, None))), None)
    return layers if isinstance(layers, torch.nn.ModuleList) else None


@dataclass(eq=False)
class _CompiledLayer:
    """A layer's compiled call, with the self-test of its attention before it."""

    layer: nn.Module  # the layer
    compiled: Callable[..., Any]  # what torch made of its call
    dynamic: bool  # whether that serves all row lengths
    # what the layer asks of its attention, by autocast's dtype; looked up by running it up to there once. All processes
    # of a sharded model do so at the layer's first call, and only then.
    calls: dict[torch.dtype | None, AttentionCall | None] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.compiled(*args, **kwargs)
        for row_mask in filter(None, map(row_mask_of, (*args, *kwargs.values()))):
            layout = row_mask.layout
            if not (layout.keys is layout.kept is layout.shard is None):
                # what the parts of a row hand on to each other would be guarded and copied by a graph
                return self.layer._call_impl(*args, **kwargs)
            # other kernels stay out of graphs, and are compared where they are called
            if row_mask.impl == "flex" and is_compared(row_mask, layout.device):
                self._require_correct(row_mask, args, kwargs)
        with sizes_told_apart():
            return self.compiled(*args, **kwargs)

    def _require_correct(self, row_mask: RowMask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device = row_mask.layout.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if autocast not in self.calls:
            self.calls[autocast] = attention_call_of(lambda: self.layer._call_impl(*args, **kwargs))
        call = self.calls[autocast]
        if call is None:
            return
        # the kernel inside of the layer serves the lengths that the layer serves
        settings = dataclasses.replace(row_mask.settings, lengths="dynamic" if self.dynamic else "bucket")
        inputs = (*args, *kwargs.values(), *self.layer.parameters())
        grad = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        require_correct_call(call, dataclasses.replace(row_mask, settings=settings), grad=grad)
        row_mask.tested = True
