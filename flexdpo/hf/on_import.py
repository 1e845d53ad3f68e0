"""Makes ``attn_implementation="flexdpo"`` known as soon as transformers' models are imported, and not before.

Registering needs transformers' model code, and with it torch: seconds that ``flexdpo --version`` and a script that only
packs rows would wait for nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# where transformers keeps the attention that models are made with
_MODELS = "transformers.modeling_utils"


class _RegisterBehind(MetaPathFinder):
    """Finds nothing itself; lets our registration follow the import of one module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(models: ModuleType) -> None:
    """Register functions that load ours when called: a module of ours may be in the middle of its own import now."""
    masks = importlib.import_module("transformers.masking_utils")
    models.AttentionInterface.register("flexdpo", partial(_ours, "flexdpo_attention"))
    masks.AttentionMaskInterface.register("flexdpo", partial(_ours, "flexdpo_mask"))


def _ours(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(importlib.import_module("flexdpo.hf.interface"), name)(*args, **kwargs)


def register_when_imported() -> None:
    """Register now if transformers' models are there already, otherwise behind their import. Safe to call again."""
    if _MODELS in sys.modules:
        _register(sys.modules[_MODELS])
    elif not any(isinstance(finder, _RegisterBehind) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterBehind())
