"""Measures what sharing and packing gain on a device, against what the multiplications saved would allow."""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from flexdpo.bench.kernels import kernel_rows
from flexdpo.bench.profiles import find_profiles
from flexdpo.bench.timing import Times, measure, paired_ratio
from flexdpo.bench.trl import TrlArm
from flexdpo.bench.variants import Arm, PackedArm, PaddedArm, PaddedLabelsArm
from flexdpo.bench.varlen import VarlenArm
from flexdpo.errors import FlexdpoError, nearest
from flexdpo.estimate.costs import StepSeconds, find_machine, padded_load, row_load, step_seconds
from flexdpo.estimate.flops import Work
from flexdpo.estimate.model_shapes import find_shape
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.layout.row import tile_multiple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from flexdpo.attention.row_mask import Impl
    from flexdpo.bench.profiles import Profile
    from flexdpo.estimate.model_shapes import Shape
    from flexdpo.layout.groups import Group

# on a GPU TRL computes logits at labels only, so that is the padded baseline there to look at
BASELINES = ("padded", "padded_labels", "packed", "varlen", "trl")
DEFAULT_BASELINES = {"cpu": ("padded", "packed"), "cuda": ("padded", "padded_labels", "packed", "varlen")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PHASES = ("total", "policy", "reference")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, and how long.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        profile: One of the six, or ``"all"``.
        scale: Factor on every length.
        model: Name of a shape.
        baselines: What sharing is compared with; by default padded and packed, and on CUDA also padded with logits at
            labels only, and sharing through ``varlen_attn``.
        pairs: Pairs per step; by default 16 on a CPU and 8 on CUDA.
        batches: Different batches of that many pairs; by default 2 on a CPU and 1 on CUDA.
        rounds: Most measurements of each batch.
        seconds: No round but the first four begins later than this, for each profile.
        dtype: ``"float32"`` or ``"bfloat16"``; by default float32 on a CPU and bfloat16 on CUDA.
        gradient_checkpointing: Run layers again in the backward pass; by default for ``llama-8b`` and ``llama-1b`` on
            CUDA.
        max_tokens_per_row: Longest packed row; by default 32768 on CUDA and unbounded on a CPU.
        lengths: How FlexAttention is compiled: ``"dynamic"`` (one kernel, the default), ``"bucket"`` (one per length).
        threads: Threads of a CPU. One by default: two wait for each other, and on a busy machine longer than they work.
        seed: Of lengths, tokens and weights.
    """

    device: str = "cpu"
    profile: str = "all"
    scale: float = 1.0
    model: str = "tiny"
    baselines: tuple[str, ...] | None = None
    pairs: int | None = None
    batches: int | None = None
    rounds: int = 24
    seconds: float = 30.0
    dtype: str | None = None
    gradient_checkpointing: bool | None = None
    max_tokens_per_row: int | None = None
    lengths: str = "dynamic"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        cuda = self.device == "cuda"
        object.__setattr__(self, "pairs", (8 if cuda else 16) if self.pairs is None else self.pairs)
        object.__setattr__(self, "batches", (1 if cuda else 2) if self.batches is None else self.batches)
        chosen = DEFAULT_BASELINES["cuda" if cuda else "cpu"] if self.baselines is None else self.baselines
        object.__setattr__(self, "baselines", chosen)
        find_profiles(self.profile)
        find_shape(self.model)
        for name in chosen:
            if name not in BASELINES:
                raise FlexdpoError(f"--baseline {name!r} is unknown{nearest(name, BASELINES)}; use {BASELINES}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise FlexdpoError(f"--dtype {self.dtype!r} is unknown; use one of {tuple(DTYPES)}")
        for name in ("pairs", "batches", "rounds", "scale", "seconds", "threads"):
            if getattr(self, name) <= 0:
                raise FlexdpoError(f"--{name} must be above 0, got {getattr(self, name)}")
        if self.device not in ("cpu", "cuda"):
            raise FlexdpoError(f"--device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise FlexdpoError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build")
        if "varlen" in chosen and not cuda:
            raise FlexdpoError("--baseline varlen is a kernel for CUDA; use --device cuda, or leave it out")
        if {"packed", "varlen"} & set(chosen) and cuda and self.dtype == "float32":
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
    def row_multiple(self) -> int:
        """Packed rows are padded to a multiple of this many tokens."""
        return tile_multiple(self.device)


@dataclass(eq=False)
class BenchResult:
    """All figures of a run.

    Attributes:
        settings: What was asked for.
        environment: Versions, device and date.
        profiles: The figures of each profile by its name, as they go into the JSON file.
    """

    settings: BenchSettings
    environment: dict[str, Any]
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "settings": asdict(self.settings),
            "environment": self.environment,
            "model": asdict(find_shape(self.settings.model)),
            "dtype": str(self.settings.torch_dtype).removeprefix("torch."),
            "gradient_checkpointing": self.settings.checkpointing,
            "profiles": self.profiles,
        }


def run_bench(
    settings: BenchSettings, *, progress: Callable[[str], Any] = lambda _: None, report: Callable[[str], Any] = print
) -> BenchResult:
    """Measure every profile that was asked for.

    Args:
        settings: What to measure.
        progress: Told what is being done.
        report: Given a table for each profile as soon as it is there.
    """
    device = torch.device(settings.device)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    shape = find_shape(settings.model)
    result = BenchResult(settings, describe_environment(device))
    model = shape.build(device, settings.torch_dtype, seed=settings.seed)
    if settings.checkpointing:
        enable_checkpointing(model)
    with kernel_settings_as(KernelSettings(lengths=settings.lengths)):  # type: ignore[arg-type]
        for profile in find_profiles(settings.profile):
            progress(profile.name)
            result.profiles[profile.name] = _run_profile(profile, settings, shape, model, device, progress)
            report(profile_table(profile.name, result.profiles[profile.name]))
    return result


def _run_profile(
    profile: Profile,
    settings: BenchSettings,
    shape: Shape,
    model: PreTrainedModel,
    device: torch.device,
    progress: Callable[[str], Any],
) -> dict[str, Any]:
    rng = np.random.default_rng(settings.seed)
    scaled = profile.scaled(settings.scale)
    count = settings.batches or 1
    batches = [scaled.pairs(settings.pairs or 1, rng, shape.vocabulary) for _ in range(count)]
    arms = _arms(settings, model, batches, device)
    times = measure(
        arms,
        model,
        count,
        device,
        rounds=settings.rounds,
        seconds=settings.seconds,
        slow=("padded", "padded_labels", "trl"),
        progress=lambda: progress(profile.name),
    )
    model.zero_grad(set_to_none=True)
    figures = {arm.name: _arm_figures(arm, times[arm.name], settings, shape) for arm in arms}
    predicted = {arm.name: _predicted_seconds(arm, settings, shape) for arm in arms}
    kernels = kernel_rows(
        batches[0],
        shape,
        device,
        settings.torch_dtype,
        max_tokens_per_row=settings.row_budget,
        pad_to_multiple_of=settings.row_multiple,
    )
    return {
        "arms": figures,
        "speedups": {
            arm.name: {phase: _speedup(arm.name, times, figures, predicted, phase) for phase in PHASES}
            for arm in arms
            if arm.name != "shared"
        },
        "kernels": [row.as_json() for row in kernels],
    }


def _arms(
    settings: BenchSettings, model: PreTrainedModel, batches: Sequence[Sequence[Group]], device: torch.device
) -> list[Arm]:
    budget, multiple = settings.row_budget, settings.row_multiple
    arms: list[Arm] = []
    baselines = settings.baselines or ()
    if "trl" in baselines:
        arms.append(TrlArm(model, batches, device, checkpointing=settings.checkpointing))
    if "padded" in baselines:
        arms.append(PaddedArm(model, batches, device))
    if "padded_labels" in baselines:
        arms.append(PaddedLabelsArm(model, batches, device))
    if "packed" in baselines and device.type == "cuda":
        arms.append(VarlenArm(model, batches, device, max_tokens_per_row=budget))
    elif "packed" in baselines:
        arms.append(PackedArm(model, batches, device, shared=False, max_tokens_per_row=budget))
    impls: tuple[Impl, ...] = ("varlen", "auto") if "varlen" in baselines else ("auto",)
    for impl in impls:
        arms.append(
            PackedArm(
                model,
                batches,
                device,
                shared=True,
                max_tokens_per_row=budget,
                pad_to_multiple_of=multiple,
                impl=impl,
            )
        )
    return arms


# --- figures ---------------------------------------------------------------------------------------------------------


def _arm_figures(arm: Arm, times: Times, settings: BenchSettings, shape: Shape) -> dict[str, Any]:
    work = sum((arm.work(batch) for batch in range(len(times.steps))), Work(0, 0, 0))
    reference = work.forward_flops(shape)
    policy = work.training_flops(shape, checkpointing=settings.checkpointing, head_passes=arm.head_passes)
    seconds = {}
    for phase in PHASES:
        low, high = times.quartiles(phase)
        seconds[phase] = {"median": times.median(phase), "low": low, "high": high}
    return {
        "pairs_per_second": (settings.pairs or 1) * len(times.steps) / seconds["total"]["median"],
        "tokens": work.tokens,
        "scores": work.scores,
        "targets": work.targets,
        "seconds": seconds,
        "peak_bytes": times.peak_bytes,
        "flops": {"total": reference + policy, "policy": policy, "reference": reference},
        "rounds": sum(step is not None for step in times.steps[0]),
        "pairs_at_once": getattr(arm, "pairs_at_once", settings.pairs),
    }


def _predicted_seconds(arm: Arm, settings: BenchSettings, shape: Shape) -> StepSeconds:
    """What the predictor of ``flexdpo estimate`` says of an arm's batches, before they are run."""
    machine = find_machine(settings.device)
    if isinstance(arm, PackedArm):
        loads = [row_load(row, shape, machine) for rows in arm.rows for row in rows]
    else:
        # padded arms differ in the positions that they compute logits at
        loads = [
            padded_load(batch)._replace(targets=arm.work(number).targets, kept_logits=arm.head_passes == 3)
            for number, batch in enumerate(arm.batches)  # type: ignore[attr-defined]
        ]
    return step_seconds(loads, shape, machine, checkpointing=settings.checkpointing)


def _speedup(
    name: str,
    times: dict[str, Times],
    figures: dict[str, dict[str, Any]],
    predicted: dict[str, StepSeconds],
    phase: str,
) -> dict[str, float]:
    ratio = paired_ratio(times[name], times["shared"], phase)
    ideal = figures[name]["flops"][phase] / figures["shared"]["flops"][phase]
    expected = getattr(predicted[name], phase) / getattr(predicted["shared"], phase)
    return {**ratio._asdict(), "ideal": ideal, "efficiency": ratio.median / ideal, "predicted": expected}


def profile_table(name: str, figures: dict[str, Any]) -> str:
    """The figures of one profile, in aligned lines."""
    lines = [
        f"{name:<14}  pairs/s  tokens  policy s  reference s    +MB  speed-up (quartiles)  ideal  efficiency  predicted"
    ]
    for arm, values in figures["arms"].items():
        seconds = values["seconds"]
        peak = values["peak_bytes"]
        line = (
            f"  {arm:<12}  {values['pairs_per_second']:7.2f}  {values['tokens']:6d}  {seconds['policy']['median']:8.3f}"
            f"  {seconds['reference']['median']:11.3f}  {'-' if peak is None else f'{peak / 1e6:.0f}':>5}"
        )
        if arm in figures["speedups"]:
            speed = figures["speedups"][arm]["total"]
            quartiles = f"{speed['median']:5.2f} ({speed['low']:.2f} to {speed['high']:.2f})"
            line += f"  {quartiles:<20}  {speed['ideal']:5.2f}  {speed['efficiency']:10.3f}  {speed['predicted']:9.2f}"
        lines.append(line)
    for row in figures["kernels"]:
        mask = "" if row["block_mask_ms"] is None else f", its BlockMask {row['block_mask_ms']:.2f} ms"
        lines.append(
            f"  one layer, {row['layout']}, {row['kernel']}: forward {row['forward_ms']:.2f} ms, "
            f"backward {row['backward_ms']:.2f} ms{mask} ({row['tokens']} tokens)"
        )
    return "\n".join(lines)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and date."""
    import transformers

    from flexdpo import __version__

    versions = {"flexdpo": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import trl
    except ImportError:
        pass
    else:
        versions["trl"] = trl.__version__
    cuda = device.type == "cuda"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
