"""The tensors of one packed row, and the layout that a model's attention needs of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import Group, numbered, require_groups, token_ids_of_each
from flexdpo.layout.images import ImageKeys, row_images
from flexdpo.layout.row_layout import RowLayout
from flexdpo.layout.sequences import numbered_sequences, require_count
from flexdpo.layout.trie import Trie

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Self

__all__ = ["TILE", "Row", "RowLayout", "idle_row", "on_device", "stack_inputs", "tile_multiple"]

# tokens to a side of a tile of FlexAttention
TILE = 128


def tile_multiple(device: torch.device | str) -> int:
    """What rows are padded to: whole tiles on CUDA, which spares FlexAttention its bounds checks; a CPU has none."""
    return TILE if torch.device(device).type == "cuda" else 1


@dataclass(eq=False)
class Row:
    """One packed row: token tries of several groups side by side, with what is predicted by what.

    Shapes: ``S`` tokens of the row, ``T`` targets (distinct edges into response tokens), ``M`` memberships of targets
    in responses, ``R`` responses, ``E`` preferences. All tensors are int64.
    """

    input_ids: Tensor  # ``[1, S]``
    layout: RowLayout  # positions and subtree ends, ``[1, S]`` each
    predictors: Tensor  # row index of the token that predicts each target, ``[T]``
    labels: Tensor  # the token predicted, ``[T]``
    member_targets: Tensor  # target of each membership, ``[M]``; one that two responses share is listed by both
    member_responses: Tensor  # response index of each membership, ``[M]``
    edges: Tensor  # preferences as response indices ``(chosen, rejected)``, ``[E, 2]``
    groups: tuple[Group, ...]  # the groups of this row, in row order; their responses are numbered through
    # ``(start, stop)`` of each trie's tokens: one group's, or those of groups that begin alike
    documents: tuple[tuple[int, int], ...]
    # for each response, the row index of each of its tokens, the prompt not included
    response_paths: tuple[NDArray[np.int64], ...]
    numbers: tuple[int, ...] = ()  # which of the groups that :func:`flexdpo.pack` was given each group is
    pieces: tuple[Piece, ...] = ()  # of a row longer than memory, which runs piece by piece
    shard: RowShard | None = None  # of a row that several processes run together: what this one runs of it

    @classmethod
    def from_groups(cls, groups: Sequence[Group], *, pad_to_multiple_of: int = 1, limits: Sequence[int] = ()) -> Row:
        """Build one row of all ``groups``, each as its own token trie; ``limits`` are those of :func:`flexdpo.pack`."""
        require_groups(groups)
        keys = ImageKeys()
        tries = [Trie.from_sequences(keys.sequences(group), limits=limits) for group in groups]
        return cls.from_tries(groups, tries, pad_to_multiple_of=pad_to_multiple_of)

    @classmethod
    def from_tries(
        cls,
        groups: Sequence[Group],
        tries: Sequence[Trie],
        *,
        pad_to_multiple_of: int = 1,
        sizes: Sequence[int] | None = None,
    ) -> Row:
        """Build one row of token tries that stand side by side, each of one group or of several that begin alike.

        ``groups`` are those whose sequences the tries hold, in the tries' order; without them ``sizes`` are the tokens
        of each sequence before its first target, by default those of the prompts.
        """
        offsets = list(accumulate((len(trie) for trie in tries), initial=0))
        documents = tuple(pairwise(offsets))
        if offsets[-1] == 0:
            raise FlexdpoError("a row needs at least one group, document or sequence, got none")
        if type(pad_to_multiple_of) is not int or pad_to_multiple_of < 1:
            require_count("pad_to_multiple_of", pad_to_multiple_of)
        sizes = sizes or [group.prompt_ids.size for group in groups for _ in group.response_ids]
        length = -(-offsets[-1] // pad_to_multiple_of) * pad_to_multiple_of
        # what is not written over is padding
        token_ids, parents, position_ids, multiplicity, shortest, longest = np.zeros((6, length), dtype=np.int64)
        subtree_end = np.arange(1, length + 1)
        for trie, (start, stop) in zip(tries, documents, strict=True):
            token_ids[start:stop] = trie.token_ids
            parents[start:stop] = trie.parents + start
            position_ids[start:stop] = trie.depths
            subtree_end[start:stop] = trie.subtree_end + start
        shortest[: offsets[-1]] = np.iinfo(np.int64).max
        sequences = [path + start for trie, start in zip(tries, offsets, strict=False) for path in trie.paths]
        for path in sequences:
            multiplicity[path] += 1
            shortest[path] = np.minimum(shortest[path], path.size)
            longest[path] = np.maximum(longest[path], path.size)
        paths = tuple(path[size:] for path, size in zip(sequences, sizes, strict=True))
        # the distinct response tokens, and which of them each place of a response is
        targets, members = np.unique(np.concatenate(paths), return_inverse=True)
        edges = [(first + a, first + b) for group, first in numbered(groups) for a, b in group.edges]
        pictured = [group for group in groups if group.images]
        images = row_images(groups, sequences, length) if pictured else None
        if pictured:
            # a trie knows image tokens by their keys
            token_ids[token_ids < 0] = pictured[0].image_token_id
        vectors = (position_ids, subtree_end, multiplicity, shortest, longest)
        depths, ends, counts, least, most = (torch.from_numpy(vector)[None] for vector in vectors)
        return cls(
            input_ids=torch.from_numpy(token_ids)[None],
            layout=RowLayout(depths, ends, (offsets[-1],), counts, least, most, images),
            # the prompt's last token predicts the first token of every response
            predictors=torch.from_numpy(parents[targets]),
            labels=torch.from_numpy(token_ids[targets]),
            member_targets=torch.from_numpy(members.reshape(-1).astype(np.int64)),
            member_responses=torch.from_numpy(np.repeat(np.arange(len(paths)), [path.size for path in paths])),
            edges=torch.tensor(edges, dtype=torch.int64, device="cpu").reshape(-1, 2),
            groups=tuple(groups),
            documents=documents,
            response_paths=paths,
        )

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        pad_to_multiple_of: int = 1,
        limits: Sequence[int] = (),
    ) -> Row:
        """Build one row from token ids that were never parted into prompts and responses.

        All sequences that begin alike share these tokens, in a trie of any depth. Each counts as one response to its
        first token, so that every later token is a target; the row has no groups and no preferences. ``limits`` are
        those of :func:`flexdpo.pack`. Raises ``FlexdpoError`` if one is empty or holds anything but token ids.
        """
        arrays = token_ids_of_each(sequences, "sequence")
        trie = Trie.from_sequences(arrays, limits=limits)
        row = cls.from_tries([], [trie], sizes=[1] * len(arrays), pad_to_multiple_of=pad_to_multiple_of)
        # the trie is a forest: what begins differently has nothing in common
        roots = np.flatnonzero(trie.parents < 0)
        row.documents = tuple(zip(roots.tolist(), trie.subtree_end[roots].tolist(), strict=True))
        return row

    @classmethod
    def from_documents(
        cls, documents: Sequence[Sequence[int] | NDArray[np.int64]], *, pad_to_multiple_of: int = 1
    ) -> Row:
        """Build one row of documents side by side that share nothing, whatever they begin with: plain packing."""
        arrays = token_ids_of_each(documents, "document")
        tries = [Trie.from_sequences([array]) for array in arrays]
        return cls.from_tries([], tries, sizes=[1] * len(tries), pad_to_multiple_of=pad_to_multiple_of)

    @classmethod
    def from_lengths(cls, lengths: Sequence[Any], *, pad_to_multiple_of: int = 1) -> Row:
        """Build one row of which only lengths are known; its token ids are 0, 1, 2, ... in row order.

        ``[7, (4, [2, 3]), (4, [(1, [2, 2]), 3])]`` is a document of 7 tokens, one prompt of 4 with two responses, and
        one whose first two responses have their first token in common: ``(tokens, branches)`` to any depth.
        """
        return cls.from_sequences(numbered_sequences(lengths), pad_to_multiple_of=pad_to_multiple_of)

    @property
    def position_ids(self) -> Tensor:
        """Logical positions, ``[1, S]``."""
        return self.layout.position_ids

    @property
    def subtree_end(self) -> Tensor:
        """Row index just past the last descendant of each token, ``[1, S]``."""
        return self.layout.subtree_end

    @property
    def num_tokens(self) -> int:
        """Tokens run, padding not counted."""
        return self.layout.num_tokens[0]

    @property
    def unshared_tokens(self) -> int:
        """Tokens an ordinary trainer runs for the same groups or sequences, padding not counted."""
        if self.groups:
            return sum(group.unshared_tokens for group in self.groups)
        # of a sequence without a group, all tokens but the first are targets
        return sum(path.size + 1 for path in self.response_paths)

    @property
    def num_responses(self) -> int:
        """Responses in the row, ``R``."""
        return len(self.response_paths)

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments for a prepared model: ``model(**row.inputs())``."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.layout.position_ids,
            "attention_mask": self.layout,
            "use_cache": False,
            **(self.layout.images.inputs if self.layout.images is not None else {}),
        }

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Row:
        """Return this row with all its tensors on ``device``."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Row:
        """Return this row in page-locked memory, so that its copy to a GPU need not wait."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Any) -> Row:
        parts = {name: part for name, part in vars(self).items() if isinstance(part, torch.Tensor | RowLayout)}
        pieces: Any = tuple(piece._map(change) for piece in self.pieces)
        shard = self.shard and self.shard._map(change)
        changed = {name: change(part) for name, part in parts.items()}
        return dataclasses.replace(self, pieces=pieces, shard=shard, **changed)


@dataclass(eq=False)
class RowPart(Row):
    """Some tokens of a row, and the targets that they predict, as a row of their own without responses."""

    tokens: Tensor = field(default_factory=lambda: torch.empty(0))  # where each stands in the row, without padding
    targets: Tensor = field(default_factory=lambda: torch.empty(0))  # which of the row's targets these are, ``[T]``

    @classmethod
    def of(cls, row: Row, layout: RowLayout, tokens: Tensor, targets: Tensor, **own: Any) -> Self:
        """The part with this layout; ``own`` are its other fields, ``predictors`` as indices in the part among them."""
        nothing = row.labels[:0]
        return cls(
            input_ids=torch.nn.functional.pad(row.input_ids[:, tokens], (0, layout.length - len(tokens))),
            layout=layout,
            labels=row.labels[targets],
            member_targets=nothing,
            member_responses=nothing,
            edges=row.edges[:0],
            groups=(),
            documents=(),
            response_paths=(),
            tokens=tokens,
            targets=targets,
            **own,
        )


@dataclass(eq=False)
class Piece(RowPart):
    """What runs in one pass of a row longer than memory; its layout's ``keys`` are those on its path and its own."""

    parent: int = -1  # the piece that this one continues, -1 where it begins; pieces stand behind their parents


@dataclass(eq=False)
class RowShard(RowPart):
    """What one of several processes runs of a row; which keys its tokens see, its layout's ``shard`` tells."""

    num_targets: int = 0  # of the whole row

    def _map(self, change: Any) -> RowShard:
        changed = cast("RowShard", super()._map(change))
        changed.layout.shard = self.layout.shard and self.layout.shard.map(change)
        return changed


def on_device(values: Sequence[Any] | NDArray[np.int64], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that the host knows, as a tensor on ``device``, without waiting for what runs there."""
    tensor = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        # a copy from memory that may be paged out waits for all work before it
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def idle_row(pad_to_multiple_of: int = 1) -> Row:
    """The smallest row there is, for a process that has no row of its own while the others still run theirs."""
    # token 0 is in every vocabulary
    return Row.from_groups([Group.from_lists([0], [[0]], edges=())], pad_to_multiple_of=pad_to_multiple_of)


def stack_inputs(rows: Sequence[Row]) -> dict[str, Any]:
    """The keyword arguments that run several rows as one batch: ``model(**stack_inputs(rows))``.

    Row ``b`` of the output belongs to ``rows[b]``, whose indices (``predictors``, ``response_paths``) hold in it as
    they are; what lies behind ``rows[b].layout.length`` is padding. One longer row does the same work.
    """
    layout = RowLayout.stack([row.layout for row in rows])
    input_ids = [torch.nn.functional.pad(row.input_ids, (0, layout.length - row.layout.length)) for row in rows]
    return dataclasses.replace(rows[0], input_ids=torch.cat(input_ids), layout=layout).inputs()
