"""Opens what a model is wrapped in: DDP, FSDP and DeepSpeed, ``torch.compile``, PEFT, and the language-model head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

from flexdpo.errors import FlexdpoError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPLICAS = (
    "nn.DataParallel runs replicas in threads that would share one layout; start one process per GPU with torchrun or "
    "accelerate launch"
)


def unwrapped(model: nn.Module) -> Any:
    """Return the model inside DDP, FSDP, DeepSpeed or a compiled module, with its adapters."""
    if isinstance(model, transformers.PreTrainedModel) or hasattr(model, "get_base_model"):
        return model
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return model if inner is None else unwrapped(inner)


def base_model(model: nn.Module) -> Any:
    """Return the Hugging Face model inside all wrappers, PEFT's included."""
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """Return the ``PreTrainedModel`` that is a bare model or inside a PEFT model, and refuse anything else."""
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(REPLICAS)
    inner = base_model(model) if unwrapped(model) is model else model
    if not isinstance(inner, transformers.PreTrainedModel):
        raise FlexdpoError(
            f"expected a transformers PreTrainedModel or a PeftModel around one, got {type(inner).__name__}; "
            "prepare the model before it is wrapped or compiled"
        )
    return inner


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the decoder below the language-model head, which is what decides whether a model can be exact."""
    decoder = model.get_decoder()
    # some classes call their vocabulary projection "decoder"
    return decoder if isinstance(decoder, transformers.PreTrainedModel) else model.base_model
