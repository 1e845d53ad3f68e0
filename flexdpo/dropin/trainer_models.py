"""The models that a trainer runs, wherever it keeps them."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from flexdpo.dropin.share import input_module_of
from flexdpo.errors import FlexdpoError
from flexdpo.hf.unwrap import unwrap_model

# averages over all places of a batch, those of padding among them; where these are left out, an index or a product with
# a mask stands in between
_AVERAGES = re.compile(r"logits(\.detach\(\)|\.float\(\))*\.mean\(\)|(kl|logprobs)\.sum\((dim=)?-?1\)\.mean\(\)")


def models_of(trainer: Any) -> tuple[nn.Module, ...]:
    """The models of a trainer without their wrappers, each backbone once, the policy first.

    They are looked for in the trainer and its callbacks, and in what hangs on either: reward functions in a list, a
    judge that holds its model.

    Raises ``FlexdpoError`` if it is no trainer.
    """
    if not isinstance(trainer, Trainer):
        raise FlexdpoError(
            f"flexdpo.trl.enable takes a transformers.Trainer such as trl.DPOTrainer, got {type(trainer).__name__}; "
            "for a loop of your own call flexdpo.share_prefixes(model)"
        )
    found: dict[int, nn.Module] = {}
    for module in (trainer.model, *_modules_of(trainer), *_modules_of(*trainer.callback_handler.callbacks)):
        for model in _outermost_models(module):
            found.setdefault(id(input_module_of(unwrap_model(model))), model)
    return tuple(found.values())


def averages_over_padding(trainer: Any) -> bool:
    """Whether a trainer's own code averages logits or log-probabilities with those at padding among them.

    Its text is asked, since no run tells: the average is detached and goes to the log. One typed at a prompt has none.
    """
    for kind in type(trainer).__mro__:
        if issubclass(kind, Trainer) and kind is not Trainer:
            with contextlib.suppress(OSError):
                if _AVERAGES.search(inspect.getsource(kind)):
                    return True
    return False


def _modules_of(*holders: Any) -> Iterator[nn.Module]:
    """The modules among the attributes of objects, in their containers, and among the attributes of those."""
    values = [value for holder in holders for value in vars(holder).values()]
    inside = [each for value in values for each in (value, *_items(value))]
    for each in inside:
        if isinstance(each, nn.Module):
            yield each
        elif not isinstance(each, type) and isinstance(getattr(each, "__dict__", None), dict):
            yield from (module for module in vars(each).values() if isinstance(module, nn.Module))


def _items(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Mapping):
        return tuple(value.values())
    return tuple(value) if isinstance(value, list | tuple | set) else ()


def _outermost_models(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, PreTrainedModel) or hasattr(module, "get_base_model"):
        return [module]
    return [model for child in module.children() for model in _outermost_models(child)]
