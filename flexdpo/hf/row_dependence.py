"""What a model computes from the batch it is given and not from the sequence alone, and how packed rows undo it.

Some rotary embeddings choose their frequencies by the largest position of the batch: longrope has one set for sequences
up to a limit and one for longer ones, dynamic NTK another set for every length beyond its limit. In a row of many
documents that position belongs to somebody else. Which modules do so, and from where on, is asked of the modules
themselves; on a packed row they are then evaluated once for each side of a limit, at that side's tokens. Llama 4 scales
queries by the row index; on a packed row they are scaled by the position. A batch norm in train mode computes its
statistics over the whole batch, which nothing undoes: it gives itself away by the buffers that it changes.
"""

from __future__ import annotations

import copy
import inspect
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.draws import ask, left_as_it_is, rounding_of
from flexdpo.hf.unwrap import backbone_of, unwrap_model
from flexdpo.layout.row import RowLayout

# longer than any context of today
_LONGEST = 1 << 24
# two rows that begin with the same token, which must not see the next one
_BEGUN_ALIKE = ((11, 12), (11, 13))
# of each module and name of its buffers, the id of the tensor and how often it was written to
BufferVersions = dict[tuple[Any, str], tuple[int, int]]


@dataclass(frozen=True)
class LengthLimits:
    """At which lengths a model's rotary frequencies change."""

    # increasing; a sequence of at most so many tokens has other frequencies than a longer one
    limits: tuple[int, ...] = ()
    # the limit beyond which every length has frequencies of its own; ``None`` where there is none
    open_end: int | None = None

    def side(self, length: int) -> int:
        """Between which limits a sequence of ``length`` tokens lies."""
        return bisect_left(self.limits, length)


def length_limits(backbone: nn.Module) -> LengthLimits:
    """Ask the rotary embeddings of a backbone from which length on their frequencies are others."""
    found, endings = set(), []
    for module in filter(None, (_in_memory(each, backbone) for each in rotary_modules(backbone))):
        for kwargs in _variants(module, backbone):
            limit = _limit_of(module, kwargs)
            if limit is not None:
                found.add(limit)
                if not _same(_at_one(module, limit + 1, kwargs), _at_one(module, _LONGEST, kwargs)):
                    endings.append(limit)
    return LengthLimits(tuple(sorted(found)), min(endings, default=None))


def limits_of(model: nn.Module) -> LengthLimits:
    """The limits of a prepared model, which :func:`flexdpo.prepare_model` found."""
    found: Any = getattr(backbone_of(unwrap_model(model)), "_flexdpo_limits", None)
    return found if isinstance(found, LengthLimits) else LengthLimits()


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a config: one for all layers, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return []
    return [each for each in found.values() if isinstance(each, dict)] or [found]


def rotary_modules(backbone: nn.Module) -> Iterator[nn.Module]:
    """Modules that make something of positions alone: no weights, no parts, ``position_ids`` among their arguments."""
    for module in backbone.modules():
        plain = not list(module.children()) and not list(module.parameters(recurse=False))
        takes = {"x", "position_ids"} <= set(inspect.signature(module.forward).parameters)
        if plain and takes:
            yield module


def _in_memory(module: nn.Module, backbone: Any) -> nn.Module | None:
    """The module, or where it has no numbers yet a new one; ``None`` where none can be made of the config."""
    if not any(buffer.is_meta for buffer in module.buffers()):
        return module
    try:
        with torch.device("cpu"):
            return type(module)(getattr(module, "config", backbone.config))
    except (AttributeError, TypeError, ValueError):
        return None


def _variants(module: nn.Module, backbone: Any) -> list[dict[str, Any]]:
    """The other arguments it is called with: one set for each type of layer where they have rotations of their own."""
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return [{}]
    # transformers keeps one entry for each type of layer that it rotates
    rotated = getattr(module, "rope_type", None)
    known = rotated if isinstance(rotated, dict) else getattr(backbone.config, "layer_types", None)
    types = sorted(set(known or ()))
    return [{"layer_type": each} for each in types] or [{}]


def _limit_of(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The largest length with the frequencies of a short sequence; ``None`` where all lengths have them."""
    short = _at_one(module, 2, kwargs)
    try:
        if _same(short, _at_one(module, _LONGEST, kwargs)):
            return None
    except IndexError:
        return None  # a table, which has one entry for each position
    low, high = 2, _LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _same(short, _at_one(module, middle, kwargs)) else (low, middle)
    return low


def _at_one(module: nn.Module, length: int, kwargs: dict[str, Any]) -> list[Tensor]:
    """What a fresh copy gives at position 1 beside the last position of a sequence of ``length`` tokens."""
    # a position beyond a table stops a GPU for good
    fresh = copy.deepcopy(module).to("cpu")
    x = torch.zeros(1, 2, 1, device="cpu")
    # of time, height and width, where frequencies are dealt out to them; not all versions take one for the three
    axes = 3 if "mrope_section" in (getattr(getattr(module, "config", None), "rope_parameters", None) or {}) else 1
    with torch.no_grad(), torch.device("cpu"):
        # dynamic frequencies stay what the longest sequence made them, until a short one comes
        for last in (1, length - 1):
            positions = torch.tensor([[1, last]])
            output = type(fresh).forward(fresh, x, positions if axes == 1 else positions.expand(3, 1, 2), **kwargs)
    return [
        (each[:, :1] if axes == 1 else each[..., :1, :]).clone()
        for each in (output if isinstance(output, tuple | list) else (output,))
    ]


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def require_own_lengths(limits: LengthLimits, layout: RowLayout, model: str) -> None:
    """Refuse a row whose tokens would have other frequencies in each of their sequences.

    Raises:
        FlexdpoError: if the row does not know its sequences' lengths, or shares a token across a limit; or
        UnsupportedModelError: if a sequence is longer than the limit beyond which every length has its own.
    """
    if not limits.limits:
        return
    # every one of these questions would wait for the device
    layout = layout.on_host()
    shortest, lengths = layout.shortest, layout.longest
    if lengths is None or shortest is None:
        if int(layout.position_ids.max()) < limits.limits[0]:
            return
        raise FlexdpoError(
            f"{model} has other rotary frequencies for sequences of more than {limits.limits[0]} tokens, and this "
            "layout does not know how long its sequences are; build the row with flexdpo.pack or Row.from_groups"
        )
    longest = int(lengths.max())
    if limits.open_end is not None and longest > limits.open_end:
        raise UnsupportedModelError(
            f"a sequence of the row has {longest} tokens, and beyond {limits.open_end} {model} has other rotary "
            "frequencies for every length and keeps those of the longest sequence it has seen, so that even the "
            f"unpacked run depends on the order of its batches; set max_length to at most {limits.open_end}"
        )
    for limit in limits.limits:
        if bool(((shortest <= limit) & (lengths > limit)).any()):
            raise FlexdpoError(
                f"sequences of at most and of more than {limit} tokens share a prompt in this row, and {model} has "
                f"other rotary frequencies for each; build it with Row.from_groups(groups, limits=({limit},)) or "
                f"flexdpo.pack(groups, limits=({limit},)), or set max_length to at most {limit}"
            )


def evaluated_by_side(module: nn.Module, limits: LengthLimits, longest: Tensor, args: Any, kwargs: Any) -> Any:
    """What a rotary embedding gives at every token of a row, each by the length of its own sequences.

    ``longest``, ``[B, S]``, holds the tokens of the longest sequence of each token; ``args`` and ``kwargs`` are those
    of the call.

    Returns what the module returns: tensors ``[B, S, ...]``.
    """
    named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    positions = named["position_ids"]
    side = torch.bucketize(longest, torch.tensor(limits.limits, device=positions.device))
    merged: Any = None
    for number, first in enumerate((1, *(limit + 1 for limit in limits.limits))):
        here = side == number
        if not bool(here.any()):
            continue
        # one position more says on which side of the limit all are
        beside = torch.full_like(positions[..., :1], first - 1)
        given = torch.cat([torch.where(here, positions, 0), beside], dim=-1)
        output = type(module).forward(module, **{**named, "position_ids": given})
        parts = [each[:, :-1] for each in (output if isinstance(output, tuple | list) else (output,))]
        if merged is not None:
            wide = [here.reshape(here.shape + (1,) * (each.ndim - 2)) for each in parts]
            parts = [torch.where(w, new, old) for w, new, old in zip(wide, parts, merged[0], strict=True)]
        merged = parts, output
    parts, output = merged
    return type(output)(parts) if isinstance(output, tuple | list) else parts[0]


def scaled_by_position(module: Any, query: Tensor, layout: RowLayout) -> Tensor:
    """Undo Llama 4's scaling of the queries by the row index, and scale them by the position instead.

    Source: ``Llama4TextAttention.forward`` of transformers; it scales only layers without rotations.
    """
    tuned = getattr(module, "attn_temperature_tuning", None) and not getattr(module, "use_rope", True)
    if not tuned or layout.length < module.floor_scale:
        return query
    index = torch.arange(layout.length, device=query.device)

    def scale(places: Tensor) -> Tensor:
        found: Tensor = torch.log1p(torch.floor((places.double() + 1) / module.floor_scale)) * module.attn_scale + 1
        return found

    factor = scale(layout.position_ids) / scale(index)
    scaled: Tensor = query * rearrange(factor, "b s -> b 1 s 1")
    return scaled.to(query.dtype)


def refuse_statistics(module: Any, before: BufferVersions, after: BufferVersions) -> None:
    """Stop after a packed forward that changed buffers, if a token's result depends on what comes after it too.

    A buffer that only counts, or holds frequencies, does no harm: asked once for each mode.
    """
    harmless: set[bool] = vars(module).setdefault("_flexdpo_counts", set())
    if module.training in harmless:
        return
    backbone = backbone_of(module)
    words: Tensor = backbone.get_input_embeddings().weight
    with left_as_it_is(backbone, None):
        one, other = (
            ask(backbone, {"input_ids": torch.tensor([ids], device=words.device) % len(words)}).result[0, 0]
            for ids in _BEGUN_ALIKE
        )
    if not float((one - other).abs().max()) <= rounding_of(one) * float(one.abs().max()):
        names = {part: f"{prefix}." if prefix else "" for prefix, part in module.named_modules()}
        changed = [names[part] + name for (part, name), version in after.items() if before.get((part, name)) != version]
        raise UnsupportedModelError(
            f"{type(module).__name__} changes {', '.join(changed[:3])}{' and more' * (len(changed) > 3)} while it "
            "runs, and a token's result depends on tokens that it must not see: statistics of the batch, which a "
            "packed row does not have. Keep those modules in eval mode, or train this model without flexdpo"
        )
    harmless.add(module.training)
