"""Carries a row's layout from the model call to the attention mask, for the duration of one forward.

The layout arrives as the model's ``attention_mask``. A forward pre-hook takes it out, holds it and leaves a 2-D mask of
the real tokens; the mask function of :mod:`flexdpo.hf.interface` finds it here. A checkpoint that reruns the whole
model passes the layout again; one that reruns a layer passes the mask itself. So nothing depends on what was held
before, and each thread holds its own: what the backward pass runs again in a thread of its own finds what it needs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from flexdpo.attention.row_mask import Impl
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.draws import RandomState, in_thread
from flexdpo.hf.randomness import refuse_draws
from flexdpo.hf.row_dependence import BufferVersions, LengthLimits, refuse_statistics, require_own_lengths
from flexdpo.hf.unwrap import REPLICAS, backbone_of
from flexdpo.layout.row import RowLayout

ATTN_IMPLEMENTATION = "flexdpo"
# arguments that say which tokens are images, 1 at these
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
# set once a packed row ran uncompiled, without and with gradients
_TESTED = ("_flexdpo_tested", "_flexdpo_tested_with_gradients")


@dataclass(frozen=True)
class MixingLayers:
    """What of a model mixes tokens."""

    attends: bool = True  # whether any layer has attention
    stateful: int = 0  # modules that carry a state from token to token


@dataclass(eq=False)
class PackedForward:
    """The layout of one forward in progress."""

    module: Any  # the model that took the layout
    layout: RowLayout  # the batch of rows being run
    impl: Impl  # the kernel that was asked for
    attention_ran: bool = False  # whether our attention function ran under a mask of this layout
    brings_token_types: bool = False  # whether the call says which tokens are images
    # of the random number generators when it began; ``None`` where Dynamo traces the hooks
    states: RandomState | None = None
    buffers: BufferVersions = field(default_factory=dict)  # which they were when it began
    inputs: dict[str, Any] = field(default_factory=dict)  # its token ids or embeddings
    mixed: set[int] = field(default_factory=set)  # ids of the modules that carried their state along the trie
    images_encoded: bool = False  # whether the model's features of the row's images were handed out

    def tested(self, grad: bool) -> bool:
        """Whether the model's kernels went through their self-test, in an uncompiled run in this gradient mode."""
        return bool(getattr(self.module, _TESTED[grad], False))

    def mark_tested(self, grad: bool) -> None:
        """Remember that a kernel of the model passed, for whoever compiles the model as a whole."""
        if not self.tested(grad):
            setattr(self.module, _TESTED[grad], True)


@dataclass(eq=False)
class _WithoutLayout:
    """What runs without a row in between: another prepared model, or a part of one that knows no rows."""

    module: Any
    along_paths: bool = False  # whether it is a part that runs along the path to each leaf


class _Forwards(threading.local):
    """The forwards in progress in each thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[PackedForward | _WithoutLayout] = []


_forwards = _Forwards()


def packed_forward() -> PackedForward | None:
    """Return the packed forward in progress in this thread, or ``None`` when a model runs without a layout."""
    if in_thread.asking:
        return None
    forward = _forwards.stack[-1] if _forwards.stack else None
    return forward if isinstance(forward, PackedForward) else None


@contextlib.contextmanager
def without_layout(module: nn.Module, *, along_paths: bool = False) -> Iterator[None]:
    """Hold no layout while a part of a model runs that knows no rows, or ``along_paths`` to each leaf, as ever."""
    forward = _WithoutLayout(module, along_paths)
    _forwards.stack.append(forward)
    try:
        yield
    finally:
        _forwards.stack.remove(forward)


def runs_along_paths() -> bool:
    """Whether a part of a model runs along the path to each leaf in this thread."""
    forward = _forwards.stack[-1] if _forwards.stack else None
    return isinstance(forward, _WithoutLayout) and forward.along_paths


def install_layout_hooks(module: nn.Module, impl: Impl) -> None:
    """Let ``module`` take a :class:`~flexdpo.layout.row.RowLayout` as its ``attention_mask``. Safe to call again."""
    already = hasattr(module, "_flexdpo_impl")
    module._flexdpo_impl = impl  # type: ignore[assignment]
    if not already:
        module._flexdpo_hooks = (  # type: ignore[assignment]
            module.register_forward_pre_hook(_take_layout, with_kwargs=True),
            module.register_forward_hook(_release_layout, with_kwargs=True, always_call=True),
        )


def remove_layout_hooks(module: nn.Module) -> None:
    """Undo :func:`install_layout_hooks`. Safe to call again."""
    for handle in module.__dict__.pop("_flexdpo_hooks", ()):
        handle.remove()
    for name in (
        "_flexdpo_impl",
        "_flexdpo_harmless",
        "_flexdpo_counts",
        "_flexdpo_limits",
        "_flexdpo_mixing",
        *_TESTED,
    ):
        module.__dict__.pop(name, None)
    for part in module.modules():
        part.__dict__.pop("_flexdpo_mixes", None)


def _take_layout(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layout = kwargs.get("attention_mask")
    if not isinstance(layout, RowLayout):
        if any(isinstance(arg, RowLayout) for arg in args):
            raise FlexdpoError("pass a row by name, model(**row.inputs()); its layout came as a positional argument")
        _forget_interrupted(module)
        _require_positions(module, args, kwargs)
        # a held layout is kept from a model that runs without one: its own backbone inherits it, nobody else does
        if _forwards.stack and not any(part is module for part in _forwards.stack[-1].module.modules()):
            _forwards.stack.append(_WithoutLayout(module))
        return None if (whole := _with_all_positions(module, kwargs)) is kwargs else (args, whole)
    if getattr(module, "_is_replica", False):
        raise UnsupportedModelError(REPLICAS)
    _require_inputs(module, layout, args, kwargs)
    limits: LengthLimits = module._flexdpo_limits  # type: ignore[assignment]
    require_own_lengths(limits, layout, type(module).__name__)
    kwargs = _with_all_positions(module, kwargs)
    kwargs = dict(kwargs, attention_mask=_two_dimensional_mask(module, layout, kwargs))
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = layout.position_ids
    impl: Impl = module._flexdpo_impl  # type: ignore[assignment]
    _forget_interrupted(module)
    types = any(kwargs.get(name) is not None for name in TOKEN_TYPES)
    forward = PackedForward(module, layout, impl, brings_token_types=types)
    if not torch.compiler.is_compiling():
        named = {name: kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None}
        named = named or {"input_ids": args[0]}
        # by row indices a row may be longer than the model's table of positions
        forward.states, forward.inputs = RandomState.now(), {**named, "position_ids": kwargs["position_ids"]}
        forward.buffers = _buffer_versions(module)
    _forwards.stack.append(forward)
    return args, kwargs


def _with_all_positions(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let a backbone run all positions, where its head was asked for the last ones alone and will take them itself.

    A backbone that drops them early (Gemma 4, where layers share keys) cuts its mask down to fit, and asks for the name
    of its attention to know whether it may: our name is not among those that it knows.
    """
    kept = kwargs.get("logits_to_keep")
    if isinstance(kept, int) and kept and module.get_output_embeddings() is None:
        return dict(kwargs, logits_to_keep=0)
    return kwargs


def _require_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Stop where a model keeps a packed row's positions from its backbone, which would count row indices."""
    forward = packed_forward()
    told = kwargs.get("position_ids") is not None or len(args) > 1
    if told or forward is None or module is forward.module or not module._flexdpo_mixing.attends:
        return
    if module is backbone_of(forward.module):
        raise UnsupportedModelError(
            f"{type(forward.module).__name__} does not hand position_ids on to its {type(module).__name__}, so "
            "positions would count row indices; use a newer transformers, or train it without flexdpo"
        )


def _forget_interrupted(module: nn.Module) -> None:
    """Drop what an interrupted forward of the same module left behind: Ctrl-C skips the hook that releases it."""
    for number, forward in enumerate(_forwards.stack):
        if forward.module is module:
            del _forwards.stack[number:]
            return


def _release_layout(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
    if not _forwards.stack or _forwards.stack[-1].module is not module:
        return
    forward = _forwards.stack.pop()
    # output is None when the forward raised; its own error says more
    if output is None or not isinstance(forward, PackedForward):
        return
    _require_mixed(module, forward)
    if forward.states is not None:
        if (now := RandomState.now()).differs(forward.states):
            refuse_draws(forward.module, forward.states, now, forward.inputs)
        if (after := _buffer_versions(forward.module)) != forward.buffers:
            refuse_statistics(forward.module, forward.buffers, after)


def _buffer_versions(module: nn.Module) -> BufferVersions:
    """Which tensor each buffer is, and how often it was written to."""
    found: BufferVersions = {}
    # twice for every forward of models with thousands of modules: named_buffers() takes five times as long
    parts: list[Any] = [module]
    seen = {None, module}
    for part in parts:
        for name, each in part._buffers.items() if part._buffers else ():
            if each is not None:
                found[part, name] = (id(each), -1 if each.is_inference() else each._version)
        for child in part._modules.values() if part._modules else ():
            if child not in seen:
                seen.add(child)
                parts.append(child)
    return found


def _require_mixed(module: Any, forward: PackedForward) -> None:
    """Stop where something mixed the tokens of a packed row that does not know the row, or left its images out."""
    if forward.layout.images is not None and not forward.images_encoded:
        raise UnsupportedModelError(
            f"{type(module).__name__} did not encode the images of a packed row by get_image_features, so flexdpo "
            "cannot tell what stands at its image tokens; train this model without flexdpo"
        )
    mixing: MixingLayers = module._flexdpo_mixing
    if mixing.attends and not forward.attention_ran:
        raise UnsupportedModelError(
            f"{type(module).__name__} never called flexdpo's attention on a packed row, so its result mixes responses; "
            f"load it with attn_implementation={ATTN_IMPLEMENTATION!r} and call flexdpo.prepare_model(model), "
            "or train this model without flexdpo"
        )
    if len(forward.mixed) != mixing.stateful:
        raise UnsupportedModelError(
            f"{len(forward.mixed)} of the {mixing.stateful} layers of {type(module).__name__} that carry a state ran "
            "along the trie, so its result mixes responses: another forward took the place of theirs; load the model "
            "with use_kernels=False, or train it without flexdpo"
        )


def _require_inputs(module: nn.Module, layout: RowLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Stop where a packed row's inputs are not those of its layout, or such as responses cannot share."""
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

    if layout.images is not None and not hasattr(module, "_flexdpo_takes_images"):
        raise UnsupportedModelError(
            f"a packed row has images, and {type(module).__name__} has no get_image_features to encode them, or "
            "transformers is older than 5.15; choose a model of text and images, or leave the images out"
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


# fmt: off
_TEXT_INPUTS = frozenset({
    "input_ids", "inputs_embeds", "position_ids", "cache_position", "logits_to_keep", "num_items_in_batch",
    *TOKEN_TYPES,
})
# fmt: on


def _two_dimensional_mask(module: Any, layout: RowLayout, kwargs: dict[str, Any]) -> Tensor:
    """What a model sees as its ordinary ``attention_mask``, ``[B, S]`` int64.

    A mixture-of-experts model weighs the router's choice at each token by this mask in its auxiliary loss, and in
    nothing else. There a shared token counts as often as the ordinary run repeats it, so that the loss is the same.
    """
    asked = kwargs.get("output_router_logits")
    if not (getattr(module.config, "output_router_logits", False) if asked is None else asked):
        stateful = module._flexdpo_mixing.stateful and not torch.compiler.is_compiling()
        return mask_of_row(layout) if stateful else _real_tokens(layout)
    if layout.multiplicity is None:
        raise FlexdpoError(
            "output_router_logits=True needs the layout's multiplicity to weigh shared tokens in the auxiliary loss; "
            "build the row with Row.from_groups, or switch output_router_logits off"
        )
    return layout.multiplicity


def mask_of_row(layout: RowLayout) -> Tensor:
    """Return a 2-D attention mask, 1 at the tokens of the rows and 0 at padding, ``[B, S]`` int32.

    It tells the layout to whoever is given it, or a part or another shape of it: a layer that carries a state.
    """
    if "mask" not in layout.memo:
        # what is made in inference mode could not be used in training
        with torch.inference_mode(False):
            layout.memo["mask"] = mask = _real_tokens(layout).int()
        mask.untyped_storage()._flexdpo_layout = layout  # type: ignore[attr-defined]
    found: Tensor = layout.memo["mask"]
    return found


def layout_of_mask(mask: Tensor) -> RowLayout | None:
    """The layout that a mask of :func:`mask_of_row` tells; ``None`` for any other."""
    # fake tensors have no storage to look at
    return None if torch.compiler.is_compiling() else getattr(mask.untyped_storage(), "_flexdpo_layout", None)


def _real_tokens(layout: RowLayout) -> Tensor:
    """Return a 2-D attention mask, 1 at the tokens of the row and 0 at its padding, ``[B, S]`` int64."""
    # from the vectors and not from num_tokens, whose every new value would compile a compiled model again
    index = torch.arange(layout.position_ids.shape[1], device=layout.position_ids.device)
    # a padding token stands at position 0 and nothing descends from it; a root always has descendants
    return ((layout.position_ids > 0) | (layout.subtree_end > index + 1)).long()
