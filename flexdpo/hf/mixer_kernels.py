"""Which modules of a model carry a state along the row, and by which kernels: read from the model's own files.

A file of transformers marks each such kernel with ``use_kernel_func_from_hub_with_fallback`` and the name under which
other packages have it. A class uses those that its methods name. Whatever else carries a state gives itself away where
it updates a cache, without which it could not generate; and an attention that goes by more than its mask, by what it
hands to the attention function. Such modules can be run whole, along the path to each leaf.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from flexdpo.mixing.kernels import CONVOLUTION, FUSED, GPU_CHUNK, SCANS, STEPS

_MARK = "use_kernel_func_from_hub_with_fallback"
_KNOWN = {CONVOLUTION, *SCANS, *FUSED, *STEPS}
# transformers' delta rules scan as many
SCAN_CHUNK = GPU_CHUNK
# what a class names that keeps a state of its own between calls, and what must compute that state: nothing known
# computes that of lightning attention, or one that a module keeps itself
_UPDATES: dict[str, set[str]] = {
    "update_conv_state": {CONVOLUTION},
    "update_recurrent_state": set(SCANS),
    "set_linear_cache": set(),
    "conv1d_state": set(),
}
# how attention modules find their function, and what some hand to it that goes by places in the row
_ATTENTION, _BY_PLACE = "ALL_ATTENTION_FUNCTIONS", "position_bias"
# what parts of others name that choose keys by an index of their own, and how a choice is handed on that no mask holds
_INDEX, _CHOICE = "update_indexer", "indices"
# of the work for a token, what may be done once for every path and not be shared: at ordinary lengths (1.4 times as
# many tokens as distinct ones, a tenth of padding) more saves nothing
MOST_UNFOLDED = 0.75


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
    by_place: bool  # whether it is an attention that goes by places in the row

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
        known = self.names <= _KNOWN and all(_UPDATES[update] & self.names for update in self.updates)
        return known and not self.by_place


def mixer_class(kind: type) -> MixerClass | None:
    """What a class of modules uses; ``None`` where it carries no state and goes by no places."""
    kernels: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    by_place = False
    for function in _methods(kind):
        named = set(_names(function.__code__))
        names |= named
        by_place |= _ATTENTION in named and _BY_PLACE in set(_texts(function.__code__))
        file = function.__globals__.get("__name__", "")
        used = {own: name for own, name in kernels_of_file(file).items() if own in named}
        if used:
            kernels.setdefault(file, {}).update(used)
    updates = frozenset(names & set(_UPDATES))
    return MixerClass(kernels, updates, by_place) if kernels or updates or by_place else None


def mixers_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """All modules of a backbone that carry a state or are run whole, by name; of the latter without their parts."""
    found: dict[str, nn.Module] = {}
    whole = ""
    for name, module in backbone.named_modules():
        if whole and name.startswith(whole):
            continue
        if runs_whole(module):
            whole = f"{name}."
        if runs_whole(module) or mixer_class(type(module)) is not None:
            found[name] = module
    return found


def runs_whole(module: nn.Module) -> bool:
    """Whether a module must be run along the path to each leaf, as it is."""
    found = mixer_class(type(module))
    return _chooses_keys(module) if found is None else not found.understood


def _chooses_keys(module: nn.Module) -> bool:
    """Whether a module is an attention with a part that chooses its keys, by its mask."""
    codes = [function.__code__ for function in _methods(type(module))]
    if not any(_ATTENTION in _names(code) and _CHOICE not in _texts(code) for code in codes):
        return False
    return any(_INDEX in _names(function.__code__) for part in module.children() for function in _methods(type(part)))


def share_unfolded(backbone: nn.Module) -> float:
    """How much of the work for a token is done in modules that are run whole: 0 to 1."""
    whole = [module for module in mixers_of(backbone).values() if runs_whole(module)]
    return sum(weights_passed(module, backbone) for module in whole) / max(weights_passed(backbone), 1.0)


def weights_passed(module: nn.Module, backbone: nn.Module | None = None) -> float:
    """Weights that a token is multiplied with in a module, of the experts those that are chosen; no embeddings."""
    config: Any = (backbone or module).config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    weights = (p for p in module.parameters() if p.ndim >= 2 and id(p) not in embeddings)
    return sum(p.numel() * (chosen / experts if p.ndim > 2 and p.shape[0] == experts else 1.0) for p in weights)


def state_of(mixer: nn.Module) -> tuple[int, int]:
    """Numbers of the state that a scan of a mixer hands on, and heads of it; (0, 0) where it has no scan.

    No heads where a state is kept for every token, and not for chunks of them: Mamba 1.
    """
    found = mixer_class(type(mixer))
    if found is None or not found.names & set(SCANS):
        return 0, 0

    def size(*names: str) -> int:
        return next((int(getattr(mixer, name)) for name in names if isinstance(getattr(mixer, name, None), int)), 1)

    if "selective_scan_fn" in found.names:
        return size("intermediate_size") * size("ssm_state_size"), 0
    heads = size("num_v_heads", "num_heads")
    return heads * size("head_k_dim", "ssm_state_size", "head_dim") * size("head_v_dim", "head_dim"), heads


def mixing_ways(backbone: nn.Module) -> list[str]:
    """How each class of modules that carry a state runs on packed rows, in words."""
    counts = Counter((type(mixer), runs_whole(mixer)) for mixer in mixers_of(backbone).values())
    share = share_unfolded(backbone)
    return [f"{kind.__name__} ({count}): {_way(mixer_class(kind), share)}" for (kind, _), count in counts.items()]


def _way(found: MixerClass | None, share: float) -> str:
    if found is None or not found.understood:
        if share > MOST_UNFOLDED:
            return "refused, it would run whole along every path, and too little of the model is left to share"
        return "run whole along every path, since its state goes past any known kernel; the rest shared"
    scans = {name: SCANS[name].way for name in sorted(found.names & set(SCANS))}
    if "unfolded" in scans.values():
        takes_none = ", ".join(name for name, way in scans.items() if way == "unfolded")
        return f"scan unfolded to whole sequences, since {takes_none} takes no state; the rest shared"
    if scans:
        return "shared; where that fills chunks of the scan, it runs less than one again for each branch"
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


def _texts(code: CodeType) -> Iterator[str]:
    """Strings among the constants of a function, names of the arguments that it passes included."""
    for constant in code.co_consts:
        yield from (each for each in (constant if isinstance(constant, tuple) else [constant]) if isinstance(each, str))
