"""What a benchmark measures; the fields are the options of ``flexdpo bench``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from flexdpo.bench.profiles import find_profiles, load_profiles
from flexdpo.errors import FlexdpoError, nearest
from flexdpo.estimate.model_shapes import NAMES, require_shape
from flexdpo.layout.row import tile_multiple
from flexdpo.objective.loss_types import setting

# on a GPU TRL computes logits at labels only, so that is the padded baseline there to look at
BASELINES = ("padded", "padded_labels", "packed", "varlen", "trl")
DEFAULT_BASELINES = {"cpu": ("padded", "packed"), "cuda": ("padded", "padded_labels", "packed", "varlen")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, and how long."""

    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one.")
    profile: str = setting("all", f"Lengths of which dataset: {', '.join(load_profiles())}, or all.")
    scale: float = setting(1.0, "Factor on every length.")
    model: str = setting("tiny", f"Shape with random weights: {', '.join(NAMES)}.")
    baselines: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "option": "baseline",
            "help": f"What to compare with, of {', '.join(BASELINES)}: padded sequences with stock attention and full "
            "logits; the same with logits at labels only, as TRL has them on GPUs; packed rows whose prompts are not "
            "shared (FlashAttention's varlen_attn on CUDA); shared rows through varlen_attn (CUDA); TRL's trainer. By "
            "default padded and packed, and on CUDA all but TRL.",
        },
    )
    pairs: int | None = setting(None, "Pairs per step; by default 16 on a CPU, 8 on CUDA.")
    batches: int | None = setting(None, "Different batches of that many pairs; by default 2 on a CPU, 1 on CUDA.")
    rounds: int = setting(24, "Most measurements of each batch.")
    seconds: float = setting(40.0, "Per profile: no round but four begins later.")
    dtype: str | None = setting(None, "float32 or bfloat16; by default float32 on a CPU and bfloat16 on CUDA.")
    gradient_checkpointing: bool | None = setting(
        None, "Run layers again in the backward pass; by default for llama-1b and -8b on CUDA."
    )
    max_tokens_per_row: int | None = setting(None, "Longest packed row in tokens; by default 32768 on CUDA.")
    lengths: str = setting(
        "dynamic", "How FlexAttention is compiled: dynamic (one kernel) or bucket (one per row length)."
    )
    threads: int = setting(1, "Threads on a CPU; several wait for each other where the machine is busy.")
    seed: int = setting(0, "Of lengths, tokens and weights.")

    def __post_init__(self) -> None:
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        if self.device not in DEFAULT_BASELINES:
            raise FlexdpoError(f"--device must be cpu or cuda, got {self.device!r}")
        cuda = self.device == "cuda"
        defaults = {"pairs": 8 if cuda else 16, "batches": 1 if cuda else 2}
        for name, default in {**defaults, "baselines": DEFAULT_BASELINES[self.device]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        find_profiles(self.profile)
        require_shape(self.model)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise FlexdpoError(f"--dtype {self.dtype!r} is unknown; use one of {tuple(DTYPES)}")
        for name in ("pairs", "batches", "rounds", "scale", "seconds", "threads", "max_tokens_per_row"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise FlexdpoError(f"--{name} must be above 0, got {getattr(self, name)}")
        if cuda and not torch.cuda.is_available():
            raise FlexdpoError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build")
        self._require_baselines()

    def _require_baselines(self) -> None:
        chosen = self.baselines or ()
        for name in chosen:
            if name not in BASELINES:
                raise FlexdpoError(f"--baseline {name!r} is unknown{nearest(name, BASELINES)}; use {BASELINES}")
        if "varlen" in chosen and self.device != "cuda":
            raise FlexdpoError("--baseline varlen is a kernel for CUDA; use --device cuda, or leave it out")
        if {"packed", "varlen"} & set(chosen) and self.device == "cuda" and self.dtype == "float32":
            raise FlexdpoError(
                "--dtype float32: on CUDA the baselines packed and varlen are FlashAttention, which runs half "
                "precision only; use bfloat16, or --baseline padded"
            )

    @property
    def checkpointing(self) -> bool:
        """Whether layers run again in the backward pass."""
        large = self.device == "cuda" and self.model in ("llama-1b", "llama-8b")
        return large if self.gradient_checkpointing is None else self.gradient_checkpointing

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return DTYPES[self.dtype or ("bfloat16" if self.device == "cuda" else "float32")]

    @property
    def row_budget(self) -> int | None:
        """Longest packed row in tokens."""
        return self.max_tokens_per_row or (32_768 if self.device == "cuda" else None)

    @property
    def rows(self) -> dict[str, Any]:
        """How pairs are packed, as arguments of :func:`flexdpo.bench.variants.pack_pairs`."""
        return {"max_tokens_per_row": self.row_budget, "pad_to_multiple_of": tile_multiple(self.device)}
