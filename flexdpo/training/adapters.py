"""Adapters: wrapping a model in one, and going back for a moment to the policy as it was before its first step.

An adapter's kind does not matter here. What training can move is what peft and the user left trainable, wherever it is
kept; a copy of that, put in its place for the length of a forward pass, is the policy at step 0, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from flexdpo.errors import FlexdpoError, first_line, found, quoted
from flexdpo.hf.adapters import adapter_weights, kind_of
from flexdpo.hf.draws import can_run, left_as_it_is
from flexdpo.training import distribution

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.get_logger(__name__)

# brings a policy back to its first weights for a ``with`` block
AtStart = Callable[[], AbstractContextManager[None]]


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is a ``peft.PeftModel``, without importing peft for models that are not."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """Wrap a model in a fresh adapter."""
    try:
        import peft
    except ImportError as error:
        raise FlexdpoError("peft_config needs the peft package; pip install 'flexdpo[peft]'") from error
    if is_peft_model(model):
        raise FlexdpoError(
            "the model is a PeftModel already and peft_config asks for another adapter; merge the first one "
            "(model.merge_and_unload()) or leave peft_config out"
        )
    if not isinstance(peft_config, peft.PeftConfig):
        raise FlexdpoError(
            f"peft_config must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}"
        )
    if peft_config.is_prompt_learning:
        raise FlexdpoError(
            f"{peft_config.peft_type} puts extra tokens before every prompt, which packed rows do not have; use LoRA"
        )
    # peft adds its own names, and takes any list of which it finds one
    asked: dict[str, list[str]] = {}
    for setting in ("modules_to_save", "target_parameters"):
        if isinstance(names := getattr(peft_config, setting, None) or (), str):
            # it would look for layers that are called like its letters
            raise FlexdpoError(f"peft_config has {setting}={names!r}, where peft takes a list; give [{names!r}]")
        asked[setting] = sorted(names)
    targets = getattr(peft_config, "target_modules", None)
    # a text is a pattern, or one of peft's words
    targets = [] if isinstance(targets, str) else _names(targets)
    try:
        wrapped: Any = peft.get_peft_model(model, peft_config)
    except Exception as error:  # each kind has conditions of its own, and errors for them
        raise FlexdpoError(
            f"peft cannot put the adapter {kind_of(peft_config)} into {type(model).__name__} "
            f"({type(error).__name__}: {first_line(error)}); change its config, or what it asks of the model"
        ) from error
    adapted = {
        "modules_to_save": [
            name
            for name, module in wrapped.named_modules(remove_duplicate=False)
            if isinstance(module, peft.utils.ModulesToSaveWrapper)
        ],
        "target_parameters": getattr(wrapped.base_model, "targeted_parameter_names", []),
    }
    for setting, names in asked.items():
        lost = [name for name in names if not any(each.endswith(name) for each in adapted[setting])]
        if lost:
            raise FlexdpoError(
                f"peft_config asks for {setting}={names}, and {type(model).__name__} has no {quoted(lost)} to "
                "train; name what it has (model.named_parameters()), or leave it out"
            )
    _warn_of_lost_targets(targets, wrapped)
    return wrapped  # type: ignore[no-any-return]


def _warn_of_lost_targets(asked: list[str], wrapped: Any) -> None:
    """Name the modules that got no adapter; not an error, since one list may be meant for several kinds of model."""
    # peft may have put names of its own in their place, as where experts are one parameter
    kept = _names(wrapped.peft_config[wrapped.active_adapters[0]].target_modules) if asked else []
    adapted = [f".{name}" for name in getattr(wrapped.base_model, "targeted_module_names", ())]
    lost = [name for name in asked if name in kept and not any(each.endswith(f".{name}") for each in adapted)]
    if adapted and lost:
        logger.warning(
            f"target_modules={asked}: {type(wrapped.get_base_model()).__name__} has no {quoted(lost)}, so only the "
            "others get an adapter; name what it has (model.named_modules())"
        )


def _names(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else sorted(given or ())


def require_trainable(model: nn.Module) -> None:
    """Refuse a policy that nothing could train: its loss would stand at ln 2 for ever."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        if is_peft_model(model):
            _require_scale(model)
        return
    if is_peft_model(model):
        raise FlexdpoError(
            "no weight of this PeftModel is trainable, so nothing would be learned; load the adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or choose one with model.set_adapter(name)"
        )
    raise FlexdpoError(
        "no weight of the model is trainable, so nothing would be learned; call requires_grad_(True) on what is to be "
        "trained, or give peft_config to train an adapter"
    )


def require_moving(optimizer: Any, model: nn.Module, *, sharded: bool) -> None:
    """Refuse what is no optimizer, and one that would never move the model."""
    if not hasattr(optimizer, "param_groups"):
        raise FlexdpoError(
            f"optimizer must be a torch.optim.Optimizer, got {found(optimizer)}; make one of model.parameters()"
        )
    moved = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    # engines that shard keep pieces of their own, which they write back
    if not sharded and not any(id(weight) in moved for weight in model.parameters() if weight.requires_grad):
        raise FlexdpoError(
            f"the optimizer has {len(moved)} weights and none of them is a trainable one of this "
            f"{type(model).__name__}, so nothing would be learned; make it of model.parameters(), after the model was "
            "moved, wrapped or sharded"
        )


def _require_scale(model: Any) -> None:
    """Refuse adapters that are multiplied by 0, whose gradients are 0 with them, where nothing else is trained."""
    layers = _scales(model)
    scales = [scaling.get(name) for scaling in layers.values() for name in model.active_adapters]
    scales = [scale for scale in scales if scale is not None]
    if not scales or any(scales):
        return
    scaled = {weight for name in layers for weight in adapter_weights(model.get_submodule(name))}
    if scaled.issuperset(weight for weight in model.parameters() if weight.requires_grad):
        raise FlexdpoError(
            f"the adapter {', '.join(model.active_adapters)} is scaled by 0 in every layer, so nothing would be "
            "learned; give its config a lora_alpha above 0, such as twice its r"
        )


def at_start_of(model: nn.Module, *, fresh: bool) -> AtStart:
    """Return what brings a model with an adapter back to where it stands now, whatever is trained in between.

    Args:
        model: A ``PeftModel``, before it is wrapped or sharded.
        fresh: Whether the adapter was made for this run. If so and if it changes nothing yet, as most do, it is
            switched off instead of copied, which takes no memory.
    """
    if fresh and _may_be_switched_off(model):
        return partial(_switched_off, model)
    return StartingWeights(model)


# --- the adapter switched off ----------------------------------------------------------------------------------------


@torch.no_grad()
def _may_be_switched_off(model: Any) -> bool:
    """Whether the model without its adapter gives the same logits, bit for bit, and none that training could move."""
    if not can_run(model):
        # the first examples of the run are asked instead
        return True
    input_ids = torch.arange(2, device=next(model.parameters()).device)[None]
    with left_as_it_is(model, training=False):
        switched_on = model(input_ids=input_ids, use_cache=False).logits
        with _switched_off(model), torch.enable_grad():
            switched_off = model(input_ids=input_ids, use_cache=False).logits
    return torch.equal(switched_on, switched_off) and not switched_off.requires_grad


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    # peft makes all weights of the active adapter trainable when it switches them on again
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, required in trainable:
            parameter.requires_grad_(required)


# --- the adapter as it was -------------------------------------------------------------------------------------------


class StartingWeights:
    """A copy of all weights that training may move, put in their place for the length of a ``with`` block.

    These are the trainable ones, be they an adapter's or not, and whatever else the adapter's layers keep as a weight
    (AdaLoRA's ranks). The copies stand in no module: nothing finds them to save, shard or train them.

    Args:
        model: A ``PeftModel`` with its adapters as they are to be remembered.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        kept = adapter_weights(model)
        self.values = {
            _plain(name): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad or parameter in kept
        }
        self.adapters = _adapters(model)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the block on the first weights; the trained ones are back afterwards, whatever happened."""
        now = _adapters(self.model)
        if now != self.adapters:
            then = self.adapters
            place = next(name for name in {**then, **now} if then.get(name) != now.get(name))
            raise FlexdpoError(
                f"the policy no longer runs the adapters that it began with ({place}: {then.get(place)} then, "
                f"{now.get(place)} now), so the reference cannot be what it began with; leave adapters and their "
                "scales alone during a run, or give ref_model"
            )
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # a forward pass leaves FSDP2's outermost weights whole, and they are its shards that stay
        distribution.reshard(self.model)
        parameters = {_plain(name): parameter for name, parameter in self.model.named_parameters()}
        with distribution.gathered([parameters[name] for name in self.values], modifier_rank=0):
            for name, value in self.values.items():
                own = parameters[name].detach()
                first = _like(value, own)
                self.values[name] = own.clone()
                # in place: compiled layers, shards and optimizers hold on to where a weight lies
                distribution.local(own).copy_(distribution.local(first))
        # what autocast has made of the weights before is not to be used again
        torch.clear_autocast_cache()


def _plain(name: str) -> str:
    """A weight's name as it was before its layer was wrapped for checkpointing or compiled."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _adapters(model: Any) -> dict[str, Any]:
    """Which adapters run, and the scales that they run with in each module."""
    return {"active adapters": tuple(model.active_adapters), **_scales(model)}


def _scales(model: Any) -> dict[str, dict[str, Any]]:
    """By module, what each adapter there is multiplied by."""
    return {
        name: dict(scaling)
        for name, module in model.named_modules()
        if isinstance(scaling := getattr(module, "scaling", None), dict)
    }


def _like(value: Tensor, own: Tensor) -> Tensor:
    """``value`` where ``own`` is, in its dtype and spread like it."""
    if value.is_meta:
        # a process that waits for the first one's weights
        value = torch.empty_like(value, device=own.device)
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(own.device, own.dtype), own.device_mesh, own.placements)
    return value.to(own.device, own.dtype)
