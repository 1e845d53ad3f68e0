"""What runs around the forward of a backbone that shares prefixes."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexdpo.attention.row_mask import Impl, resolve_impl
from flexdpo.attention.settings import KernelSettings, exchange_kernel_settings, kernel_settings
from flexdpo.dropin.gather import SharedBatch
from flexdpo.dropin.images import BatchImages, ImageKnowledge, find_images, image_count, without_image_inputs
from flexdpo.dropin.plan import PlanKey, plan_batch
from flexdpo.dropin.rules import OF_THE_LOSS, REASONS, Positions, may_hold_sequences, reason_by_arguments
from flexdpo.hf.draws import being_asked
from flexdpo.hf.forward_layout import packed_forward
from flexdpo.hf.images import image_part
from flexdpo.hf.randomness import DrawsWatch
from flexdpo.layout.row import TILE, RowLayout


@dataclass
class SharingStats:
    """What sharing has done so far on one model, since :func:`share_prefixes`.

    What a checkpoint runs a second time in the backward pass counts once. Tokens are those of batches whose result a
    loss or a score is made of; generation is counted in calls alone.
    """

    tokens_in: int = 0  # places of all padded batches that the backbone was given, padding included
    tokens_run: int = 0  # tokens that it ran instead; for a batch that passed through, all its places
    batches_shared: int = 0  # batches that ran as one packed row
    images_in: int = 0  # images of all batches
    images_encoded: int = 0  # images that the model encoded instead; of a batch that passed through, all
    # batches that ran as if flexdpo were not there, by reason, one of :data:`flexdpo.dropin.rules.REASONS`
    passed_through: Counter[str] = field(default_factory=Counter)

    @property
    def saved(self) -> float:
        """Share of all places that did not have to be run, from 0 to 1."""
        return 1 - self.tokens_run / self.tokens_in if self.tokens_in else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.tokens_run:,} of {self.tokens_in:,} tokens run ({self.saved:.0%} saved), "
            f"{self.batches_shared:,} batches shared"
        ]
        if self.images_in:
            lines += [f"{self.images_encoded:,} of {self.images_in:,} images encoded"]
        lines += [f"{count:,} passed through: {REASONS[reason]}" for reason, count in self.passed_through.most_common()]
        return "\n".join(lines)

    def __add__(self, other: SharingStats) -> SharingStats:
        # not by astuple, which would take a Counter for pairs to be counted
        theirs = vars(other)
        return SharingStats(**{name: mine + theirs[name] for name, mine in vars(self).items()})

    def __sub__(self, earlier: SharingStats) -> SharingStats:
        before = vars(earlier)
        return SharingStats(**{name: mine - before[name] for name, mine in vars(self).items()})


@dataclass(eq=False)
class Sharing:
    """What a shared backbone carries along."""

    stock: str  # its attention implementation before
    impl_before: Impl | None  # its kernel before, where it was prepared for packed rows already
    impl: Impl  # the kernel that was asked for
    min_gain: float  # padded places per token run, below which a batch passes through
    min_prefix: int  # tokens in common from which rows share them
    positions: Positions  # how it makes use of positions
    parameters: tuple[str, ...]  # names of its positional arguments
    scores_only: bool = False  # whether nobody wants a cache of it that was not asked for
    hooks: tuple[RemovableHandle, ...] = ()  # to take off again
    stats: SharingStats = field(default_factory=SharingStats)  # what was done so far
    warned: bool = False  # whether it was said why batches are not shared
    in_a_row: int = 0  # batches that passed through since one was shared last
    watch: DrawsWatch = field(default_factory=DrawsWatch)  # knows whether the backbone draws random numbers
    images: ImageKnowledge = field(default_factory=ImageKnowledge)  # what was asked about its images

    def stats_so_far(self) -> SharingStats:
        """A copy of what was done, which threads that go on do not change."""
        with _counting:
            return copy.deepcopy(self.stats)


# so many batches that pass through one after the other are no accident
_TOLD_AFTER = 5
# what a model counts, it counts for all threads that run it
_counting = threading.Lock()


def install_sharing_hooks(backbone: Any, sharing: Sharing) -> None:
    """Let a backbone that takes layouts make them itself, from padded batches."""
    backbone._flexdpo_sharing = sharing
    sharing.hooks = (
        # before the hook that takes a row's layout
        backbone.register_forward_pre_hook(_share_batch, with_kwargs=True, prepend=True),
        backbone.register_forward_hook(_place_output, with_kwargs=True, always_call=True),
    )


def remove_sharing_hooks(backbone: Any) -> None:
    """Undo :func:`install_sharing_hooks`."""
    for handle in backbone._flexdpo_sharing.hooks:
        handle.remove()
    del backbone._flexdpo_sharing


def sharing_of(backbone: nn.Module) -> Sharing | None:
    """What a backbone carries along if it shares prefixes."""
    found = getattr(backbone, "_flexdpo_sharing", None)
    return found if isinstance(found, Sharing) else None


class _Running(NamedTuple):
    """A shared batch in progress."""

    backbone: nn.Module  # what runs it
    batch: SharedBatch  # the batch
    settings: KernelSettings  # kernel settings to put back in force after it


class _InThread(threading.local):
    """What each thread has of its own: one model may run in several of them, and several models at once."""

    def __init__(self) -> None:
        self.running: list[_Running] = []  # shared batches in progress, innermost last
        # the last batch that was planned, if any. Policy and reference run the same batch one after the other, and then
        # share its plan and its masks
        self.recent: list[_Recent] = []


_in_thread = _InThread()


# what follows from the data cannot be in a graph; a compiled model pauses here
@torch.compiler.disable
def _share_batch(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    sharing: Sharing = backbone._flexdpo_sharing
    if being_asked():
        return None
    # Ctrl-C skips the hook that takes a batch off again
    _finish(backbone)
    named = {**dict(zip(sharing.parameters, args, strict=False)), **kwargs}
    if packed_forward() is not None or any(isinstance(value, RowLayout) for value in named.values()):
        return None  # the caller packed a row already
    # every process of a sharded model comes here equally often, whatever its batch is
    random = sharing.watch.draws(backbone)
    may_hold = may_hold_sequences(backbone, named, sharing.stock)
    sharing.positions = sharing.positions.asked(backbone, of_sequences=may_hold)
    packed = may_hold and sharing.positions.sequences != "mixed"
    plain = named if image_part(backbone) is None else without_image_inputs(backbone, named)
    planned: SharedBatch | str | None = reason_by_arguments(
        backbone, plain, packed=packed, scores_only=sharing.scores_only
    )
    planned = planned or ("random" if random else None) or _planned(backbone, named, plain, packed)
    _count(sharing, named, planned)
    if isinstance(planned, str):
        _tell(backbone, planned)
        return None
    settings = exchange_kernel_settings(_for_any_length(sharing, planned))
    _in_thread.running.append(_Running(backbone, planned, settings))
    # where they are left out, positions come with the layout
    plain = {name: value for name, value in plain.items() if name not in OF_THE_LOSS | {"position_ids"}}
    if planned.position_ids is not None:
        plain["position_ids"] = planned.position_ids
    if planned.images is not None:
        plain = {**plain, **planned.images.inputs, **planned.images.omitted}
    return (), {**plain, "input_ids": planned.input_ids, "attention_mask": planned.layout, "use_cache": False}


@torch.compiler.disable
def _place_output(backbone: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG001
    if being_asked():
        return None
    batch = _finish(backbone)
    # output is None when the forward raised
    return None if batch is None or output is None else batch.at_padded_places(output)


def _finish(backbone: nn.Module) -> SharedBatch | None:
    """Take the batch that a backbone is running off, with whatever was interrupted inside of it."""
    running = _in_thread.running
    for number, found in enumerate(running):
        if found.backbone is backbone:
            exchange_kernel_settings(found.settings)
            del running[number:]
            return found.batch
    return None


def _tell(backbone: Any, reason: str) -> None:
    """Say once why a model's batches run without sharing: dropout at the first, all else when nothing else comes."""
    sharing: Sharing = backbone._flexdpo_sharing
    if sharing.warned:
        return
    name = type(backbone).__name__
    if reason == "random":
        text = (
            f"{name} uses dropout or noise in training, so its batches run without sharing: a shared token cannot be "
            "dropped differently for each row. flexdpo.disable_dropout(model) sets every rate to 0 (lora_dropout too), "
            "and they are shared."
        )
    elif sharing.in_a_row >= _TOLD_AFTER and reason != "generation":
        text = (
            f"{sharing.in_a_row} batches in a row ran through {name} without sharing, the last of them because "
            f"{REASONS[reason]}. Results are right, and nothing is saved; flexdpo.sharing_stats(model) counts every "
            "reason."
        )
    else:
        return
    sharing.warned = True
    warnings.warn(text, stacklevel=3)


def _count(sharing: Sharing, named: dict[str, Any], planned: SharedBatch | str) -> None:
    if torch._C._current_graph_task_id() != -1:
        return  # a checkpoint runs the batch again in the backward pass
    tokens = next((each for each in (named.get("input_ids"), named.get("inputs_embeds")) if each is not None), None)
    places = tokens.shape[:2].numel() if isinstance(tokens, torch.Tensor) else 0
    stats = sharing.stats
    images = image_count(named)
    with _counting:
        if planned == "generation":
            stats.passed_through[planned] += 1
            return
        stats.tokens_in += places
        if isinstance(planned, str):
            stats.tokens_run += places
            stats.images_in += images
            stats.images_encoded += images
            stats.passed_through[planned] += 1
            sharing.in_a_row += 1
        else:
            stats.tokens_run += planned.layout.length
            if planned.images is not None:
                stats.images_in += len(planned.images.members)
                stats.images_encoded += len(planned.images.counts)
            stats.batches_shared += 1
            sharing.in_a_row = 0


def _for_any_length(sharing: Sharing, batch: SharedBatch) -> KernelSettings:
    """By default FlexAttention compiles a kernel for each row length on CUDA; here every batch has another length."""
    settings = kernel_settings()
    if settings.lengths != "auto" or resolve_impl(sharing.impl, batch.input_ids.device) != "flex":
        return settings
    return replace(settings, lengths="dynamic")


class _Batch(NamedTuple):
    """What a caller gave."""

    input_ids: Tensor
    mask: Tensor | None
    position_ids: Tensor | None


class _Recent(NamedTuple):
    """A batch that was planned, and what came out."""

    batch: _Batch
    plan_key: PlanKey
    planned: SharedBatch | str
    # masks and plan go when the batch goes
    alive: weakref.ref[Tensor]

    def holds(self, batch: _Batch, plan_key: PlanKey) -> bool:
        """Whether a batch is this one, by its content: a loader may fill the same memory again."""
        return self.plan_key == plan_key and all(map(_same, self.batch, batch))


def _same(kept: Tensor | None, given: Tensor | None) -> bool:
    if kept is None or given is None:
        return kept is given
    return kept.device == given.device and kept.dtype == given.dtype and torch.equal(kept, given)


def _planned(backbone: Any, named: dict[str, Any], plain: dict[str, Any], packed: bool) -> SharedBatch | str:
    """The packed row for a batch, or the reason why it is not shared; ``plain`` arguments are not about images."""
    sharing: Sharing = backbone._flexdpo_sharing
    images = None if plain is named else find_images(backbone, named, sharing.images)
    if isinstance(images, str):
        return images
    batch = _Batch(named["input_ids"], named.get("attention_mask"), named.get("position_ids"))
    multiple = TILE if resolve_impl(sharing.impl, batch.input_ids.device) == "flex" else 1
    plan_key = PlanKey(
        sharing.min_gain, sharing.min_prefix, sharing.positions, multiple, packed, "flash" in sharing.stock
    )
    if images is not None:
        return _with_images(batch, plan_key, images)
    if torch.is_inference_mode_enabled():
        return plan_batch(*batch, plan_key)  # nothing that is made here may be used in training
    kept = _in_thread.recent
    for recent in kept:
        if recent.holds(batch, plan_key):
            return recent.planned
    planned = plan_batch(*batch, plan_key)
    copies = _Batch(batch.input_ids.clone(), *(None if each is None else each.clone() for each in batch[1:]))
    kept[:] = [_Recent(copies, plan_key, planned, weakref.ref(batch.input_ids, lambda _: kept.clear()))]
    return planned


def _with_images(batch: _Batch, plan_key: PlanKey, images: BatchImages) -> SharedBatch | str:
    # positions in several dimensions are the model's own, and know where padding stands
    if images.position_ids is not None:
        plan_key = plan_key._replace(positions=replace(plan_key.positions, relative=True))
    return plan_batch(*batch, plan_key, images)
