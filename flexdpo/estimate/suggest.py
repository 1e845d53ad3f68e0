"""From figures to the settings to train with."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from itertools import chain

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.estimate.features import Feature, Layouts, first_rows
from flexdpo.estimate.lengths import RowTokens
from flexdpo.estimate.settings import EstimateSettings
from flexdpo.layout.packing import MAX_WASTE, Buckets, choose_buckets
from flexdpo.layout.row import TILE
from flexdpo.training.memory import TrainingSetup, auto_row_budget, free_memory
from flexdpo.training.model_size import ModelSize

# a feature that has to be switched on must gain this much to be recommended
_WORTH_A_SWITCH = 1.03
# rows longer than this keep any device busy; memory is better left to the allocator
_LONG_ENOUGH = 32768


@dataclass(frozen=True)
class Suggestion:
    """Settings of ``DPOConfig`` to train with; the pairs of an optimizer step stay those that were asked for."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_tokens_per_row: int | None  # ``None`` where a batch fits into one row, or nothing fits
    activation_checkpointing: bool
    keep_attention: bool  # through it
    precompute_ref_log_probs: bool  # so that the reference's weights need not stay
    regroup_prompts: bool
    sharing: str
    buckets: Buckets | None  # row lengths to compile kernels for, where one kernel for all lengths is worse
    fits: bool  # whether the model can be trained in the device's memory with these settings
    free: int  # the memory this was judged by, in bytes

    def options(self) -> str:
        """The settings as options of ``flexdpo train``."""
        words = [f"--per_device_train_batch_size {self.per_device_train_batch_size}"]
        if self.max_tokens_per_row is not None:
            words.append(f"--max_tokens_per_row {self.max_tokens_per_row}")
        for name in ("activation_checkpointing", "keep_attention", "precompute_ref_log_probs", "regroup_prompts"):
            if getattr(self, name):
                words.append(f"--{name} true")
        return " ".join([*words, f"--sharing {self.sharing}"] if self.sharing != "group" else words)


def suggest(
    size: ModelSize, settings: EstimateSettings, layouts: Layouts, counted: RowTokens, features: dict[str, Feature]
) -> Suggestion:
    """Choose settings by the predicted gains and the memory that is there."""
    free = settings.memory
    if free is None:
        # where no GPU is there, the costs that are assumed are those of an H100
        is_here = settings.device == "cpu" or torch.cuda.is_available()
        free = free_memory(settings.device) if is_here else 80 * 10**9
    longest = int(counted.distinct.max())
    setup, budget = _first_that_fits(size, settings, longest, int(counted.longest.max()), free)
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    bound: int | None = None
    if budget is not None:
        most = min(budget, max(_LONG_ENOUGH, -(-longest // TILE) * TILE))
        bound = most if layouts.longest_shared.tokens * settings.gradient_accumulation_steps > most else None
    buckets: Buckets | None = None
    if settings.device == "cuda":
        buckets = choose_buckets(list(chain(*first_rows(counted.distinct[layouts.order], batch, bound))))
    regrouping, across = features["regrouping"], features["across"]
    return Suggestion(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        max_tokens_per_row=bound,
        activation_checkpointing=setup.gradient_checkpointing,
        keep_attention=setup.keeps_attention,
        precompute_ref_log_probs=settings.training_setup.reference and not setup.reference,
        regroup_prompts=regrouping.speedup >= _WORTH_A_SWITCH and regrouping.seconds <= across.seconds,
        sharing="step" if across.speedup >= _WORTH_A_SWITCH else "group",
        buckets=buckets if buckets is not None and buckets.waste <= MAX_WASTE else None,
        fits=budget is not None,
        free=free,
    )


def _first_that_fits(
    size: ModelSize, settings: EstimateSettings, longest: int, longest_sequence: int, free: int
) -> tuple[TrainingSetup, int | None]:
    """What has to be given up, in the order of what it costs, so that the longest example fits; and its row budget."""
    asked = settings.training_setup
    full = replace(asked, gradient_checkpointing=True, keeps_attention=False)
    # attention in query blocks, on a CPU, can be kept
    reruns = [replace(full, keeps_attention=True), full] if settings.device == "cpu" else [full]
    with_reference = [asked, *(setup for setup in reruns if setup != asked)]
    # in pieces last of all: what is run is then more than this command counts
    for pieces in (None, longest_sequence) if not size.state_layers else (None,):
        for setup in (*with_reference, *(replace(setup, reference=False) for setup in with_reference)):
            with contextlib.suppress(FlexdpoError):
                return setup, auto_row_budget(
                    size,
                    setup,
                    device=settings.device,
                    free=free,
                    multiple=settings.row_multiple,
                    longest=longest,
                    longest_sequence=pieces,
                )
    return asked, None
