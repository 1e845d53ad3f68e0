"""What autograd keeps of a model for its backward pass, asked of the model itself on torch's meta device.

Nothing is computed there and no memory is taken, so the largest model answers in seconds on any machine: a packed row
runs through it, and the tensors that its operations save are counted. What a token adds follows from two rows. A model
is asked as it stands, with its adapters and without what its frozen weights need not keep; a config speaks for a model
that is trained as a whole. Scans run as on a CPU, in chunks that suit it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from flexdpo.errors import first_line
from flexdpo.hf.auto import auto_class
from flexdpo.hf.checkpointing import checkpointing_name
from flexdpo.hf.compilation import decoder_layers
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.randomness import disable_dropout
from flexdpo.hf.unwrap import base_model, unwrapped
from flexdpo.layout.groups import Group
from flexdpo.layout.row import Row
from flexdpo.training.meta_mode import MetaMode, autocast_on_meta

logger = logging.get_logger(__name__)

# tokens of a prompt and of each of its two responses: whole chunks of every scan
_SHORT, _LONG = 64, 192
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
# what a model was when it was asked, and what it told
_of_models: WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, KeptBytes | None]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class KeptBytes:
    """Bytes per token that autograd keeps, weights not counted."""

    layers: float  # of all decoder layers
    most: float  # of the layer that keeps the most
    outside: float  # before and behind them, the head not included


# whoever asks may have turned off what the model is asked about
@torch.inference_mode(False)
@torch.enable_grad()
def kept_bytes(model_or_config: Any, weight_bytes: int, *, autocast: bool) -> KeptBytes | None:
    """Ask a model as it is, or the one of a config, with weights of so many bytes, and under autocast to halves.

    ``None`` where the model cannot run without memory; a warning says why.
    """
    dtype = _DTYPES[weight_bytes]
    if not isinstance(model_or_config, nn.Module):
        return _of_config(_Kind(model_or_config, auto_class(model_or_config).from_config), dtype, autocast)
    model = unwrapped(model_or_config)
    base = base_model(model)
    # what may change between two questions and decides on the answer
    state = repr(base.config.to_dict()), [(weight.requires_grad, weight.dtype) for weight in model.parameters()]
    if _of_models.get(model, (None,))[0] != state:
        _of_models[model] = state, {}
    told = _of_models[model][1]
    if (dtype, autocast) not in told:
        try:
            told[dtype, autocast] = _asked(_without_weights(model, dtype), autocast)
        except Exception as error:
            told[dtype, autocast] = _of_config(_Kind(base.config, type(base)), dtype, autocast)
            if told[dtype, autocast] is not None:
                logger.warning(
                    f"{base.config.model_type}: memory is predicted as if all weights of a model without adapters were "
                    f"trained, since a copy of this one does not run on torch's meta device ({type(error).__name__}: "
                    f"{first_line(error).split('. ')[0]}); give max_tokens_per_row as a number if rows could be longer"
                )
    return told[dtype, autocast]


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
def _of_config(kind: _Kind, dtype: torch.dtype, autocast: bool) -> KeptBytes | None:
    try:
        with torch.device("meta"):
            model = kind.make(copy.deepcopy(kind.config))
        return _asked(model.to(dtype), autocast)
    except Exception as error:
        logger.warning(
            f"{kind.config.model_type}: memory is predicted by a formula for the common layers, which may be far off, "
            f"since the model does not run on torch's meta device ({type(error).__name__}: "
            f"{first_line(error).split('. ')[0]}); give max_tokens_per_row as a number if rows do not fit"
        )
        return None


def _without_weights(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model on the meta device, adapters included, whose weights have no values."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty(_shape(tensor), dtype=tensor.dtype, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
    for module in model.modules():
        whole = isinstance(module, nn.Linear) and (module.out_features, module.in_features)
        if whole and (module.weight.element_size() < 2 or _shape(module.weight) != whole):
            # quantised weights, which kernels of their own unpack; autograd keeps what it keeps of plain ones
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta", dtype)
            memo[id(module)] = plain.requires_grad_(False)
    copied = copy.deepcopy(model, memo)
    # accelerate's hooks would move what goes in to the device of the weights, and checkpoints are counted apart
    remove_hook_from_module(copied, recurse=True)
    base = base_model(copied)
    getattr(base, checkpointing_name(base, "_disable"))()
    # an adapter may be wider than what it adapts
    most = max(copied.parameters(), key=lambda weight: weight.numel())
    return copied if most.element_size() == dtype.itemsize else copied.to(dtype)


def _shape(tensor: Tensor) -> torch.Size:
    # DeepSpeed leaves nothing but its shape of a weight that is spread over processes
    return getattr(tensor, "ds_shape", tensor.shape)


def _asked(model: Any, autocast: bool) -> KeptBytes:
    """What a model on the meta device keeps; it is changed."""
    # other ways to run experts look at which were chosen; AttributeError: a version that has but one way
    with suppress(ValueError, AttributeError):
        base_model(model).set_experts_implementation("grouped_mm")
    prepare_model(model)
    disable_dropout(model.train())
    short, long = (_Saved.of(model, _row(size), autocast) for size in (_SHORT, _LONG))
    tokens = 3 * (_LONG - _SHORT)
    layers = [(after - before) / tokens for before, after in zip(short.layers, long.layers, strict=True)]
    return KeptBytes(
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

    mode: MetaMode = field(default_factory=MetaMode)
    layers: list[int] = field(default_factory=list)  # of each call of a decoder layer
    outside: int = 0
    inside: bool = False
    # tensors on the meta device have no address
    seen: set[StorageWeakRef] = field(default_factory=set)

    @classmethod
    def of(cls, model: Any, row: Row, autocast: bool) -> _Saved:
        saved = cls(seen={_storage(weight) for weight in model.parameters()})
        hooks = torch.autograd.graph.saved_tensors_hooks(saved._save, lambda tensor: tensor)
        with autocast_on_meta(enabled=autocast), saved._watching(model), hooks, saved.mode:
            try:
                model(**row.inputs())
            except _HeadReached:
                return saved
        raise RuntimeError("it calls no head that it names")

    def _save(self, tensor: Tensor) -> Tensor:
        kept = self.mode.stands_for.get(_storage(tensor), tensor)
        if (storage := _storage(kept)) not in self.seen:
            self.seen.add(storage)
            size = kept.untyped_storage().nbytes()
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


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
