"""Which modules of a model carry a state along the row, and by which kernels: read from the model's own files.

A file of transformers marks each such kernel with ``use_kernel_func_from_hub_with_fallback`` and the name under which
other packages have it. A class uses those that its methods name. Whatever else carries a state gives itself away where
it updates a cache, without which it could not generate.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections import Counter
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from flexdpo.mixing.kernels import CONVOLUTION, FUSED, SCANS, STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_MARK = "use_kernel_func_from_hub_with_fallback"
_KNOWN = {CONVOLUTION, *SCANS, *FUSED, *STEPS}
# what a class names that keeps a state of its own between calls, and what must compute that state
_UPDATES = {"update_conv_state": {CONVOLUTION}, "update_recurrent_state": set(SCANS)}


@functools.cache
def kernels_of_file(module_name: str) -> dict[str, str]:
    """The kernels of a model file: what it calls each, and the name that the kernel has elsewhere."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}  # a model without a file
    found = {}
    for function in tree.body:
        for mark in getattr(function, "decorator_list", ()):
            called = isinstance(mark, ast.Call) and getattr(mark.func, "id", getattr(mark.func, "attr", "")) == _MARK
            if isinstance(function, ast.FunctionDef) and called and isinstance(mark.args[0], ast.Constant):
                found[function.name] = str(mark.args[0].value)
    return found


@dataclass(frozen=True)
class MixerClass:
    """A class of modules that carry a state, as far as its methods tell."""

    # by file, what it calls each kernel and the name that the kernel has elsewhere
    kernels: dict[str, dict[str, str]]
    updates: frozenset[str]  # what of a cache it updates

    @property
    def names(self) -> set[str]:
        """The kernels that it uses."""
        return {name for file in self.kernels.values() for name in file.values()}

    @property
    def along_trie(self) -> frozenset[str]:
        """Those that must run along the trie whenever a packed row runs."""
        return frozenset(self.names & {CONVOLUTION, *SCANS})

    @property
    def understood(self) -> bool:
        """Whether all of its state goes through kernels that are known."""
        return self.names <= _KNOWN and all(_UPDATES[update] & self.names for update in self.updates)


def mixer_class(kind: type) -> MixerClass | None:
    """What a class of modules uses; ``None`` where it carries no state."""
    kernels: dict[str, dict[str, str]] = {}
    updates: set[str] = set()
    for function in _methods(kind):
        names = set(_names(function.__code__))
        updates |= names & set(_UPDATES)
        file = function.__globals__.get("__name__", "")
        used = {own: name for own, name in kernels_of_file(file).items() if own in names}
        if used:
            kernels.setdefault(file, {}).update(used)
    return MixerClass(kernels, frozenset(updates)) if kernels or updates else None


def mixers_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """All modules of a backbone that carry a state, by name."""
    return {name: module for name, module in backbone.named_modules() if mixer_class(type(module)) is not None}


def mixing_ways(backbone: nn.Module) -> list[str]:
    """How each class of modules that carry a state runs on packed rows, in words."""
    counts = Counter(type(mixer) for mixer in mixers_of(backbone).values())
    return [f"{kind.__name__} ({count}): {_way(mixer_class(kind))}" for kind, count in counts.items()]


def _way(found: MixerClass | None) -> str:
    if found is None or not found.understood:
        return "refused, its state goes past any known kernel"
    scans = {name: SCANS[name].way for name in sorted(found.names & set(SCANS))}
    if "unfolded" in scans.values():
        takes_none = ", ".join(name for name, way in scans.items() if way == "unfolded")
        return f"scan unfolded to whole sequences, since {takes_none} takes no state; the rest shared"
    return "shared"


def _methods(kind: type) -> Iterator[FunctionType]:
    for made_by in kind.__mro__:
        if made_by.__module__.startswith("torch.") or made_by is object:
            continue
        for value in vars(made_by).values():
            function: Any = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else None
            if isinstance(function, FunctionType):
                yield function


def _names(code: CodeType) -> Iterator[str]:
    """Globals and attributes that a function names, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
