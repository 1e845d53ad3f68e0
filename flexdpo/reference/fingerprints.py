"""What a model computes, in a few letters: weights, buffers, configs and whatever else its modules keep."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

# where a model came from and how it is run; everything else that a config or a module says may change its results
_WITHOUT_EFFECT = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "return_dict", "output_hidden_states", "output_attentions", "training", "gradient_checkpointing",
    "pad_token_id", "bos_token_id", "eos_token_id", "inference_mode", "base_model_name_or_path", "revision",
})  # fmt: skip
# values of a weight that stand for all, evenly spaced
_SAMPLED = 64
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_BOOKKEEPING = (
    "_attn_implementation", "_experts_implementation", "_flexdpo", "_is_hf", "_hf_", "_is_full_backward",
    "_forward_", "_backward_", "_state_dict_", "_load_state_dict_",
)  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """Return a fingerprint of what decides a model's results, computed where its weights are.

    Adapters that are switched off have no part in it. Take it before weights are sharded over processes.

    Returns:
        32 hexadecimal digits; every bit of every weight and buffer counts, and so do names, shapes and dtypes, every
        entry of the configs, and every plain value that a module keeps: an epsilon, an adapter's scale, what is active.
    """
    digest = hashlib.blake2b(settings_fingerprint(model).encode(), digest_size=16)
    for name, tensor in _tensors(model):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {_checksum(tensor):x}\n".encode())
    return digest.hexdigest()


def settings_fingerprint(model: nn.Module) -> str:
    """Return a fingerprint of all that decides a model's results beside its weights and buffers, in 32 digits."""
    digest = hashlib.blake2b(digest_size=16)
    switched_off = _switched_off(model)
    configs: dict[int, Any] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        is_whole_model = hasattr(config, "to_dict")
        if is_whole_model:
            configs.setdefault(id(config), config)
        if module not in switched_off:
            kept = {key: value for key, value in vars(module).items() if _is_plain(value) or _is_activation(key, value)}
            if is_whole_model:
                # transformers notes there how a model was loaded
                kept = {key: value for key, value in kept.items() if not key.startswith("_")}
            digest.update(f"{name} {type(module).__qualname__} {_as_json(kept)}\n".encode())
    for config in configs.values():
        digest.update(_as_json(config.to_dict()).encode())
    for name, config in sorted(getattr(model, "peft_config", {}).items()):
        if name in model.active_adapters and not getattr(model, "_adapters_disabled", False):  # type: ignore[operator]
            digest.update(_as_json({name: config.to_dict()}).encode())
    return digest.hexdigest()


def weights_sample(model: nn.Module, *, trainable: bool) -> str:
    """Return a fingerprint of a few values of every weight: cheap, and another checkpoint has another.

    The weights must be neither sharded nor still to be loaded. Those that are trained are looked at only with
    ``trainable``.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        if trainable or not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            few = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous().view(torch.uint8)
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode() + bytes(few.tolist()))
    return digest.hexdigest()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights, buffers and whatever tensors and arrays modules keep beside them, by name."""
    switched_off = _switched_off(model)
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if module not in switched_off:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            own += [(name, torch.as_tensor(value)) for name, value in vars(module).items() if _is_numbers(value)]
            found.update({f"{prefix}.{name}": tensor for name, tensor in own})
    return sorted(found.items())


def _switched_off(model: nn.Module) -> set[nn.Module]:
    """The modules of adapters that are switched off, without the layers below them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if getattr(module, "disable_adapters", False) is True:
            wrapper: Any = module
            base = wrapper.get_base_layer() if hasattr(wrapper, "get_base_layer") else wrapper.original_module
            found |= set(module.modules()) - set(base.modules())
    return found


def _is_numbers(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub" and not isinstance(value, float)
    )


def _is_activation(name: str, value: object) -> bool:
    """Whether it is a function that a module applies, and not how it is called itself: checkpointing, autocast."""
    return isinstance(value, _FUNCTIONS) and name != "forward" and not name.startswith("_")


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(each) for each in (*value, *value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str, Enum, torch.dtype))


def _as_json(about: dict[str, Any]) -> str:
    return json.dumps(dict(_counted(about)), sort_keys=True, default=_ordered)


def _counted(about: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What has an effect, at every depth."""
    for name, value in about.items():
        if name not in _WITHOUT_EFFECT and not str(name).startswith(_BOOKKEEPING):
            yield str(name), dict(_counted(value)) if isinstance(value, dict) else value


def _ordered(value: object) -> Any:
    if isinstance(value, _FUNCTIONS):
        return f"{value.__module__}.{value.__qualname__}"
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _checksum(tensor: Tensor, chunk: int = 2**22) -> int:
    """Sum of all 8-byte words, each times an odd number that depends on its place, modulo 2^64."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    total = int.from_bytes(bytes(flat[whole:].tolist()), "little")
    words = flat[:whole].view(torch.int64)
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk]
        places = torch.arange(start, start + part.numel(), device=part.device)
        # a multiplicative hash of the place; int64 overflow wraps around
        total += int((part * ((places * 0x9E3779B97F4A7C1 + 0x7F4A7C15) | 1)).sum())
    return total % 2**64
