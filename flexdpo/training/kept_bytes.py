"""What autograd keeps of a model for its backward pass, asked of the model itself on torch's meta device.

Nothing is computed there and no memory is taken, so the largest model answers in seconds on any machine: a packed row
runs through it, and the tensors that its operations save are counted. What a token adds follows from two rows. Scans
run as on a CPU, in chunks that suit it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from flexdpo.errors import first_line
from flexdpo.hf.auto import auto_class
from flexdpo.hf.compilation import decoder_layers
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.randomness import disable_dropout
from flexdpo.hf.unwrap import base_model, unwrapped
from flexdpo.layout.groups import Group
from flexdpo.layout.row import Row

logger = logging.get_logger(__name__)

# tokens of a prompt and of each of its two responses: whole chunks of every scan
_SHORT, _LONG = 64, 192
_ASKING = threading.Lock()


@dataclass(frozen=True)
class KeptBytes:
    """Bytes per token that autograd keeps, weights not counted, with activations of so many bytes a number."""

    element: int
    layers: float  # of all decoder layers
    most: float  # of the layer that keeps the most
    outside: float  # before and behind them, the head not included

    @property
    def figures(self) -> tuple[float, float, float]:
        """All three."""
        return self.layers, self.most, self.outside

    def at(self, element: int, other: KeptBytes) -> KeptBytes:
        """With activations of ``element`` bytes, on the line through this and another."""
        along = (element - self.element) / (other.element - self.element)
        return KeptBytes(element, *(a + along * (b - a) for a, b in zip(self.figures, other.figures, strict=True)))


def kept_bytes(model_or_config: Any) -> tuple[KeptBytes, ...]:
    """Ask a model, or the one of a config, in bfloat16 and in float32.

    Empty where the model cannot run without memory; a warning says why.
    """
    if not isinstance(model_or_config, nn.Module):
        return _asked(_Kind(model_or_config, auto_class(model_or_config).from_config))
    base = base_model(unwrapped(model_or_config))
    return _asked(_Kind(base.config, type(base)))


class _Kind:
    """A config and what makes a model of it; equal to others that say the same."""

    def __init__(self, config: Any, make: Any) -> None:
        self.config, self.make = config, make
        # a class may be called like another one
        self.key = make, type(config), repr(config.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kind) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=32)
# whoever asks may have turned off what the model is asked about
@torch.inference_mode(False)
@torch.enable_grad()
def _asked(kind: _Kind) -> tuple[KeptBytes, ...]:
    try:
        model = _without_memory(kind).to(torch.bfloat16)
        half = _kept(model)
    except Exception as error:
        logger.warning(
            f"{kind.config.model_type}: memory is predicted by a formula for the common layers, which may be far off, "
            f"since the model does not run on torch's meta device ({type(error).__name__}: "
            f"{first_line(error).split('. ')[0]}); give max_tokens_per_row as a number if rows do not fit"
        )
        return ()
    try:
        return half, _kept(model.to(torch.float32))
    except Exception:
        # experts that are multiplied in one go take halves alone there; their copies in float32 are then counted too
        return half, _kept(model.to(torch.bfloat16), widened=True)


def _without_memory(kind: _Kind) -> Any:
    with torch.device("meta"):
        model = kind.make(copy.deepcopy(kind.config))
    # other ways to run experts look at which were chosen; AttributeError: a version that has but one way
    with suppress(ValueError, AttributeError):
        model.set_experts_implementation("grouped_mm")
    disable_dropout(prepare_model(model))
    return model.train()


def _kept(model: Any, *, widened: bool = False) -> KeptBytes:
    """What a model keeps in its dtype, or with ``widened`` where all that is kept in halves were float32."""
    short, long = (_Saved.of(model, _row(size), widened) for size in (_SHORT, _LONG))
    tokens = 3 * (_LONG - _SHORT)
    layers = [(after - before) / tokens for before, after in zip(short.layers, long.layers, strict=True)]
    return KeptBytes(
        element=4 if widened else next(model.parameters()).element_size(),
        layers=sum(layers),
        most=max(layers, default=0.0),
        outside=(long.outside - short.outside) / tokens,
    )


def _row(size: int) -> Row:
    return Row.from_groups([Group.from_lists([5] * size, [[7] * size, [8] * size])]).to("meta")


class _HeadReached(Exception):  # noqa: N818 (no error: what follows is counted by the head's own formula)
    pass


@dataclass
class _Saved:
    """Bytes of the storages that autograd saves, each where it is saved first."""

    layers: list[int] = field(default_factory=list)  # of each call of a decoder layer
    outside: int = 0
    inside: bool = False
    widened: bool = False
    # tensors on the meta device have no address
    seen: set[StorageWeakRef] = field(default_factory=set)

    @classmethod
    def of(cls, model: Any, row: Row, widened: bool) -> _Saved:
        saved = cls(widened=widened, seen={_storage(weight) for weight in model.parameters()})
        hooks = torch.autograd.graph.saved_tensors_hooks(saved._save, lambda tensor: tensor)
        with _autocast_known(), saved._watching(model), hooks:
            try:
                model(**row.inputs())
            except _HeadReached:
                return saved
        raise RuntimeError("it calls no head that it names")

    def _save(self, tensor: Tensor) -> Tensor:
        if (storage := _storage(tensor)) not in self.seen:
            self.seen.add(storage)
            size = tensor.untyped_storage().nbytes() * (2 if self.widened and tensor.element_size() == 2 else 1)
            if self.inside:
                self.layers[-1] += size
            else:
                self.outside += size
        # an operation that keeps its own output would keep itself for ever
        return tensor.detach()

    @contextmanager
    def _watching(self, model: Any) -> Iterator[None]:
        def enter(*_: Any) -> None:
            self.inside = True
            self.layers.append(0)

        def leave(*_: Any) -> None:
            self.inside = False

        def stop(*_: Any) -> None:
            raise _HeadReached

        head = model.get_output_embeddings()
        handles = [] if head is None else [head.register_forward_pre_hook(stop)]
        checkpointed = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
        for layer in decoder_layers(model) or checkpointed:
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _autocast_known() -> Iterator[None]:
    """Let early releases of transformers 5 ask for autocast on the meta device, which torch has none for."""
    # one thread after the other, or the second would put back what the first had put there
    with _ASKING:
        asked = torch.is_autocast_enabled

        def is_enabled(*device: str, **named: str) -> bool:
            return "meta" not in (*device, *named.values()) and asked(*device, **named)

        torch.is_autocast_enabled = is_enabled
        try:
            yield
        finally:
            torch.is_autocast_enabled = asked


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
