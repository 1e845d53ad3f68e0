"""The tensors of one packed row, and the layout that a model's attention needs of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.sequences import numbered_sequences, token_ids_of
from flexdpo.layout.trie import Trie

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from flexdpo.layout.groups import Group

# tokens to a side of a tile of FlexAttention
TILE = 128

# what a model that was not prepared would ask of its attention_mask first
# fmt: off
_TENSOR_ATTRIBUTES = frozenset(
    (
        "ndim", "shape", "size", "dim", "dtype", "view", "reshape", "sum", "any", "all", "bool", "long",
        "int", "float", "masked_fill", "eq", "ne", "expand", "unsqueeze", "repeat", "cumsum", "flatten",
        "contiguous", "type", "transpose", "permute", "squeeze", "half", "bfloat16",
    )
)
# fmt: on


def tile_multiple(device: torch.device | str) -> int:
    """Rows are padded to a multiple of this many tokens.

    On CUDA whole tiles, which let FlexAttention skip its bounds checks; the CPU path has no tiles.
    """
    return TILE if torch.device(device).type == "cuda" else 1


class RowLayout:
    """Where every token of a batch of packed rows stands: all that attention needs to keep branches apart.

    It travels as the model's ``attention_mask``. A prepared model takes it out before its forward; any other model
    that reads its mask stops with an error, instead of running the row as one long sequence.

    Not a dataclass: FSDP looks into the dataclasses among a module's inputs and makes copies of them, and a copy is
    another row.

    Shapes: ``B`` rows, ``S`` tokens per row.

    Attributes:
        position_ids: Logical positions (depth in the trie), ``[B, S]`` int64.
        subtree_end: Row index just past the last descendant of each token, ``[B, S]`` int64.
        num_tokens: Real tokens of each row; the rest, up to ``S``, is padding.
        multiplicity: How many sequences contain each token, 0 at padding, ``[B, S]`` int64: what an ordinary run, which
            repeats the prompt for every response, counts it as. ``None`` where it is not known.
        shortest: Tokens of the shortest sequence that contains each token, 0 at padding, ``[B, S]`` int64; ``None``
            where it is not known. Some rotary embeddings go by it.
        longest: The same of the longest.
        memo: Masks already built for this layout, shared by all layers and by every model that runs it.
    """

    def __init__(
        self,
        position_ids: Tensor,
        subtree_end: Tensor,
        num_tokens: tuple[int, ...],
        multiplicity: Tensor | None = None,
        shortest: Tensor | None = None,
        longest: Tensor | None = None,
    ) -> None:
        self.position_ids = position_ids
        self.subtree_end = subtree_end
        self.num_tokens = num_tokens
        self.multiplicity = multiplicity
        self.shortest = shortest
        self.longest = longest
        self.memo: dict[Any, Any] = {}
        self._host: RowLayout | None = None
        self._check()

    def __repr__(self) -> str:
        return f"RowLayout({self.batch_size} rows of {self.length}, {self.num_tokens} real tokens, on {self.device})"

    def _check(self) -> None:
        if self.position_ids.ndim != 2 or self.position_ids.shape != self.subtree_end.shape:
            raise FlexdpoError(
                f"position_ids and subtree_end must both be [B, S], got {tuple(self.position_ids.shape)} "
                f"and {tuple(self.subtree_end.shape)}"
            )
        rows, device = len(self.position_ids), self.position_ids.device
        if len(self.num_tokens) != rows:
            raise FlexdpoError(f"num_tokens must hold one count for each of {rows} rows, got {len(self.num_tokens)}")
        if self.multiplicity is not None and self.multiplicity.shape != self.position_ids.shape:
            raise FlexdpoError(
                f"multiplicity must be [B, S]={list(self.position_ids.shape)}, got {list(self.multiplicity.shape)}"
            )
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
        if device.type == "cpu":
            # elsewhere a look at the values would wait for the device, and rows are made on the host
            self._check_values()

    def _check_values(self) -> None:
        length = self.position_ids.shape[1]
        index = torch.arange(length)
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
        known = (self.multiplicity, self.shortest, self.longest)
        return RowLayout(
            change(self.position_ids),
            change(self.subtree_end),
            self.num_tokens,
            *(None if each is None else change(each) for each in known),
        )

    @classmethod
    def stack(cls, layouts: Sequence[RowLayout]) -> RowLayout:
        """Put the rows of several layouts into one batch; shorter rows are padded to the longest.

        Args:
            layouts: At least one, all on the same device.
        """
        if not layouts:
            raise FlexdpoError("a batch needs at least one layout, got none")
        if len({layout.device for layout in layouts}) > 1:
            raise FlexdpoError(
                f"the layouts are on {', '.join(sorted({str(e.device) for e in layouts}))}; move them first"
            )
        length = max(layout.length for layout in layouts)
        padded = [layout._padded_to(length) for layout in layouts]
        known = ([getattr(each, name) for each in padded] for name in ("multiplicity", "shortest", "longest"))
        return cls(
            torch.cat([each.position_ids for each in padded]),
            torch.cat([each.subtree_end for each in padded]),
            tuple(count for each in padded for count in each.num_tokens),
            *(None if any(tensor is None for tensor in tensors) else torch.cat(tensors) for tensors in known),
        )

    def _padded_to(self, length: int) -> RowLayout:
        missing = length - self.length
        if missing == 0:
            return self
        # padding stands at position 0, sees only itself and belongs to no sequence
        ends = torch.arange(self.length + 1, length + 1, device=self.device).expand(self.batch_size, missing)
        padding = (0, missing)
        multiplicity = self.multiplicity
        return RowLayout(
            torch.nn.functional.pad(self.position_ids, padding),
            torch.cat([self.subtree_end, ends], dim=1),
            self.num_tokens,
            None if multiplicity is None else torch.nn.functional.pad(multiplicity, padding),
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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise FlexdpoError(
            f"something computed with a packed row's layout ({getattr(func, '__name__', func)}) before it reached a "
            "prepared model; call flexdpo.prepare_model(model) once after loading, and use no prompt tuning"
        )


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
        groups: The groups of this row, in row order; their responses are numbered through. Empty where the row was made
            of sequences, documents or lengths, each of which is numbered as a response to its first token.
        documents: ``(start, stop)`` of each trie's tokens: one group's, or those of groups that begin alike.
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
    def from_groups(cls, groups: Sequence[Group], *, pad_to_multiple_of: int = 1, limits: Sequence[int] = ()) -> Row:
        """Build one row that holds all of ``groups``, each as its own token trie.

        Args:
            groups: At least one group.
            pad_to_multiple_of: The row is padded to a multiple of this many tokens. Padding sees only itself.
            limits: Sequences on either side of one of these lengths share no tokens; see :func:`flexdpo.pack`.
        """
        return cls.from_tries(
            groups,
            [Trie.from_sequences(group.sequences, limits=limits) for group in groups],
            pad_to_multiple_of=pad_to_multiple_of,
        )

    @classmethod
    def from_tries(cls, groups: Sequence[Group], tries: Sequence[Trie], *, pad_to_multiple_of: int = 1) -> Row:
        """Build one row from groups and the tries of their sequences, as :meth:`from_groups` makes them."""
        return cls.from_families([[group] for group in groups], tries, pad_to_multiple_of=pad_to_multiple_of)

    @classmethod
    def from_families(
        cls,
        families: Sequence[Sequence[Group]],
        tries: Sequence[Trie],
        *,
        pad_to_multiple_of: int = 1,
        sizes: Sequence[Sequence[int]] | None = None,
    ) -> Row:
        """Build one row from families of groups, each of which shares one trie.

        Args:
            families: Groups that stand in the same trie, at least one of one; none where ``sizes`` are given.
            tries: For each family, the trie of its groups' sequences, one group after the other.
            pad_to_multiple_of: The row is padded to a multiple of this many tokens. Padding sees only itself.
            sizes: For each trie, tokens of each sequence before its first target; by default those of the prompts.
        """
        if not tries:
            raise FlexdpoError("a row needs at least one group, document or sequence, got none")
        if pad_to_multiple_of < 1:
            raise FlexdpoError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        groups = [group for family in families for group in family]
        if sizes is None:
            sizes = [[group.prompt_ids.size for group in family for _ in group.response_ids] for family in families]
        stops = list(accumulate(trie.token_ids.size for trie in tries))
        starts = [0, *stops[:-1]]
        token_ids = np.concatenate([trie.token_ids for trie in tries])
        parents = np.concatenate([trie.parents + start for trie, start in zip(tries, starts, strict=True)])
        paths = tuple(
            path[size:] + start
            for prompts, trie, start in zip(sizes, tries, starts, strict=True)
            for size, path in zip(prompts, trie.paths, strict=True)
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
                **{
                    name: _padded(np.concatenate(values), np.zeros(length, dtype=np.int64))
                    for name, values in _counts(tries).items()
                },
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
        first token, so that every later token is a target; the row has no groups and no preferences.

        Args:
            sequences: Token ids of each sequence, at least one of at least one token.
            pad_to_multiple_of: The row is padded to a multiple of this many tokens. Padding sees only itself.
            limits: Sequences on either side of one of these lengths share no tokens; see :func:`flexdpo.pack`.

        Raises:
            FlexdpoError: if a sequence is empty or holds anything but token ids.
        """
        arrays = [token_ids_of(sequence, f"sequence {k}") for k, sequence in enumerate(sequences)]
        if not arrays:
            raise FlexdpoError("a row needs at least one group, document or sequence, got none")
        trie = Trie.from_sequences(arrays, limits=limits)
        row = cls.from_families([], [trie], sizes=[[1] * len(arrays)], pad_to_multiple_of=pad_to_multiple_of)
        # the trie is a forest: what begins differently has nothing in common
        roots = np.flatnonzero(trie.parents < 0)
        row.documents = tuple(zip(roots.tolist(), trie.subtree_end[roots].tolist(), strict=True))
        return row

    @classmethod
    def from_documents(
        cls, documents: Sequence[Sequence[int] | NDArray[np.int64]], *, pad_to_multiple_of: int = 1
    ) -> Row:
        """Build one row of documents side by side that share nothing, whatever they begin with: plain packing.

        Args:
            documents: Token ids of each document, at least one of at least one token.
            pad_to_multiple_of: The row is padded to a multiple of this many tokens. Padding sees only itself.

        Raises:
            FlexdpoError: if a document is empty or holds anything but token ids.
        """
        arrays = [token_ids_of(document, f"document {k}") for k, document in enumerate(documents)]
        tries = [Trie.from_sequences([array]) for array in arrays]
        return cls.from_families([], tries, sizes=[[1]] * len(tries), pad_to_multiple_of=pad_to_multiple_of)

    @classmethod
    def from_lengths(cls, lengths: Sequence[Any], *, pad_to_multiple_of: int = 1) -> Row:
        """Build one row of which only lengths are known; its token ids are 0, 1, 2, ... in row order.

        ``[7, (4, [2, 3]), (4, [(1, [2, 2]), 3])]`` is a document of 7 tokens, one prompt of 4 with two responses, and
        one whose first two responses have their first token in common.

        Args:
            lengths: For each document its tokens, or ``(tokens, branches)`` where the branches behind these tokens are
                given in the same way, to any depth.
            pad_to_multiple_of: The row is padded to a multiple of this many tokens. Padding sees only itself.

        Raises:
            FlexdpoError: if a length is no whole number above 0.
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
        }

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Row:
        """Return this row with all its tensors on ``device``."""
        return self._map_tensors(
            lambda tensor: tensor.to(device, non_blocking=non_blocking), self.layout.to(device, non_blocking)
        )

    def pin_memory(self) -> Row:
        """Return this row in page-locked memory, so that its copy to a GPU need not wait."""
        return self._map_tensors(lambda tensor: tensor.pin_memory(), self.layout.pin_memory())

    def _map_tensors(self, change: Any, layout: RowLayout) -> Row:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, layout=layout, **changed)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that the host knows, as a tensor on ``device``, without waiting for what runs there."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        # a copy from memory that may be paged out waits for all work before it
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def stack_inputs(rows: Sequence[Row]) -> dict[str, Any]:
    """The keyword arguments that run several rows as one batch: ``model(**stack_inputs(rows))``.

    Row ``b`` of the output belongs to ``rows[b]``, whose indices (``predictors``, ``response_paths``) hold in it as
    they are; what lies behind ``rows[b].layout.length`` is padding. One longer row does the same work in one
    kernel call; a batch of rows is for whoever wants a fixed row length.

    Args:
        rows: At least one, all on the same device; shorter rows are padded to the longest.
    """
    layout = RowLayout.stack([row.layout for row in rows])
    input_ids = [torch.nn.functional.pad(row.input_ids, (0, layout.length - row.layout.length)) for row in rows]
    return {
        "input_ids": torch.cat(input_ids),
        "position_ids": layout.position_ids,
        "attention_mask": layout,
        "use_cache": False,
    }


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


def _counts(tries: Sequence[Trie]) -> dict[str, list[NDArray[np.int64]]]:
    """How many of a trie's sequences contain each token, and how long the shortest and the longest of them are."""
    found: dict[str, list[NDArray[np.int64]]] = {"multiplicity": [], "shortest": [], "longest": []}
    for trie in tries:
        multiplicity, longest = np.zeros((2, trie.token_ids.size), dtype=np.int64)
        shortest = np.full(trie.token_ids.size, np.iinfo(np.int64).max)
        for path in trie.paths:
            multiplicity[path] += 1
            shortest[path] = np.minimum(shortest[path], path.size)
            longest[path] = np.maximum(longest[path], path.size)
        for name, values in (("multiplicity", multiplicity), ("shortest", shortest), ("longest", longest)):
            found[name].append(values)
    return found


def _numbered_edges(groups: Sequence[Group]) -> Tensor:
    """The groups' preferences with responses numbered through the row, ``[E, 2]``."""
    first_response = [0, *accumulate(len(group.response_ids) for group in groups)]
    edges = [
        (chosen + offset, rejected + offset)
        for group, offset in zip(groups, first_response, strict=False)
        for chosen, rejected in group.edges
    ]
    return torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
