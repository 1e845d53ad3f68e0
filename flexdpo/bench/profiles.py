"""Length profiles of six preference datasets, and random pairs that follow them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.layout.groups import Group

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Profile:
    """How long prompts and responses of a dataset are, in tokens.

    Attributes:
        name: The dataset.
        median_prompt: Median length of prompts.
        median_response: Median length of responses.
        max_prompt: Prompts are cut to this.
        max_length: Prompt plus response are cut to this.
        sigma_prompt: Spread of the logarithm of prompt lengths.
        sigma_response: Spread of the logarithm of response lengths.
    """

    name: str
    median_prompt: float
    median_response: float
    max_prompt: float
    max_length: float
    sigma_prompt: float
    sigma_response: float

    def scaled(self, scale: float) -> Profile:
        """The same profile with every length multiplied by ``scale``."""
        lengths = ("median_prompt", "median_response", "max_prompt", "max_length")
        return replace(self, **{name: getattr(self, name) * scale for name in lengths})

    def pairs(self, count: int, rng: np.random.Generator, vocabulary: int) -> list[Group]:
        """Draw preference pairs of random tokens, chosen and rejected independently."""
        return [self._pair(number, rng, vocabulary) for number in range(count)]

    def _pair(self, number: int, rng: np.random.Generator, vocabulary: int) -> Group:
        def length(median: float, sigma: float, longest: float) -> int:
            return max(1, int(min(median * np.exp(sigma * rng.standard_normal()), longest)))

        prompt = length(self.median_prompt, self.sigma_prompt, min(self.max_prompt, self.max_length - 1))
        responses = [length(self.median_response, self.sigma_response, self.max_length - prompt) for _ in range(2)]

        def ids(size: int) -> NDArray[np.int64]:
            return rng.integers(0, vocabulary, size, dtype=np.int64)

        chosen, rejected = ids(responses[0]), ids(responses[1])
        # real responses differ from the first token on, or nearly so
        rejected[0] = (chosen[0] + 1) % vocabulary
        return Group(ids(prompt), (chosen, rejected), ((0, 1),), f"{self.name} pair {number}")


@cache
def load_profiles() -> dict[str, Profile]:
    """The six profiles by name, from the package's own file."""
    data = json.loads(files("flexdpo.bench").joinpath("profiles.json").read_text(encoding="utf-8"))
    return {
        name: Profile(
            name,
            lengths["median_prompt"],
            lengths["median_response"],
            lengths["max_prompt"],
            lengths["max_length"],
            data["sigma_prompt"],
            data["sigma_response"],
        )
        for name, lengths in data["profiles"].items()
    }


def find_profiles(name: str) -> list[Profile]:
    """The profile of this name, or all of them for ``"all"``."""
    known = load_profiles()
    if name == "all":
        return list(known.values())
    if name not in known:
        names = [*known, "all"]
        raise FlexdpoError(f"--profile {name!r} is unknown{nearest(name, names)}; profiles: {', '.join(names)}")
    return [known[name]]
