"""Where every token of packed rows stands: what a model's attention needs to keep branches apart."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.images import RowImages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_VECTORS = ("position_ids", "subtree_end", "multiplicity", "shortest", "longest")
# what a model that was not prepared would ask of its attention_mask first
_TENSOR_ATTRIBUTES = frozenset({
    "ndim", "shape", "size", "dim", "dtype", "view", "reshape", "sum", "any", "all", "bool", "long", "int", "float",
    "masked_fill", "eq", "ne", "expand", "unsqueeze", "repeat", "cumsum", "flatten", "contiguous", "type", "transpose",
    "permute", "squeeze", "half", "bfloat16",
})  # fmt: skip


class RowLayout:
    """Where every token of a batch of packed rows stands: all that attention needs to keep branches apart.

    It travels as the model's ``attention_mask``. A prepared model takes it out before its forward; any other model
    that reads its mask stops with an error, instead of running the row as one long sequence.

    Not a dataclass: FSDP makes copies of the dataclasses among a module's inputs, and a copy is another row.

    Shapes: ``B`` rows, ``S`` tokens per row; tensors are ``[B, S]`` int64.
    """

    def __init__(
        self,
        position_ids: Tensor,
        subtree_end: Tensor,
        num_tokens: tuple[int, ...],
        multiplicity: Tensor | None = None,
        shortest: Tensor | None = None,
        longest: Tensor | None = None,
        images: RowImages | None = None,
    ) -> None:
        self.position_ids = position_ids  # depth in the trie
        self.subtree_end = subtree_end  # row index just past the last descendant of each token
        self.num_tokens = num_tokens  # real ones of each row; the rest, up to S, is padding
        # how many sequences contain each token, 0 at padding: what an ordinary run, which repeats the prompt for every
        # response, counts it as; None where it is not known, as below
        self.multiplicity = multiplicity
        # tokens of the shortest and the longest sequence that contains each token, which some rotary embeddings go by
        self.shortest, self.longest = shortest, longest
        self.images = images  # of the prompts, where they have any
        # masks built for this layout, shared by all layers and by every model that runs it
        self.memo: dict[Any, Any] = {}
        self._host: RowLayout | None = None
        # of a piece of a longer row: all keys that its tokens see, those on its path and then its own
        self.keys: RowLayout | None = None
        # what the attention of the pieces on its path kept, the first one first, and where its own is kept
        self.path: tuple[Any, ...] = ()
        self.kept: Any = None
        # where this is what one of several processes runs of a row: which keys its tokens see
        self.shard: ContextShard | None = None
        self._check()

    def __repr__(self) -> str:
        return f"RowLayout({self.batch_size} rows of {self.length}, {self.num_tokens} real tokens, on {self.device})"

    def _check(self) -> None:
        shape, ends, device = tuple(self.position_ids.shape), tuple(self.subtree_end.shape), self.device
        if len(shape) != 2 or shape != ends:
            raise FlexdpoError(f"position_ids and subtree_end must both be [B, S], got {shape} and {ends}")
        rows, length = shape
        if len(self.num_tokens) != rows:
            raise FlexdpoError(f"num_tokens must hold one count for each of {rows} rows, got {len(self.num_tokens)}")
        if self.multiplicity is not None and self.multiplicity.shape != shape:
            raise FlexdpoError(f"multiplicity must be [B, S]={[rows, length]}, got {list(self.multiplicity.shape)}")
        for name in ("position_ids", "subtree_end", "multiplicity"):
            vector = getattr(self, name)
            if vector is None:
                continue
            if vector.dtype != torch.int64 or vector.device != device:
                raise FlexdpoError(
                    f"{name} must be int64 on {device}, got {vector.dtype} on {vector.device}; convert it with "
                    f"{name}.to({str(device)!r}, torch.int64)"
                )
            # masks read these vectors inside of kernels, for every pair of tokens
            setattr(self, name, vector.contiguous())
        if device.type != "cpu":
            # a look at the values would wait for the device, and rows are made on the host
            return
        index = torch.arange(length, device=device)
        wrong = (self.subtree_end <= index) | (self.subtree_end > length) | (self.position_ids < 0)
        if bool(wrong.any()):
            row, token = wrong.nonzero()[0].tolist()
            raise FlexdpoError(
                f"token {token} of row {row} has subtree_end {int(self.subtree_end[row, token])} and position "
                f"{int(self.position_ids[row, token])}; its subtree must end behind it and within the row's "
                f"{length} tokens, and its position must be at least 0 (Row.from_groups makes such layouts)"
            )

    @property
    def batch_size(self) -> int:
        """Rows in the batch, ``B``."""
        return int(self.position_ids.shape[0])

    @property
    def length(self) -> int:
        """Tokens per row, padding included, ``S``."""
        return int(self.position_ids.shape[1])

    def block_end(self) -> Tensor:
        """Row index just past the run of image tokens that each token stands in, and of text itself, ``[B, S]`` int64.

        In a run each token is the only child of the one before it; a run does not go on in another branch.
        """
        if "block_end" not in self.memo:
            # what is made in inference mode could not be used in training
            with torch.inference_mode(False):
                index = torch.arange(self.length, device=self.device).expand_as(self.position_ids)
                image = torch.zeros_like(index) if self.images is None else self.images.features + 1
                # the next token continues this one unless it is another root or branch
                goes_on = (image > 0) & (image.roll(-1, dims=1) > 0) & (self.subtree_end > index + 1)
                ends = torch.where(goes_on, self.length, index + 1)
                self.memo["block_end"] = ends.flip(1).cummin(dim=1).values.flip(1).contiguous()
        found: Tensor = self.memo["block_end"]
        return found

    @property
    def device(self) -> torch.device:
        """Where the layout lives."""
        return self.position_ids.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RowLayout:
        """Return this layout on another device, without the masks that were built for this one."""
        if torch.device(device) == self.device:
            return self
        moved = self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        moved._host = self if self.device.type == "cpu" else self._host
        return moved

    def on_host(self) -> RowLayout:
        """This layout on the CPU: the one it was moved from, or else a copy, for which the device is waited for."""
        if self.device.type == "cpu":
            return self
        if self._host is None:
            self._host = self._map_tensors(lambda tensor: tensor.cpu())
        return self._host

    def without_masks(self) -> RowLayout:
        """The same layout as it comes from a data loader, with no mask built yet."""
        bare = self._map_tensors(lambda tensor: tensor)
        bare._host = self._host
        return bare

    def pin_memory(self) -> RowLayout:
        """Return this layout in page-locked memory, without the masks that were built for it."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> RowLayout:
        vectors = {name: getattr(self, name) for name in _VECTORS}
        changed: dict[str, Any] = {name: None if each is None else change(each) for name, each in vectors.items()}
        images = None if self.images is None else self.images.map(change)
        layout = RowLayout(num_tokens=self.num_tokens, images=images, **changed)
        layout.keys = self.keys and self.keys._map_tensors(change)
        return layout

    @classmethod
    def stack(cls, layouts: Sequence[RowLayout]) -> RowLayout:
        """Put the rows of several layouts into one batch; shorter rows are padded to the longest."""
        if not layouts:
            raise FlexdpoError("a batch needs at least one layout, got none")
        if len(devices := {str(layout.device) for layout in layouts}) > 1:
            raise FlexdpoError(f"the layouts are on {', '.join(sorted(devices))}; move them first")
        padded = [layout.padded_to(max(each.length for each in layouts)) for layout in layouts]
        vectors = {name: [getattr(each, name) for each in padded] for name in _VECTORS}
        known: dict[str, Any] = {
            name: None if any(part is None for part in parts) else torch.cat(parts) for name, parts in vectors.items()
        }
        images = RowImages.stack([each.images for each in padded], [each.position_ids for each in padded])
        return cls(num_tokens=tuple(count for each in padded for count in each.num_tokens), images=images, **known)

    def vectors_at(self, tokens: Tensor | slice, missing: int = 0) -> dict[str, Any]:
        """What is known of some tokens, ``[N]`` row indices, and of padding: all vectors but their subtrees' ends."""
        pad = torch.nn.functional.pad
        vectors = {name: getattr(self, name) for name in _VECTORS if name != "subtree_end"}
        return {name: None if each is None else pad(each[:, tokens], (0, missing)) for name, each in vectors.items()}

    def padded_to(self, length: int) -> RowLayout:
        """These rows padded to ``length`` tokens."""
        missing = length - self.length
        if missing == 0:
            return self
        # padding stands at position 0, sees only itself and belongs to no sequence
        ends = torch.arange(self.length + 1, length + 1, device=self.device).expand(self.batch_size, missing)
        images = None if self.images is None else self.images.padded(missing)
        padded = self.vectors_at(slice(None), missing)
        return RowLayout(
            subtree_end=torch.cat([self.subtree_end, ends], dim=1), num_tokens=self.num_tokens, images=images, **padded
        )

    def __getattr__(self, name: str) -> Any:
        raise (FlexdpoError if name in _TENSOR_ATTRIBUTES else AttributeError)(
            f"a packed row reached a model that was not prepared for it (something asked for attention_mask.{name}); "
            "call flexdpo.prepare_model(model) once after loading"
        )

    def __getitem__(self, _: Any) -> Any:
        return self.__getattr__("view")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise FlexdpoError(
            f"something computed with a packed row's layout ({getattr(func, '__name__', func)}) before it reached a "
            "prepared model; call flexdpo.prepare_model(model) once after loading, and use no prompt tuning"
        )


@dataclass(eq=False)
class ContextShard:
    """Which keys the tokens see that one process runs of a row of ``S`` tokens; how all processes' tokens are gathered.

    The row is cut into chunks of equal length, of which every process runs as many.
    """

    order: Tensor  # where each token of the row stands in all shards, one after the other, ``[S]`` int64
    chunks: tuple[RowLayout, ...]  # of neighbouring tokens; the ``keys`` of each are the row's up to its end
    group: Any  # the processes that run the row, a ``torch.distributed.ProcessGroup``

    def map(self, change: Any) -> ContextShard:
        """This shard with ``change`` made to its tensor and to each layout."""
        return dataclasses.replace(self, order=change(self.order), chunks=tuple(map(change, self.chunks)))
