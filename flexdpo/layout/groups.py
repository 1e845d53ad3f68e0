"""The unit of data: a prompt, its responses and the preferences among them, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.errors import FlexdpoError, found

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PromptImage:
    """One image of a prompt, as a model gets it.

    What a processor cuts into several tiles that are encoded one by one may be one image here, or one for each tile.
    """

    digest: str  # of pixels and sizes; images of equal digests are one
    tokens: int  # image tokens that stand for it, all blocks together
    # what the processor made of it: tensors that are concatenated along their first dimension with those of others
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Group:
    """A tokenised preference example: one prompt, ``K >= 1`` responses and the preferences among them.

    A pair is ``K = 2`` with the single edge ``(0, 1)``: response 0 is chosen over response 1.
    """

    prompt_ids: NDArray[np.int64]  # token ids of the prompt, ``[P]`` int64, ``P >= 1``
    # token ids of each response without the prompt, ``K`` arrays ``[L_k]`` int64, ``L_k >= 1``
    response_ids: tuple[NDArray[np.int64], ...]
    # preferences ``(chosen, rejected)`` as indices into ``response_ids``; empty for plain supervision
    edges: tuple[tuple[int, int], ...] = ()
    name: str = "group"  # how error messages call this example, for instance ``"row 17"``
    images: tuple[PromptImage, ...] = ()  # of the prompt, in the order in which their tokens stand there
    image_token_id: int = -1  # the id that all image tokens of the prompt have

    def __post_init__(self) -> None:
        # the prompt's last token predicts the first token of every response
        prompt = token_ids_of(self.prompt_ids, f"{self.name}: the prompt", empty="give it at least a BOS token")
        object.__setattr__(self, "prompt_ids", prompt)
        responses = token_ids_of_each(
            self.response_ids, f"{self.name}: response", empty="drop it or append the EOS token"
        )
        object.__setattr__(self, "response_ids", tuple(responses))
        if not self.response_ids:
            raise FlexdpoError(f"{self.name}: a group needs at least one response")
        try:
            edges = tuple((index(chosen), index(rejected)) for chosen, rejected in self.edges)
        except (TypeError, ValueError) as error:
            raise FlexdpoError(
                f"{self.name}: edges must be pairs (chosen, rejected) of numbers of responses, got {found(self.edges)}"
            ) from error
        object.__setattr__(self, "edges", edges)
        for chosen, rejected in self.edges:
            if missing := [end for end in (chosen, rejected) if not 0 <= end < len(self.response_ids)]:
                raise FlexdpoError(
                    f"{self.name}: edge ({chosen}, {rejected}) names response {missing[0]}, "
                    f"but the group has responses 0 to {len(self.response_ids) - 1}"
                )
            if chosen == rejected:
                raise FlexdpoError(f"{self.name}: edge ({chosen}, {rejected}) prefers a response to itself")

    @classmethod
    def from_lists(
        cls,
        prompt_ids: Sequence[int],
        response_ids: Sequence[Sequence[int]],
        edges: Sequence[tuple[int, int]] = ((0, 1),),
        name: str = "group",
    ) -> Group:
        """Build a group from plain lists of token ids; by default response 0 is chosen over response 1."""
        given: dict[str, Any] = {"prompt_ids": prompt_ids, "response_ids": response_ids, "edges": edges}
        return cls(**given, name=name)

    @property
    def sequences(self) -> list[NDArray[np.int64]]:
        """Every response behind its own copy of the prompt, as an ordinary trainer would run it."""
        return [np.concatenate((self.prompt_ids, response)) for response in self.response_ids]

    @property
    def prompt_key(self) -> bytes:
        """What stands for the prompt: its tokens, and its images, which equal tokens do not tell apart."""
        return self.prompt_ids.tobytes() + "".join(image.digest for image in self.images).encode()

    @property
    def unshared_tokens(self) -> int:
        """Tokens an ordinary trainer runs for this group, padding not counted."""
        return sum(self.prompt_ids.size + response.size for response in self.response_ids)


def numbered(groups: Sequence[Group]) -> Iterator[tuple[Group, int]]:
    """Each group, and the number that its first response has among the responses of all of them."""
    return zip(groups, accumulate((len(group.response_ids) for group in groups), initial=0), strict=False)


def require_groups(groups: Any) -> None:
    """Refuse what is no list of groups."""
    wrong = [each for each in groups if not isinstance(each, Group)] if isinstance(groups, Sequence) else [groups]
    if wrong:
        raise FlexdpoError(
            f"expected a list of flexdpo.Group, got {found(wrong[0])}{' in it' * (wrong[0] is not groups)}; "
            "Group.from_lists makes one of token ids, and a single one goes into a list"
        )


def token_ids_of(sequence: Any, name: str, *, empty: str = "leave it out") -> NDArray[np.int64]:
    """One sequence's ids, ``[L]`` int64; ``FlexdpoError`` if it is empty, or anything in it is no token id.

    Ids beyond int64 would wrap around, and fractions be cut off: other tokens than those given.
    """
    try:
        ids = np.asarray(sequence)
    except (TypeError, ValueError, RuntimeError):  # a ragged list, a tensor of another device
        ids = np.empty((0, 0))
    if ids.shape == (0,):
        raise FlexdpoError(f"{name} has no tokens; {empty}")
    # an unsigned number beyond int64 is below 0 behind the cast
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or int((ids := ids.astype(np.int64, copy=False)).min()) < 0:
        raise FlexdpoError(f"{name} must be one list of token ids, whole numbers from 0 on, got {found(sequence)}")
    return ids


def token_ids_of_each(sequences: Any, name: str, *, empty: str = "leave it out") -> list[NDArray[np.int64]]:
    """:func:`token_ids_of` each sequence, which is called by its number."""
    try:
        numbers = enumerate(sequences)
    except TypeError as error:
        raise FlexdpoError(f"{name} 0 and further ones must be given as a list, got {found(sequences)}") from error
    return [token_ids_of(sequence, f"{name} {k}", empty=empty) for k, sequence in numbers]
