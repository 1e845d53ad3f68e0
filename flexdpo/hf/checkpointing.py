"""Layers that run again in the backward pass, under the name that the installed transformers has for them."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch.utils.checkpoint import checkpoint

from flexdpo.attention.remembered import keep_attention
from flexdpo.errors import FlexdpoError
from flexdpo.layout.sequences import is_count

# the newer name first; where it exists, transformers warns at the older one
_NAMES = ("activation_checkpointing", "gradient_checkpointing")


def checkpointing_name(owner: Any, suffix: str = "") -> str:
    """The name that a model, training arguments or their class knows, with ``suffix`` behind it.

    Raises ``AttributeError`` if ``owner`` knows neither.
    """
    names = [name + suffix for name in _NAMES]
    for name in names:
        if hasattr(owner, name):
            return name
    raise AttributeError(f"{owner!r} has none of {', '.join(names)}")


def enable_checkpointing(model: Any, *, use_reentrant: bool = False, **others: Any) -> None:
    """Let the layers of a ``PreTrainedModel`` keep no activations and run again in the backward pass.

    ``others`` are arguments of ``torch.utils.checkpoint.checkpoint``, such as ``context_fn=keep_attention``.
    """
    name = checkpointing_name(model, "_enable")
    settings = name.replace("_enable", "_kwargs")
    getattr(model, name)(**{settings: {"use_reentrant": use_reentrant, **others}})


def _require_known(given: dict[str, Any]) -> None:
    # those of transformers are told apart by version below; torch takes preserve_rng_state out of its kwargs
    names = {"offload", "every_n_layers", "preserve_rng_state", *inspect.signature(checkpoint).parameters}
    names -= {"function", "args", "kwargs"}
    if unknown := sorted(given.keys() - names):
        raise FlexdpoError(
            f"activation_checkpointing_kwargs has {unknown[0]}={given[unknown[0]]!r}, which nothing takes; take one of "
            f"{', '.join(sorted(names))}"
        )
    every = given.get("every_n_layers", 1)
    if not is_count(every):
        raise FlexdpoError(f"activation_checkpointing_kwargs has every_n_layers={every!r}; give a whole number from 1")


def checkpoint_arguments(
    given: dict[str, Any] | None, *, attention: bool, impl: str, compiled: bool, device: str
) -> dict[str, Any] | None:
    """The ``activation_checkpointing_kwargs`` of a run, where ``attention`` with the outputs of attention kept.

    Args:
        given: What the user gave.
        attention: Whether what attention came to is kept.
        impl: The run's attention kernel.
        compiled: Whether its layers are compiled.
        device: The type of its device.

    Raises:
        FlexdpoError: at what such a run cannot do.
    """
    known = given or {}
    if known:
        _require_known(known)
    for name in {"offload", "every_n_layers"} & known.keys():
        # the settings' help needs no models
        model = transformers.PreTrainedModel
        if name not in inspect.signature(getattr(model, checkpointing_name(model, "_enable"))).parameters:
            raise FlexdpoError(
                f"activation_checkpointing_kwargs has {name}={known[name]!r}, which transformers "
                f"{transformers.__version__} does not know yet; leave it out"
            )
    if known.get("offload") and device == "cpu":
        raise FlexdpoError(
            "activation_checkpointing_kwargs has offload=True, which moves activations from a GPU to the host's "
            "memory, and this run is on a CPU; leave it out"
        )
    if not attention:
        return given
    if impl != "sdpa" or compiled:
        other = f"attn_impl={impl!r}" if impl != "sdpa" else "torch_compile"
        raise FlexdpoError(
            "keep_attention=True keeps what attention in query blocks came to (attn_impl='sdpa', the default on a CPU) "
            f"in layers that are not compiled, and this run has {other}; leave one of them out"
        )
    if known.get("use_reentrant"):
        raise FlexdpoError(
            "keep_attention=True needs checkpoints that are not reentrant, and activation_checkpointing_kwargs has "
            "use_reentrant=True; leave one of them out"
        )
    return {"use_reentrant": False, **known, "context_fn": keep_attention}
