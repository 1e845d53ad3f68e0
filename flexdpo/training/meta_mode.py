"""What torch's meta device lacks for a model that trains there: autocast, and products of experts in float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# what autocast casts the arguments of a function to, by their dtypes
_known_casts: dict[Any, list[torch.dtype | None]] = {}


_switching = threading.Lock()


@contextmanager
def autocast_on_meta(*, enabled: bool) -> Iterator[None]:
    """Let the meta device share the autocast of the CPU, to bfloat16 or none: torch has none for it, and says so."""

    def as_on_cpu(switch: Callable[..., Any], *args: Any, **named: Any) -> Any:
        on_cpu = ["cpu" if each == "meta" else each for each in args]
        return switch(*on_cpu, **{name: "cpu" if each == "meta" else each for name, each in named.items()})

    names = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype")
    switches = [*((torch, name) for name in names), (torch.amp.autocast_mode, "is_autocast_available")]
    # one thread after the other, or the second would put back what the first had put there
    with _switching:
        stock = [(place, name, getattr(place, name)) for place, name in switches]
        try:
            for place, name, switch in stock:
                setattr(place, name, partial(as_on_cpu, switch))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                yield
        finally:
            for place, name, switch in stock:
                setattr(place, name, switch)


class MetaMode(TorchFunctionMode):
    """While it is entered, functions of torch take on the meta device what they take on a CPU.

    Under autocast they cast what they are given; torch itself is asked for each of them what it casts on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        # by its storage, what a tensor of halves stands in for
        self.stands_for: dict[StorageWeakRef, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        leaves, spec = tree_flatten((args, kwargs or {}))
        if not any(_is_float(leaf) for leaf in leaves):
            return func(*args, **(kwargs or {}))
        if torch.is_autocast_enabled("cpu"):
            casts = zip(leaves, _casts(func, leaves, spec), strict=True)
            leaves = [leaf if dtype is None else leaf.to(dtype) for leaf, dtype in casts]
        args, kwargs = tree_unflatten(leaves, spec)
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            widest = max((leaf.dtype for leaf in leaves if _is_float(leaf)), key=lambda dtype: dtype.itemsize)
            if widest.itemsize == 2:
                raise
            args, kwargs = tree_unflatten([self._narrowed(leaf) for leaf in leaves], spec)
            return tree_map(lambda each: each.to(widest) if _is_float(each) else each, func(*args, **kwargs))

    def _narrowed(self, leaf: Any) -> Any:
        if not _is_float(leaf) or leaf.element_size() == 2:
            return leaf
        half = leaf.to(torch.bfloat16)
        self.stands_for[StorageWeakRef(half.untyped_storage())] = leaf
        return half


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta and leaf.is_floating_point()


def _casts(func: Callable[..., Any], leaves: list[Any], spec: Any) -> list[torch.dtype | None]:
    """To which dtypes autocast casts the leaves of a function's arguments, ``None`` where it leaves them alone."""
    # tensors alike in dtype and dimensions are cast alike
    call = func, tuple((leaf.dtype, leaf.ndim) if _is_float(leaf) else None for leaf in leaves)
    if call not in _known_casts:
        stand_ins = [_OnCpu(leaf) if isinstance(leaf, Tensor) and leaf.is_meta else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(stand_ins, spec)
        # what does not run on stand-ins (a property's setter) is cast before it fails, if at all
        with suppress(Exception), torch.no_grad():
            func(*args, **kwargs)
        _known_casts[call] = [leaf.cast if isinstance(leaf, _OnCpu) else None for leaf in stand_ins]
    return _known_casts[call]


class _OnCpu(Tensor):
    """A tensor on the meta device that says it were on a CPU, which autocast goes by, and sees what it is cast to."""

    held: Tensor
    cast: torch.dtype | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnCpu:
        made: Any = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=torch.device("cpu"))
        made.held, made.cast = held.detach(), None
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operator on the meta device."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], cls):
            args[0].cast = kwargs["dtype"]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        args, kwargs = tree_map(lambda each: each.held if isinstance(each, cls) else each, (args, kwargs))
        return tree_map(lambda each: cls(each) if isinstance(each, Tensor) else each, func(*args, **kwargs))
