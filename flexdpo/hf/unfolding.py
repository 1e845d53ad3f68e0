"""Runs a module of a model that mixes tokens in a way of its own: once along the path to each leaf, as it is.

Its input is copied along every path and each token's result is read from the first path that holds the token. That is
exact for whatever looks back along the row alone, without knowing how. What the module costs is not shared; whatever
stands around it is.

Shapes: ``B`` rows of ``S`` tokens; ``M`` paths in a padded batch, ``L`` places each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flexdpo.attention.mask_mods import mask_mod_for
from flexdpo.attention.row_mask import RowMask, row_mask_of
from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.forward_layout import layout_of_mask
from flexdpo.layout.row import RowLayout
from flexdpo.mixing.tree_scan import PathBatch, in_row_order, path_batches


def run_unfolded(
    run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], layout: RowLayout, *, added: bool = False
) -> Any:
    """Call ``run`` for the paths of a layout in place of its rows, and return what has one entry per token.

    Arguments with one entry per token become those of the paths, masks of the row become masks of the paths, and what
    depends on the distance of two places alone stays. Of the result, what has no entry per token becomes ``None``.
    Masks of attention are boolean, or where they are ``added`` to the scores, 0 and the least number there is.

    Raises ``UnsupportedModelError`` if an argument is none of these, or nothing in the result has one entry per token.
    """
    batches = path_batches(layout)
    floats = (each.dtype for each in tensors_in((args, kwargs)) if getattr(each, "is_floating_point", bool)())
    dtype = next(floats, torch.float32) if added else torch.bool
    outputs = [run(*_along(args, batch, layout, dtype), **_along(kwargs, batch, layout, dtype)) for batch in batches]
    folded = _folded(outputs, batches, layout)
    if next(tensors_in(folded), None) is None:
        raise UnsupportedModelError("a module that is run along every path gave nothing that has one entry per token")
    return folded


def tensors_in(value: Any) -> Iterator[Any]:
    """All tensors and BlockMasks among arguments or results, inside containers too."""
    if isinstance(value, torch.Tensor) or row_mask_of(value) is not None:
        yield value
    elif isinstance(value, tuple | list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def _along(value: Any, batch: PathBatch, layout: RowLayout, mask_dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _along(each, batch, layout, mask_dtype) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_along(each, batch, layout, mask_dtype) for each in value)
    if (row_mask := row_mask_of(value)) is not None:
        visible = _path_mask(row_mask, batch)
        if mask_dtype == torch.bool:
            return visible
        hidden = torch.zeros(visible.shape, dtype=mask_dtype, device=visible.device)
        return hidden.masked_fill_(~visible, torch.finfo(mask_dtype).min)
    if not isinstance(value, torch.Tensor):
        return value
    return batch.real.long() if layout_of_mask(value) is not None else _on_paths(value, batch, layout)


def _on_paths(value: Tensor, batch: PathBatch, layout: RowLayout) -> Tensor:
    length = batch.tokens.shape[1]
    if value.shape == (layout.length, layout.length) and (
        # a tensor without values is one of a model that is only asked what it keeps
        value.is_meta or torch.equal(value[1:, 1:], value[:-1, :-1])
    ):
        return value[:length, :length]  # of the distance between two places alone, the same on every path
    if value.ndim >= 2 and value.shape[1] == layout.length and value.shape[0] in {1, layout.batch_size}:
        tokens = value.expand(layout.batch_size, *value.shape[1:]).flatten(0, 1)
        # the gradients of copies are added up in float32
        wide = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
        return tokens.to(wide)[batch.tokens].to(value.dtype)
    raise UnsupportedModelError(
        f"a module that is run along every path was given a tensor of {list(value.shape)}, which has no entry per "
        f"token of {layout.batch_size} rows of {layout.length}; train this model without flexdpo"
    )


def _path_mask(row_mask: RowMask, batch: PathBatch) -> Tensor:
    """Which place of a path may attend to which, ``[M, 1, L, L]``; padding sees itself.

    Raises ``UnsupportedModelError`` if the tokens of an image see each other both ways: a token's first path is
    then not all that it depends on.
    """
    if row_mask.kind.blocks:
        raise UnsupportedModelError(
            "a module that is run along every path cannot have images whose tokens see each other both ways; train "
            "this model without flexdpo"
        )
    paths, length = batch.tokens.shape
    index = torch.arange(length, device=batch.tokens.device)
    ends = torch.where(batch.real, batch.real.sum(1, keepdim=True), index + 1)
    layout = RowLayout(index.expand(paths, length), ends, (length,) * paths)
    lines = torch.arange(paths, device=index.device)
    return mask_mod_for(layout, row_mask.kind)(
        lines[:, None, None, None], 0, index[None, None, :, None], index[None, None, None, :]
    )


def _folded(outputs: list[Any], batches: list[PathBatch], layout: RowLayout) -> Any:
    first = outputs[0]
    if isinstance(first, tuple | list):
        return type(first)(_folded(list(each), batches, layout) for each in zip(*outputs, strict=True))
    if not isinstance(first, torch.Tensor):
        return None
    per_token = all(out.shape[:2] == batch.tokens.shape for out, batch in zip(outputs, batches, strict=True))
    return in_row_order([out.flatten(0, 1) for out in outputs], layout) if per_token else None
