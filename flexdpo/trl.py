"""Prefix sharing for a trainer that exists already: TRL's, or any other on top of ``transformers.Trainer``.

Nothing of TRL is subclassed or copied, and this module does not import it: a trainer is what has a model and takes
callbacks.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback

from flexdpo.attention.row_mask import Impl
from flexdpo.dropin.hooks import SharingStats
from flexdpo.dropin.share import is_shared, share_backbone, sharing_stats, unshare
from flexdpo.dropin.trainer_models import averages_over_padding, models_of
from flexdpo.errors import FlexdpoError, UnsupportedModelError


class SharingCallback(TrainerCallback):
    """Adds what sharing saves to what a trainer logs, on progress bars and in trackers, not in checkpoints' history.

    With every training log, for the batches since the last one, of all models together and of this process alone:
    ``sharing/tokens_in``, ``sharing/tokens_run``, ``sharing/saved`` (0 to 1) and ``sharing/passed_through`` (in
    batches), all without generation, and ``sharing/generation`` (in calls of a model); where there are images also
    ``sharing/images_in`` and ``sharing/images_encoded``; with the last log of a training run, for all of it.
    """

    def __init__(self, models: tuple[nn.Module, ...]) -> None:
        self.models = models  # those that share, without their wrappers
        self._logged = self._at_begin = self.stats

    @property
    def stats(self) -> SharingStats:
        """What was saved so far on all models."""
        return sum((sharing_stats(model) for model in self.models if is_shared(model)), SharingStats())

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Count from here."""
        self._logged = self._at_begin = self.stats

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Add the saving to ``logs``."""
        if logs is None or not ({"loss", "train_runtime"} & logs.keys()):
            return
        now = self.stats
        since = now - (self._logged if "loss" in logs else self._at_begin)
        generation = since.passed_through["generation"]
        told = {
            "tokens_in": since.tokens_in,
            "tokens_run": since.tokens_run,
            "saved": round(since.saved, 4),
            "passed_through": sum(since.passed_through.values()) - generation,
            "generation": generation,
            **({"images_in": since.images_in, "images_encoded": since.images_encoded} if since.images_in else {}),
        }
        logs.update({f"sharing/{name}": value for name, value in told.items()})
        self._logged = now


def enable(trainer: Any, *, min_gain: float = 1.1, min_prefix: int = 16, impl: Impl = "auto") -> SharingCallback:
    """Share prefixes in the models of a trainer, in one line after it was made.

    Policy, reference, teacher, reward and value models are found wherever TRL's trainers, or others on top of
    ``transformers.Trainer``, keep them. Results, metrics and checkpoints are those without it. A model other than the
    policy shares in evaluation mode too, where a call does not ask for a cache, and one that would not give the
    ordinary result runs as before, with a warning. Reference log-probabilities that the trainer computed while it was
    made were not shared. With dropout in training nothing can be shared, so LoRA needs ``lora_dropout=0``.

    The arguments are those of :func:`flexdpo.share_prefixes`, which says what is shared and what passes through.
    Returns the callback that logs the saving, added to the trainer.

    Raises:
        UnsupportedModelError: if the policy would not give the ordinary result; then nothing was changed.
        FlexdpoError: if ``trainer`` is no trainer, or shares prefixes already.
    """
    policy, *others = models_of(trainer)
    # known by its name, for what it is made of is more than this needs
    if any(kind.__module__.startswith("flexdpo.") for kind in type(trainer).__mro__):
        raise FlexdpoError(
            f"flexdpo's own {type(trainer).__name__} shares prefixes itself, so there is nothing to enable; leave "
            "flexdpo.trl.enable out"
        )
    if any(is_shared(model) for model in (policy, *others)):
        raise FlexdpoError(
            f"this {type(trainer).__name__} has a model that shares prefixes already; call "
            "flexdpo.trl.disable(trainer) or flexdpo.unshare(model) first"
        )
    share_backbone(policy, min_gain=min_gain, min_prefix=min_prefix, impl=impl)
    shared = [policy]
    for model in others:
        try:
            share_backbone(model, min_gain=min_gain, min_prefix=min_prefix, impl=impl, scores_only=True)
            shared.append(model)
        except UnsupportedModelError as error:
            warnings.warn(f"{type(trainer).__name__} runs one of its models without sharing: {error}", stacklevel=2)
    if averages_over_padding(trainer):
        warnings.warn(
            f"{type(trainer).__name__} logs averages of logits or log-probabilities with those at padding among them, "
            "where a shared batch holds those of zeros: they differ from a run without sharing; losses and gradients "
            "do not.",
            stacklevel=2,
        )
    callback = SharingCallback(tuple(shared))
    trainer.add_callback(callback)
    # before those that print the logs or send them away
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())
    return callback


def disable(trainer: Any) -> None:
    """Undo :func:`enable`; a ``FlexdpoError`` if ``trainer`` is no trainer, or does not share prefixes."""
    models = [model for model in models_of(trainer) if is_shared(model)]
    if not models:
        raise FlexdpoError(f"this {type(trainer).__name__} shares no prefixes; call flexdpo.trl.enable(trainer) first")
    for model in models:
        unshare(model)
    trainer.remove_callback(SharingCallback)
