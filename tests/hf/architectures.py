"""Tiny models of every causal-LM architecture of transformers, and what is known about each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.versions import NAMES_KERNELS

_FOLDER = Path(__file__).parent / "zoo"
# older versions do not know every layer type and setting of the configurations
_WRITTEN_FOR = Version("5.23")
# the newest version that the verdicts were measured with
RECORDED_UP_TO = Version("5.24")
# properties under which tests report, without failing, what a newer version changed
BECAME_EXACT = "became exact"
NOT_IN_THE_ZOO = "not in the zoo"
NEW_SETTING = "new setting of TrainingArguments"
REPORTED_CHANGES = (BECAME_EXACT, NOT_IN_THE_ZOO, NEW_SETTING)


needs_states = pytest.mark.skipif(
    not NAMES_KERNELS, reason="before transformers 5.15 models that carry a state are refused"
)


@dataclass(frozen=True)
class Architecture:
    """One line of the zoo: ``verdict`` is exact, wrong or raises, as measured on packed rows without any check.

    ``config`` has as few layers as hold one of each kind, two at least: their number is most of what a test costs.
    Verdicts hold for ``RECORDED_UP_TO``; what is exact now was not before the release ``exact_from``.
    """

    model_type: str
    class_name: str
    config_class: str
    config: dict[str, Any]
    verdict: str
    exact_from: Version
    cause: str

    @property
    def exact(self) -> bool:
        """Whether it is exact in the installed transformers."""
        return self.verdict == "exact" and Version(transformers.__version__) >= self.exact_from

    @property
    def available(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, self.class_name) and hasattr(transformers, self.config_class)


@cache
def _lines() -> dict[str, dict[str, str]]:
    with (_FOLDER / "results.csv").open() as file:
        return {line["model_type"]: line for line in csv.DictReader(file)}


def recorded() -> set[str]:
    """Return every model type with a verdict, those included that no tiny configuration builds."""
    return set(_lines())


@cache
def zoo() -> dict[str, Architecture]:
    configs, lines = json.loads((_FOLDER / "tiny_configs.json").read_text()), _lines()
    return {
        name: Architecture(
            name,
            entry["architecture"],
            entry["config_class"],
            entry["config"],
            lines[name]["verdict"],
            Version(lines[name]["exact_from"] or "0"),
            lines[name]["cause"],
        )
        for name, entry in configs.items()
    }


def newer_than_recorded() -> bool:
    """Whether the installed transformers is of a later series than the verdicts: what it changed is then reported."""
    return Version(transformers.__version__).release[:2] > RECORDED_UP_TO.release[:2]


def older_than_recorded() -> bool:
    """Whether the installed transformers is of an earlier series than the verdicts."""
    return Version(transformers.__version__).release[:2] < RECORDED_UP_TO.release[:2]


@contextmanager
def skipped_before_its_time() -> Iterator[None]:
    """Skip the test where an older transformers has a model in a form that is refused, and the recorded one has not."""
    try:
        yield
    except UnsupportedModelError as error:
        if not older_than_recorded() or "newer transformers" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def available_or_skip(name: str) -> Architecture:
    """One line of the zoo, or skip the test where an older transformers does not have the architecture."""
    architecture = zoo()[name]
    if not architecture.available:
        missing = f"{architecture.class_name} with {architecture.config_class}"
        pytest.skip(f"transformers {transformers.__version__} has no {missing}")
    return architecture


def build_or_skip(name: str, **kwargs: Any) -> Any:
    """Build a model, or skip the test where an older transformers does not have it as it is in the zoo."""
    version = transformers.__version__
    available_or_skip(name)
    if name == "blt":
        kwargs["encoder_hash_byte_group_vocab"] = 512  # half a million by default
    try:
        return build_model(name, **kwargs)
    except Exception as error:
        if Version(version) >= _WRITTEN_FOR:
            raise
        pytest.skip(f"transformers {version} does not take the configuration of {name}: {error!r:.120}")


def build_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> Any:
    """Build a tiny model with its stock attention and weights that make attention matter, in evaluation mode."""
    architecture = zoo()[name]
    config = getattr(transformers, architecture.config_class)(**{**architecture.config, **overrides})
    torch.manual_seed(seed)
    model_class = getattr(transformers, architecture.class_name)
    # grouped matrix products exist for float32 and below only
    experts = {"experts_implementation": "eager"} if model_class._can_set_experts_implementation() else {}
    # SDPA would leave a softcap out where transformers still chooses it for such a model
    attention = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = model_class._from_config(config, dtype=dtype, **experts, **attention)
    # some models keep a router in float32, and some must in half precision
    model.to(dtype)
    kept = model._keep_in_fp32_modules_strict or () if dtype.itemsize < 4 else ()
    for parameter in (p for key, p in model.named_parameters() if any(part in key for part in kept)):
        parameter.data = parameter.data.float()
    draw_weights(model, seed)
    return model.eval()


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int = 0) -> None:
    """Redraw the weights: with the usual small ones, the attention of a tiny model does next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        if id(parameter) in embeddings:
            parameter.copy_(0.7 * noise)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)
