"""The tensors of one packed row, and the layout that a model's attention needs of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.trie import Trie

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from flexdpo.layout.groups import Group

# what a model that was not prepared would ask of its attention_mask first
# fmt: off
_TENSOR_ATTRIBUTES = frozenset(
    (
        "ndim", "shape", "size", "dim", "dtype", "view", "reshape", "sum", "any", "all", "bool", "long",
        "int", "float", "masked_fill", "eq", "ne", "expand", "unsqueeze", "repeat", "cumsum", "flatten",
        "contiguous", "type",
    )
)
# fmt: on


@dataclass(eq=False)
class RowLayout:
    """Where every token of a batch of packed rows stands: all that attention needs to keep branches apart.

    It travels as the model's ``attention_mask``. A prepared model takes it out before its forward; any other model
    that reads its mask stops with an error, instead of running the row as one long sequence.

    Shapes: ``B`` rows, ``S`` tokens per row.

    Attributes:
        position_ids: Logical positions (depth in the trie), ``[B, S]`` int64.
        subtree_end: Row index just past the last descendant of each token, ``[B, S]`` int64.
        num_tokens: Real tokens of each row; the rest, up to ``S``, is padding.
        memo: Masks already built for this layout, shared by all layers and by every model that runs it.
    """

    position_ids: Tensor
    subtree_end: Tensor
    num_tokens: tuple[int, ...]
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.position_ids.ndim != 2 or self.position_ids.shape != self.subtree_end.shape:
            raise FlexdpoError(
                f"position_ids and subtree_end must both be [B, S], got {tuple(self.position_ids.shape)} "
                f"and {tuple(self.subtree_end.shape)}"
            )
        if len(self.num_tokens) != self.batch_size:
            raise FlexdpoError(
                f"num_tokens must hold one count for each of {self.batch_size} rows, got {len(self.num_tokens)}"
            )

    @property
    def batch_size(self) -> int:
        """Rows in the batch, ``B``."""
        return int(self.position_ids.shape[0])

    @property
    def length(self) -> int:
        """Tokens per row, padding included, ``S``."""
        return int(self.position_ids.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the layout lives."""
        return self.position_ids.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RowLayout:
        """Return this layout on another device, without the masks that were built for this one."""
        if torch.device(device) == self.device:
            return self
        return RowLayout(
            self.position_ids.to(device, non_blocking=non_blocking),
            self.subtree_end.to(device, non_blocking=non_blocking),
            self.num_tokens,
        )

    def __getattr__(self, name: str) -> Any:
        message = (
            f"a packed row reached a model that was not prepared for it (something asked for "
            f"attention_mask.{name}); call flexdpo.prepare_model(model) once after loading"
        )
        if name in _TENSOR_ATTRIBUTES:
            raise FlexdpoError(message)
        raise AttributeError(message)

    def __getitem__(self, _: Any) -> Any:
        return self.__getattr__("view")


@dataclass(eq=False)
class Row:
    """One packed row: token tries of several groups side by side, with what is predicted by what.

    Shapes: ``S`` tokens of the row, ``T`` targets (distinct edges into response tokens), ``M`` memberships of targets
    in responses, ``R`` responses, ``E`` preferences. All tensors are int64.

    Attributes:
        input_ids: ``[1, S]``.
        layout: Positions and subtree ends, ``[1, S]`` each.
        predictors: Row index of the token that predicts each target, ``[T]``.
        labels: The token predicted, ``[T]``.
        member_targets: Target index of each membership, ``[M]``; a beginning that two responses share exists once as
            a target and is listed by both.
        member_responses: Response index of each membership, ``[M]``.
        edges: Preferences as response indices ``(chosen, rejected)``, ``[E, 2]``.
        groups: The groups of this row, in row order; their responses are numbered through.
        documents: ``(start, stop)`` of each group's tokens in the row.
        response_paths: For each response, the row index of each of its tokens, the prompt not included.
    """

    input_ids: Tensor
    layout: RowLayout
    predictors: Tensor
    labels: Tensor
    member_targets: Tensor
    member_responses: Tensor
    edges: Tensor
    groups: tuple[Group, ...]
    documents: tuple[tuple[int, int], ...]
    response_paths: tuple[NDArray[np.int64], ...]

    @classmethod
    def from_groups(cls, groups: Sequence[Group], *, pad_to_multiple_of: int = 1) -> Row:
        """Build one row that holds all of ``groups``, each as its own token trie.

        Args:
            groups: At least one group.
            pad_to_multiple_of: The row is padded to a multiple of this many tokens. Padding sees only itself.
        """
        return cls.from_tries(
            groups,
            [Trie.from_sequences(group.sequences) for group in groups],
            pad_to_multiple_of=pad_to_multiple_of,
        )

    @classmethod
    def from_tries(cls, groups: Sequence[Group], tries: Sequence[Trie], *, pad_to_multiple_of: int = 1) -> Row:
        """Build one row from groups and the tries of their sequences, as :meth:`from_groups` makes them."""
        if not groups:
            raise FlexdpoError("a row needs at least one group, got none")
        if pad_to_multiple_of < 1:
            raise FlexdpoError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        stops = list(accumulate(len(trie) for trie in tries))
        starts = [0, *stops[:-1]]
        token_ids = np.concatenate([trie.token_ids for trie in tries])
        parents = np.concatenate([trie.parents + start for trie, start in zip(tries, starts, strict=True)])
        paths = tuple(
            path[group.prompt_ids.size :] + start
            for group, trie, start in zip(groups, tries, starts, strict=True)
            for path in trie.paths
        )
        targets = _Targets.of(paths)
        length = -(-stops[-1] // pad_to_multiple_of) * pad_to_multiple_of
        return cls(
            input_ids=_padded(token_ids, np.zeros(length, dtype=np.int64)),
            layout=RowLayout(
                position_ids=_padded(np.concatenate([t.depths for t in tries]), np.zeros(length, dtype=np.int64)),
                subtree_end=_padded(
                    np.concatenate([t.subtree_end + s for t, s in zip(tries, starts, strict=True)]),
                    np.arange(1, length + 1),
                ),
                num_tokens=(stops[-1],),
            ),
            # the prompt's last token predicts the first token of every response
            predictors=torch.from_numpy(parents[targets.nodes]),
            labels=torch.from_numpy(token_ids[targets.nodes]),
            member_targets=torch.from_numpy(targets.members),
            member_responses=torch.from_numpy(targets.responses),
            edges=_numbered_edges(groups),
            groups=tuple(groups),
            documents=tuple(zip(starts, stops, strict=True)),
            response_paths=paths,
        )

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
        """Tokens an ordinary trainer runs for the same groups, padding not counted."""
        return sum(group.unshared_tokens for group in self.groups)

    @property
    def num_responses(self) -> int:
        """Responses in the row, ``R``."""
        return len(self.response_paths)

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments for a prepared model: ``model(**row.inputs())``."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.layout,
            "use_cache": False,
        }

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Row:
        """Return this row with all its tensors on ``device``."""
        return self._map_tensors(
            lambda tensor: tensor.to(device, non_blocking=non_blocking), self.layout.to(device, non_blocking)
        )

    def pin_memory(self) -> Row:
        """Return this row in page-locked memory, so that its copy to a GPU need not wait."""
        layout = RowLayout(
            self.layout.position_ids.pin_memory(),
            self.layout.subtree_end.pin_memory(),
            self.layout.num_tokens,
        )
        return self._map_tensors(lambda tensor: tensor.pin_memory(), layout)

    def _map_tensors(self, change: Any, layout: RowLayout) -> Row:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, layout=layout, **changed)


@dataclass(frozen=True)
class _Targets:
    """The distinct response tokens of a row, and which responses contain each."""

    nodes: NDArray[np.int64]
    members: NDArray[np.int64]
    responses: NDArray[np.int64]

    @classmethod
    def of(cls, paths: Sequence[NDArray[np.int64]]) -> _Targets:
        nodes, members = np.unique(np.concatenate(paths), return_inverse=True)
        lengths = [path.size for path in paths]
        return cls(nodes, members.reshape(-1).astype(np.int64), np.repeat(np.arange(len(paths)), lengths))


def _padded(values: NDArray[np.int64], canvas: NDArray[np.int64]) -> Tensor:
    """Write ``values`` over the beginning of ``canvas``; what remains of it is the padding. ``[1, S]``."""
    canvas[: values.size] = values
    return torch.from_numpy(canvas)[None]


def _numbered_edges(groups: Sequence[Group]) -> Tensor:
    """The groups' preferences with responses numbered through the row, ``[E, 2]``."""
    first_response = [0, *accumulate(len(group.response_ids) for group in groups)]
    edges = [
        (chosen + offset, rejected + offset)
        for group, offset in zip(groups, first_response, strict=False)
        for chosen, rejected in group.edges
    ]
    return torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
