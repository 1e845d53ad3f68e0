"""Layers that run again in the backward pass, under the name that the installed transformers has for them."""

from __future__ import annotations

from typing import Any

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
