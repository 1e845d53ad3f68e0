"""The unit of data: a prompt, its responses and the preferences among them, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
        if self.prompt_ids.size == 0:
            # the prompt's last token predicts the first token of every response
            raise FlexdpoError(f"{self.name}: the prompt has no tokens; give it at least a BOS token")
        if not self.response_ids:
            raise FlexdpoError(f"{self.name}: a group needs at least one response")
        for k, response in enumerate(self.response_ids):
            if response.size == 0:
                raise FlexdpoError(f"{self.name}: response {k} has no tokens; drop it or append the EOS token")
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
        return cls(
            np.asarray(prompt_ids, dtype=np.int64),
            tuple(np.asarray(response, dtype=np.int64) for response in response_ids),
            tuple((int(chosen), int(rejected)) for chosen, rejected in edges),
            name,
        )

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
