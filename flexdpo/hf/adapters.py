"""Refuses adapters that need more than token ids, or give a token what does not follow from those before it alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flexdpo.errors import UnsupportedModelError, first_line
from flexdpo.hf.draws import can_run, left_as_it_is
from flexdpo.hf.unwrap import unwrap_model

# by which share of the largest logit rounding alone may move the others, where experts get other numbers of tokens
_ROUNDING, _ROUNDING_HALF = 1e-3, 1e-2
# batches of the same shape: the first token of the first sequence is the same in both, and nothing else is
_BATCHES = (((11, 12, 13), (14, 15, 16)), ((11, 17, 18), (19, 20, 21)))


def refuse_adapters(model: Any) -> None:
    """Ask a model with adapters whether a packed row can be exact with them.

    Raises:
        UnsupportedModelError: naming the adapter, with the reason and the way out.
    """
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if getattr(adapter, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"the adapter {name!r} is an activated LoRA, which is switched on behind a certain token of each "
                "row of a batch, and a packed row holds many sequences; train it without flexdpo, or use LoRA"
            )
    config: Any = getattr(model, "active_peft_config", None)
    if config is None:
        return
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{config.peft_type} puts extra tokens before every sequence, which packed rows do not have; use LoRA"
        )
    # weights that are not loaded yet, or spread over processes, cannot be asked
    if not can_run(model) or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return
    try:
        share, rounding = _moved_by_others(model)
    except Exception as error:  # adapters raise what they like
        raise UnsupportedModelError(
            f"with the adapter {kind_of(config)} the model does not run on token ids alone, and a packed row has "
            f"nothing else ({type(error).__name__}: {first_line(error)}); use another kind of adapter, such as LoRA"
        ) from error
    if share > rounding:
        raise UnsupportedModelError(
            f"the adapter {kind_of(config)} computes something from all tokens of a batch at once: other tokens behind "
            f"the first one, and in another sequence of the batch, move the first one's logits by {share:.1%}. What a "
            "sequence gets then depends on its batch and its padding, and a prompt would look at its responses; use "
            "another kind of adapter, such as LoRA"
        )
    if (share := _moved_by_rounding(model)) > math.sqrt(rounding):
        raise UnsupportedModelError(
            f"rounding alone decides what the adapter {kind_of(config)} does where it stands: its weights moved by "
            f"their last bit move the logits by {share:.1%}, so packed and unpacked runs would not learn the same. "
            "Let it begin from other weights (as HRA does without apply_GS), or use another kind of adapter, such as "
            "LoRA"
        )


@torch.no_grad()
def _moved_by_rounding(model: Any) -> float:
    """How far the logits move with the last bit of every weight of the adapters, where these stand."""
    words = unwrap_model(model).get_input_embeddings().weight
    ids = torch.tensor(_BATCHES[0], device=words.device) % len(words)
    with left_as_it_is(model, training=False):
        one = _of_tokens(model, ids).double()
        with _adapters_moved(model, lambda weight: torch.finfo(weight.dtype).eps * weight):
            other = _of_tokens(model, ids).double()
    return _share(one, other)


def _share(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))


@torch.no_grad()
def _moved_by_others(model: Any) -> tuple[float, float]:
    """How far a token's logits move with tokens that must not matter to it, and how far rounding may move them."""
    words = unwrap_model(model).get_input_embeddings().weight
    found = []
    # weights such as training may reach: fresh ones mostly change nothing, whatever they compute
    with left_as_it_is(model, training=False), _adapters_moved(model, _usual_size):
        for batch in _BATCHES:
            torch.manual_seed(0)
            ids = torch.tensor(batch, device=words.device) % len(words)
            found.append(_of_tokens(model, ids)[0, 0])
    one, other = (logits.double() for logits in found)
    rounding = _ROUNDING_HALF if found[0].element_size() < 4 else _ROUNDING
    return _share(one, other), rounding


def _usual_size(weight: torch.Tensor) -> float:
    return weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1


def _of_tokens(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every token, or their last states where a model gives one answer for a whole sequence."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    if logits.ndim < 3:
        logits = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return logits


@contextlib.contextmanager
def _adapters_moved(model: nn.Module, by: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Move every weight of the adapters at random, each by about as much as ``by`` says."""
    weights = [weight for weight in adapter_weights(model) if weight.is_floating_point()]
    kept = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        for weight in weights:
            weight.add_(torch.randn(weight.shape, generator=generator, device="cpu").to(weight) * by(weight))
        yield
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)


def adapter_weights(model: nn.Module) -> dict[nn.Parameter, None]:
    """What the layers of peft's adapters keep as weights beside those of the layers that they adapt, in order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[nn.Parameter, None] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base = set(layer.get_base_layer().parameters())
            own = [*layer.parameters(recurse=False), *(p for child in layer.children() for p in child.parameters())]
            found |= dict.fromkeys(weight for weight in own if weight not in base)
    return found


def kind_of(peft_config: Any) -> str:
    """The name of an adapter's kind, ``"LORA"``."""
    return str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
