"""Length profiles of six preference datasets, and random pairs that follow them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.layout.groups import Group

_LENGTHS = ("median_prompt", "median_response", "max_prompt", "max_length")


@dataclass(frozen=True)
class Profile:
    """How long a dataset's prompts and responses are, in tokens: medians, where they are cut, log-normal spreads."""

    name: str
    median_prompt: float
    median_response: float
    max_prompt: float
    max_length: float  # of a prompt with its response
    sigma_prompt: float
    sigma_response: float

    def scaled(self, scale: float) -> Profile:
        """The same profile with every length multiplied by ``scale``."""
        return replace(self, **{name: getattr(self, name) * scale for name in _LENGTHS})

    def pairs(self, count: int, rng: np.random.Generator, vocabulary: int) -> list[Group]:
        """Draw preference pairs of random tokens, chosen and rejected independently."""

        def length(median: float, sigma: float, longest: float) -> int:
            return max(1, int(min(median * np.exp(sigma * rng.standard_normal()), longest)))

        found = []
        for number in range(count):
            prompt = length(self.median_prompt, self.sigma_prompt, min(self.max_prompt, self.max_length - 1))
            responses = [length(self.median_response, self.sigma_response, self.max_length - prompt) for _ in range(2)]
            chosen, rejected, ids = (rng.integers(0, vocabulary, size, dtype=np.int64) for size in (*responses, prompt))
            # real responses differ from the first token on, or nearly so
            rejected[0] = (chosen[0] + 1) % vocabulary
            found.append(Group(ids, (chosen, rejected), ((0, 1),), f"{self.name} pair {number}"))
        return found


@cache
def profile_data() -> dict[str, Any]:
    """The package's own file: lengths of the six datasets, and what the paper and others published."""
    return dict(json.loads(files("flexdpo.bench").joinpath("profiles.json").read_text(encoding="utf-8")))


def load_profiles() -> dict[str, Profile]:
    """The six profiles by name."""
    data = profile_data()
    spreads = {name: data[name] for name in ("sigma_prompt", "sigma_response")}
    lengths = {name: {each: of[each] for each in _LENGTHS} for name, of in data["profiles"].items()}
    return {name: Profile(name, **each, **spreads) for name, each in lengths.items()}


def find_profiles(name: str) -> list[Profile]:
    """The profile of this name, or all of them for ``"all"``."""
    known = load_profiles()
    names = [*known, "all"]
    if name not in names:
        raise FlexdpoError(f"--profile {name!r} is unknown{nearest(name, names)}; use one of {', '.join(names)}")
    return list(known.values()) if name == "all" else [known[name]]
