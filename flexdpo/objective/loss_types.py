"""The losses by name, their settings, and which settings go with which loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.objective import losses
from flexdpo.objective.divergences import F_DIVERGENCES, divergence_scores
from flexdpo.objective.setting_types import require_types


def setting(default: Any, text: str) -> Any:
    """A dataclass field with the text that ``--help`` shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class LossSettings:
    """Settings of the losses, of ``Objective`` and ``DPOConfig`` alike; names and defaults are TRL's where it has them.

    A loss with a setting of its own needs a line here.
    """

    beta: float = setting(0.1, "Strength of the pull towards the reference model; ORPO's lambda.")
    label_smoothing: float = setting(0.0, "Probability that a preference is labelled the wrong way round, below 0.5.")
    f_divergence_type: str = setting(
        "reverse_kl", f"What holds the policy near its reference: {', '.join(F_DIVERGENCES)}."
    )
    f_alpha_divergence_coef: float = setting(0.5, "Alpha of the alpha_divergence.")
    ld_alpha: float | None = setting(
        None, "LD-DPO: weight of a pair's tokens beyond the length of its shorter response, 0 to 1."
    )
    use_weighting: bool = setting(False, "WPO: weight pairs by how likely the policy is to produce them.")
    discopop_tau: float = setting(0.05, "Temperature of the discopop loss.")
    rpo_alpha: float | None = setting(None, "RPO: weight of the chosen response's mean negative log-likelihood.")
    simpo_gamma: float = setting(0.5, "Margin of the simpo loss.")
    cpo_alpha: float = setting(1.0, "Weight of the likelihood term of the cpo loss, a mean over the chosen tokens.")
    desirable_weight: float = setting(1.0, "Weight of desirable responses in the kto loss.")
    undesirable_weight: float = setting(1.0, "Weight of undesirable responses in the kto loss.")


# what a loss takes beside the pairs is the setting of that name
PAIR_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    name.removesuffix("_loss"): function for name, function in vars(losses).items() if name.endswith("_loss")
}
LABELLED_LOSSES = ("kto", "apo_zero_unpaired")
LOSS_TYPES = (*PAIR_LOSSES, "sft", *LABELLED_LOSSES, "plackett_luce")

REFERENCE_FREE = frozenset({"sft", "simpo", "orpo", "cpo"})
# their rewards are a mean over tokens
PER_TOKEN = frozenset({"simpo", "orpo"})
COUPLING = frozenset({"aot", "aot_unpaired", "kto"})
# divided by what a process's own batch holds: tokens, rankings
PER_BATCH = frozenset({"sft", "cpo", "plackett_luce"})
# a pair's difference cancels the constant that an f-divergence leaves in each reward; nothing else does
_TAKES_DIVERGENCE = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})
_SORTING = frozenset({"aot", "aot_unpaired"})


def pair_loss(name: str, pairs: losses.Pairs, settings: LossSettings) -> Tensor:
    """One value per pair, ``[E]``."""
    return PAIR_LOSSES[name](pairs, **{each: getattr(settings, each) for each in _settings_of(name)})


@cache
def _settings_of(name: str) -> tuple[str, ...]:
    return tuple(signature(PAIR_LOSSES[name]).parameters)[1:]


def check_losses(names: tuple[str, ...], weights: tuple[float, ...] | None, settings: LossSettings) -> None:
    """Refuse losses, weights, numbers and combinations that have no meaning, by what each may be."""
    require_types(settings, type(settings), [each.name for each in fields(settings)])
    if not names:
        raise FlexdpoError(f"loss_type is empty; choose from {', '.join(LOSS_TYPES)}")
    for name in names:
        if name not in LOSS_TYPES:
            raise FlexdpoError(f"unknown loss_type {name!r}{nearest(name, LOSS_TYPES)}; known: {', '.join(LOSS_TYPES)}")
    if weights is not None and len(weights) != len(names):
        raise FlexdpoError(
            f"loss_weights has {len(weights)} values for {len(names)} losses ({', '.join(names)}); give one weight for "
            "each"
        )
    for name, weight in zip(names, weights or (), strict=False):
        if not math.isfinite(weight):
            raise FlexdpoError(f"loss_weights gives {name} the weight {weight}; it must be a finite number")
    if weights and not any(weights) and not settings.rpo_alpha:
        raise FlexdpoError(
            f"loss_weights={list(weights)} leaves no loss ({', '.join(names)}), so nothing would be learned; give one "
            "of them a weight, or leave loss_weights out"
        )
    _check_numbers(settings)
    _check_combinations(set(names), settings)
    _check_effects(names, settings)


def _check_numbers(settings: LossSettings) -> None:
    for name, value in vars(settings).items():
        if isinstance(value, float | int) and not math.isfinite(value):
            raise FlexdpoError(f"{name} must be a finite number, got {value}")
        if name in ("beta", "discopop_tau") and not value > 0:
            raise FlexdpoError(f"{name} must be positive, got {value}")
        if name in ("rpo_alpha", "cpo_alpha", "desirable_weight", "undesirable_weight") and (value or 0) < 0:
            raise FlexdpoError(f"{name} must not be negative, got {value}")
    if not 0 <= settings.label_smoothing < 0.5:
        raise FlexdpoError(f"label_smoothing must be in [0, 0.5), got {settings.label_smoothing}")
    if settings.ld_alpha is not None and not 0 <= settings.ld_alpha <= 1:
        raise FlexdpoError(f"ld_alpha must be in [0, 1], got {settings.ld_alpha}")
    # an unknown divergence names the known ones
    divergence_scores(torch.zeros(1), settings.f_divergence_type, settings.f_alpha_divergence_coef)


def _settings_read(names: set[str], f_divergence_type: str) -> set[str]:
    """The settings that some of the losses read; any other is without effect."""
    read = {each for name in names & PAIR_LOSSES.keys() for each in _settings_of(name)}
    if names - {"sft"}:
        read.add("beta")
    if "cpo" in names:
        read.add("cpo_alpha")
    if names & set(LABELLED_LOSSES):
        read |= {"desirable_weight", "undesirable_weight"}
    if f_divergence_type == "alpha_divergence":
        read.add("f_alpha_divergence_coef")
    # what these can be combined with is said above
    return read | {"f_divergence_type", "ld_alpha", "use_weighting", "rpo_alpha"}


def _check_effects(names: tuple[str, ...], settings: LossSettings) -> None:
    """Refuse a setting that no loss reads, instead of training as if it had not been given."""
    divergence = settings.f_divergence_type
    read = _settings_read(set(names), divergence)
    for unread, default in sorted((each.name, each.default) for each in fields(LossSettings) if each.name not in read):
        value = getattr(settings, unread)
        if value != default:
            takers = [name for name in LOSS_TYPES if unread in _settings_read({name}, divergence)]
            place = f"loss_type {', '.join(takers)}" if takers else "f_divergence_type 'alpha_divergence'"
            raise FlexdpoError(
                f"{unread}={value} has no effect with loss_type {', '.join(names)}, it belongs to {place}; leave it out"
            )


def _check_combinations(names: set[str], settings: LossSettings) -> None:
    if "exo_pair" in names and settings.label_smoothing == 0:
        raise FlexdpoError(
            "loss_type 'exo_pair' takes the logarithm of label_smoothing; set it above 0, for instance 1e-3"
        )
    divergence, of_pairs = settings.f_divergence_type, {*PAIR_LOSSES, "sft"}
    one_by_one = "it uses rewards one by one, and an f-divergence fixes them only up to a constant"
    sorts = "it sorts the batch, so its values belong to no pair"
    compares = "it does not compare a response with one other under a reference"
    for asked, setting, refused, reason in (
        (divergence != F_DIVERGENCES[0], f"f_divergence_type={divergence!r}", names - _TAKES_DIVERGENCE, one_by_one),
        (settings.use_weighting, "use_weighting", names - of_pairs, "the weights are those of pairs"),
        (settings.use_weighting, "use_weighting", names & _SORTING, sorts),
        (settings.ld_alpha is not None, "ld_alpha", names - (of_pairs - REFERENCE_FREE | {"sft"}), compares),
    ):
        if asked and refused:
            raise FlexdpoError(f"{setting} cannot be combined with loss_type {', '.join(sorted(refused))}: {reason}")
