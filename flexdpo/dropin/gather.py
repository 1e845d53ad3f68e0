"""A padded batch of ``N`` rows with ``T`` places as one packed row of ``S`` tokens, and its results back in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexdpo.dropin.batch_trie import BatchTrie
from flexdpo.dropin.images import BatchImages
from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.images import encoded_features
from flexdpo.layout.row import RowLayout

# what models return of the images that they encoded
_OF_IMAGES = {"image_outputs", "image_hidden_states"}
# by which a generation goes on from where a batch ended, and before transformers 5.24 also returned of batches without
_OF_GENERATION = {"rope_deltas"}


@dataclass(frozen=True, eq=False)
class SharedBatch:
    """One packed row that stands for a padded batch."""

    input_ids: Tensor  # ``[1, S]`` int64
    layout: RowLayout  # positions and subtree ends, ``[1, S]`` each
    nodes: Tensor  # for each place of the batch the index of its token in the row, -1 at padding, ``[N, T]`` int64
    # that the model is given, ``[1, S]`` or in several dimensions ``[C, 1, S]``, where they are not those of the layout
    position_ids: Tensor | None = None
    images: BatchImages | None = None  # of the batch

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        trie: BatchTrie,
        *,
        position_ids: Tensor | None = None,
        reach: int | None = None,
        pad_to_multiple_of: int = 1,
        images: BatchImages | None = None,
    ) -> SharedBatch:
        """Lay the trie of ``input_ids`` out as a row, padded to a multiple of ``pad_to_multiple_of`` tokens.

        The model is given ``position_ids``, of the shape of ``input_ids``, and otherwise places within a row; ``reach``
        is the number of positions that it would see, by default the columns of the batch.
        """
        tokens = len(trie)
        missing = -tokens % pad_to_multiple_of

        def padded(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values, (0, missing))[None]

        ends = padded(trie.subtree_end)
        # padding stands at position 0, sees only itself and belongs to no row of the batch
        ends[:, tokens:] = torch.arange(tokens + 1, tokens + missing + 1, device=ends.device)
        # in a padded batch every row is as long as the longest
        lengths = padded(torch.full_like(trie.depths, input_ids.shape[1] if reach is None else reach))
        layout = RowLayout(padded(trie.depths), ends, (tokens,), padded(trie.multiplicity), lengths, lengths)
        places = None if position_ids is None else padded(position_ids.reshape(-1)[trie.sources])
        if images is not None:
            layout.images = images.of_row(trie, tokens + missing)
            places = images.positions_of_row(trie, tokens + missing) if places is None else places
        return cls(padded(input_ids.reshape(-1)[trie.sources]), layout, trie.nodes, places, images)

    def at_padded_places(self, output: Any) -> Any:
        """Put what a model returned for the row where it would have stood for the padded batch.

        ``output`` is a tensor ``[1, S, ...]`` or ``[S, ...]`` with one entry per token, or any nesting of mappings,
        lists and tuples of such. Returns the same nesting with tensors ``[N, T, ...]`` or ``[N * T, ...]``, 0 at
        padding; mappings are changed in place. Raises ``UnsupportedModelError`` if a tensor has other entries.
        """
        placed: dict[int, Any] = {}
        if self.images is not None and isinstance(output, Mapping):
            for name in _OF_IMAGES & output.keys():
                placed[id(output[name])] = _of_batch(output[name], self.images)
        if isinstance(output, Mapping):
            placed |= {id(output[name]): None for name in _OF_GENERATION & output.keys()}
        return self._placed(output, placed)

    def _placed(self, output: Any, done: dict[int, Any]) -> Any:
        # hidden_states ends with last_hidden_state itself, which is gathered once
        if id(output) in done:
            return done[id(output)]
        placed = output
        if isinstance(output, torch.Tensor):
            placed = self._placed_tensor(output)
        elif isinstance(output, Mapping):
            for name in list(output):
                output[name] = self._placed(output[name], done)  # type: ignore[index]
        elif isinstance(output, tuple | list):
            placed = type(output)(self._placed(each, done) for each in output)
        done[id(output)] = placed
        return placed

    def _placed_tensor(self, values: Tensor) -> Tensor:
        length = self.layout.length
        one_row = values.shape[:2] == (1, length)
        if not one_row and values.shape[:1] != (length,):
            raise UnsupportedModelError(
                f"the model returned a tensor of shape {list(values.shape)} for a packed row of {length} tokens; "
                "flexdpo cannot tell what it would be for the padded batch, so ask for less "
                "(output_hidden_states=False, output_router_logits=False) or call flexdpo.unshare(model)"
            )
        placed: Tensor = _Gather.apply(values[0] if one_row else values, self.nodes)
        return placed if one_row else rearrange(placed, "n t ... -> (n t) ...")


def _of_batch(output: Any, images: BatchImages) -> Any:
    """What a model returned of the images that it encoded for a row, as for the batch.

    Only their features are known for each image; what else the encoder gave is left out.
    """
    encoded = encoded_features(output)
    if encoded is None:
        return None
    name, features, one = encoded
    parts = features.split(images.counts)
    of_each = iter([parts[member] for member in images.members])
    groups = [torch.cat([features[:0], *(next(of_each) for _ in range(count))]) for count in images.together]
    return type(output)(**{name: torch.stack(groups) if one else groups})


class _Gather(torch.autograd.Function):
    """Row entries ``[S, ...]`` at padded places ``[N, T, ...]``; gradients of all copies are added up, in float32.

    Autograd's own gather adds in the dtype of the values, which in half precision rounds after every copy.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, nodes: Tensor) -> Tensor:
        ctx.save_for_backward(nodes)
        ctx.length, ctx.dtype = values.shape[0], values.dtype
        placed: Tensor = values.index_select(0, nodes.clamp(min=0).reshape(-1)).unflatten(0, nodes.shape)
        padding = (nodes < 0).reshape(nodes.shape + (1,) * (placed.ndim - nodes.ndim))
        return placed.masked_fill_(padding, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (nodes,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        # what arrives at padding comes from no token, need not even be finite, and goes into one slot more
        slots = torch.where(nodes < 0, ctx.length, nodes).reshape(-1)
        total = gradient.new_zeros((ctx.length + 1, *gradient.shape[2:]), dtype=wide)
        total.index_add_(0, slots, rearrange(gradient, "n t ... -> (n t) ...").to(wide))
        return total[:-1].to(ctx.dtype), None
