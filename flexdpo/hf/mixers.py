"""Lets the layers of a model that carry a state run along the trie, where a packed row runs, and as ever elsewhere.

Once for each model file, its kernels and the forwards of its mixers are replaced by functions that pass everything
through until a mixer of a prepared model is given the mask of a packed row. That mask tells which row it is, as a
BlockMask does to the attention. So a checkpoint that runs a layer again, in whatever thread, runs it on its own row.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from flexdpo.attention.row_mask import row_mask_of
from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.forward_layout import ATTN_IMPLEMENTATION, layout_of_mask, mask_of_row, packed_forward, without_layout
from flexdpo.hf.mixer_kernels import MixerClass, mixer_class, mixers_of, runs_whole
from flexdpo.hf.unfolding import run_unfolded, tensors_in
from flexdpo.hf.unwrap import backbone_of
from flexdpo.layout.row import RowLayout
from flexdpo.mixing.kernels import ARGUMENTS, CONVOLUTION, FUSED, STEPS, scan_along_trie
from flexdpo.mixing.tree_conv import tree_conv1d

# the function by which model files make the mask of layers that carry a state
_MASK = "create_recurrent_attention_mask"
_REPLACED = "_flexdpo_replaced"


@dataclass(eq=False)
class _Mixing:
    """A mixer that runs a packed row."""

    mixer: nn.Module
    layout: RowLayout
    passed: frozenset[str]  # names of the arguments that it may pass on, of which kernels take what they know
    ran: set[str] = field(default_factory=set)  # kernels that ran along the trie


class _InThread(threading.local):
    """The mixer that runs a packed row in each thread, if any."""

    mixing: _Mixing | None = None


_in_thread = _InThread()


def install_mixers(backbone: nn.Module) -> int:
    """Let the mixers of a backbone run along the trie; return how many there are. Safe to call again."""
    mixers = mixers_of(backbone)
    for mixer in mixers.values():
        kind, whole = type(mixer), runs_whole(mixer)
        found = mixer_class(kind) or MixerClass({}, frozenset(), by_place=False)
        for file, kernels in found.kernels.items():
            for own, name in kernels.items():
                _replace(vars(sys.modules[file]), own, functools.partial(_along_trie, name))
        if _MASK in (names := vars(sys.modules[kind.__module__])):
            _replace(names, _MASK, _row_mask)
        if not hasattr(kind.forward, _REPLACED):
            kind.forward = _mixing_forward(kind.forward, found)
        mixer._flexdpo_mixes = "unfolded" if whole else "shared"  # type: ignore[assignment]
    return len(mixers)


def _replace(names: dict[str, Any], name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    if not hasattr(names[name], _REPLACED):
        replacement = around(names[name])
        setattr(replacement, _REPLACED, True)
        names[name] = replacement


def _row_mask(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def mask(*args: Any, **kwargs: Any) -> Any:
        forward, config = packed_forward(), kwargs["config"] if "config" in kwargs else args[0]
        # another model may run in between, or after a row that was interrupted
        if forward is None or config is not backbone_of(forward.module).config:
            return stock(*args, **kwargs)
        # what the model was given counts a shared token as often as it is repeated, where a router's loss wants that
        return mask_of_row(forward.layout)

    return mask


def _mixing_forward(stock: Callable[..., Any], found: MixerClass) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (way := getattr(self, "_flexdpo_mixes", None)) is None:
            return stock(self, *args, **kwargs)
        # which row it is, is no part of a graph
        run = _RUN_EAGERLY[way] if torch.compiler.is_compiling() else _RUN[way]
        return run(stock, found, self, args, kwargs)

    setattr(forward, _REPLACED, True)
    return forward


def _run(stock: Callable[..., Any], found: MixerClass, mixer: Any, args: Any, kwargs: Any) -> Any:
    layout = _layout_of(mixer, (*args, *kwargs.values()))
    before = _in_thread.mixing
    mixing = None if layout is None else _Mixing(mixer, layout, frozenset(kwargs))
    _in_thread.mixing = mixing
    try:
        output = stock(mixer, *args, **kwargs)
    finally:
        _in_thread.mixing = before
    if mixing is not None and (missing := found.along_trie - mixing.ran):
        raise UnsupportedModelError(
            f"{type(mixer).__name__} ran a packed row past {', '.join(sorted(missing))}, so its result mixes "
            "responses: another kernel took its place; load the model with use_kernels=False, or train it without "
            "flexdpo"
        )
    forward = packed_forward()
    if forward is not None:
        forward.mixed.add(id(mixer))
    return output


def _run_whole(stock: Callable[..., Any], found: MixerClass, mixer: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Along the path to each leaf; whatever of it carries a state runs there as ever."""
    layout = _layout_of(mixer, (*args, *kwargs.values()))
    if layout is None:
        return stock(mixer, *args, **kwargs)
    forward, before = packed_forward(), _in_thread.mixing
    # a state that a module keeps itself would be that of some path, with its graph
    kept = [(part, dict(vars(part))) for part in mixer.modules()]
    _in_thread.mixing = None
    try:
        with without_layout(mixer, along_paths=True):
            # eager attention, and transformers' FlexAttention, add what is no BlockMask
            attention = getattr(getattr(mixer, "config", None), "_attn_implementation", None)
            added = attention not in (None, "sdpa", ATTN_IMPLEMENTATION)
            output = run_unfolded(functools.partial(stock, mixer), args, kwargs, layout, added=added)
    finally:
        _in_thread.mixing = before
        for part, attributes in kept:
            vars(part).update(attributes)
    if forward is not None:
        forward.mixed.add(id(mixer))
        forward.attention_ran |= any(row_mask_of(each) is not None for each in tensors_in((args, kwargs)))
    return output


_RUN = {"shared": _run, "unfolded": _run_whole}
_RUN_EAGERLY = {way: torch.compiler.disable(run) for way, run in _RUN.items()}


def _layout_of(mixer: nn.Module, inputs: tuple[Any, ...]) -> RowLayout | None:
    """The row that a mixer was given, by its mask."""
    given = list(tensors_in(inputs))
    masks = [value for value in given if isinstance(value, torch.Tensor) and value.ndim == 2]
    of_blocks = (found.layout for found in map(row_mask_of, given) if found is not None)
    layout = next(filter(None, (*map(layout_of_mask, masks), *of_blocks)), None)
    forward = packed_forward()
    if forward is not None and layout is not forward.layout:
        raise UnsupportedModelError(
            f"{type(mixer).__name__} was not given the mask of the packed row that {type(forward.module).__name__} "
            "runs, so it would mix responses; train this model without flexdpo"
        )
    copied = layout is None and torch._C._current_graph_task_id() != -1
    if copied and any(mask.dtype == torch.int32 for mask in masks):
        raise UnsupportedModelError(
            f"{type(mixer).__name__} runs again for a checkpoint with a copy of a packed row's mask, which does not "
            "tell the row; use a checkpoint that keeps the mask (gradient_checkpointing=True does)"
        )
    return layout


def _along_trie(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or (mixing := _in_thread.mixing) is None:
            return stock(*args, **kwargs)
        mixing.ran.add(name)
        if name in FUSED:
            return None  # the mixer then asks for the parts
        if name in STEPS:
            raise UnsupportedModelError(f"{type(mixing.mixer).__name__} runs a packed row token by token, from a cache")
        known = {key: value for key, value in kwargs.items() if key not in mixing.passed - ARGUMENTS}
        if name == CONVOLUTION:
            return _convolution(mixing.layout, *args, **known)
        return scan_along_trie(name, stock, args, known, mixing.layout)

    return kernel


def _convolution(
    layout: RowLayout,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """The convolution of transformers' model files; ``hidden_states`` are ``[B, C, S]``, ``weight`` is ``[C, K]``."""
    given = [key for key, value in kwargs.items() if value is not None]
    if given or (hidden_states.shape[0], hidden_states.shape[-1]) != (layout.batch_size, layout.length):
        raise UnsupportedModelError(
            f"a convolution of {list(hidden_states.shape)} came with {', '.join(given) or 'other lengths'} on a packed "
            f"batch of {layout.batch_size} rows of {layout.length}; train this model without flexdpo"
        )
    out = tree_conv1d(hidden_states, weight, bias, layout)
    return out if activation is None else ACT2FN[activation](out)
