"""Prefix sharing for a trainer that exists already: TRL's, or any other on top of ``transformers.Trainer``.

Nothing of TRL is subclassed or copied, and this module does not import it: a trainer is what has a model and takes
callbacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from flexdpo.dropin.hooks import SharingStats
from flexdpo.dropin.share import input_module_of, is_shared, share_backbone, sharing_stats, unshare
from flexdpo.errors import FlexdpoError
from flexdpo.hf.unwrap import unwrap_model, unwrapped

if TYPE_CHECKING:
    from torch import nn

    from flexdpo.attention.row_mask import Impl

__all__ = ["SharingCallback", "disable", "enable"]


class SharingCallback(TrainerCallback):
    """Adds what sharing saves to what a trainer logs.

    With every training log, for the batches since the last one, of policy and reference together and of this process
    alone: ``sharing/tokens_in``, ``sharing/tokens_run``, ``sharing/saved`` (0 to 1) and ``sharing/passed_through`` (in
    batches); with the last log of a training run, for all of it. Progress bars and trackers show them; the log history
    that checkpoints keep is left as it is.
    """

    def __init__(self, models: tuple[nn.Module, ...]) -> None:
        self.models = models  # those that share, without their wrappers
        self._logged = self._at_begin = self.stats

    @property
    def stats(self) -> SharingStats:
        """What was saved so far on all models."""
        shared = (sharing_stats(model) for model in self.models if is_shared(model))
        return sum(shared, SharingStats())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Count from here."""
        self._logged = self._at_begin = self.stats

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: Any,  # noqa: ARG002
        control: Any,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Add the saving to ``logs``."""
        if logs is None or not ({"loss", "train_runtime"} & logs.keys()):
            return
        now = self.stats
        since = now - (self._logged if "loss" in logs else self._at_begin)
        logs["sharing/tokens_in"] = since.tokens_in
        logs["sharing/tokens_run"] = since.tokens_run
        logs["sharing/saved"] = round(since.saved, 4)
        logs["sharing/passed_through"] = sum(since.passed_through.values())
        self._logged = now


def enable(trainer: Any, *, min_gain: float = 1.1, min_prefix: int = 16, impl: Impl = "auto") -> SharingCallback:
    """Share prefixes in the policy and the reference of a trainer, in one line after it was made.

    Results, metrics and checkpoints are those without it; see :func:`flexdpo.share_prefixes` for what is shared and
    what passes through. Reference log-probabilities that the trainer computed while it was made were computed without
    sharing. LoRA adapters need no line of their own, but their dropout must be 0 (``lora_dropout=0``): with dropout in
    training nothing can be shared.

    ``trainer`` is TRL's ``DPOTrainer``, ``RewardTrainer`` or any other ``transformers.Trainer``, before its
    ``train()``; the other arguments are those of :func:`flexdpo.share_prefixes`.

    Returns:
        The callback that logs the saving; it has been added to the trainer.

    Raises:
        UnsupportedModelError: if a model would not give the ordinary result; then nothing was changed.
        FlexdpoError: if ``trainer`` is no trainer, or shares prefixes already.
    """
    models = _models_of(trainer)
    if any(is_shared(model) for model in models):
        raise FlexdpoError(
            f"this {type(trainer).__name__} has a model that shares prefixes already; call "
            "flexdpo.trl.disable(trainer) or flexdpo.unshare(model) first"
        )
    done = []
    try:
        for model in models:
            share_backbone(model, min_gain=min_gain, min_prefix=min_prefix, impl=impl)
            done.append(model)
    except Exception:
        for model in done:
            unshare(model)
        raise
    callback = SharingCallback(models)
    trainer.add_callback(callback)
    # before those that print the logs or send them away
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())
    return callback


def disable(trainer: Any) -> None:
    """Undo :func:`enable`.

    Raises:
        FlexdpoError: if ``trainer`` is no trainer, or does not share prefixes.
    """
    models = [model for model in _models_of(trainer) if is_shared(model)]
    if not models:
        raise FlexdpoError(f"this {type(trainer).__name__} shares no prefixes; call flexdpo.trl.enable(trainer) first")
    for model in models:
        unshare(model)
    trainer.remove_callback(SharingCallback)


def _models_of(trainer: Any) -> tuple[nn.Module, ...]:
    """The models a trainer runs, without wrappers, each backbone once."""
    if not isinstance(trainer, Trainer):
        raise FlexdpoError(
            f"flexdpo.trl.enable takes a transformers.Trainer such as trl.DPOTrainer, got {type(trainer).__name__}; "
            "for a loop of your own call flexdpo.share_prefixes(model)"
        )
    found: dict[int, nn.Module] = {}
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            inner = unwrapped(model)
            found.setdefault(id(input_module_of(unwrap_model(inner))), inner)
    return tuple(found.values())
