"""Measures what sharing and packing gain on a device, against what the multiplications saved would allow."""

from __future__ import annotations

import contextlib
import datetime
import platform
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from flexdpo.bench.profiles import Profile, find_profiles
from flexdpo.bench.settings import BenchSettings
from flexdpo.bench.timing import Times, kernel_times, measure, of_process, paired_ratio
from flexdpo.bench.variants import Packed, Padded, PaddedLabels, Trl, Variant, Varlen
from flexdpo.estimate.costs import StepSeconds, Work, find_machine, padded_load, row_load, step_seconds
from flexdpo.estimate.model_shapes import build_model, shape_config
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.show.table import aligned
from flexdpo.training.model_size import ModelSize

PHASES = ("total", "policy", "reference")


def run_bench(
    settings: BenchSettings, *, progress: Callable[[str], Any] = lambda _: None, report: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Measure every profile that was asked for; returns what ``flexdpo bench --json`` writes.

    ``progress`` is told what is being done, ``report`` given a table for each profile as soon as it is there.
    """
    device = torch.device(settings.device)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    result = described(settings)
    model = build_model(shape_config(settings.model), device, settings.torch_dtype, seed=settings.seed)
    if settings.checkpointing:
        enable_checkpointing(model)
    with kernel_settings_as(KernelSettings(lengths=settings.lengths)):  # type: ignore[arg-type]
        for profile in find_profiles(settings.profile):
            progress(profile.name)
            figures = _run_profile(profile, settings, model, partial(progress, profile.name))
            result["profiles"][profile.name] = figures
            report(profile_table(profile.name, figures))
    return result


def described(settings: BenchSettings) -> dict[str, Any]:
    """A result that holds all but its figures: what is measured, and where."""
    config = shape_config(settings.model)
    return {
        "settings": asdict(settings),
        "environment": describe_environment(torch.device(settings.device)),
        "model": {**asdict(ModelSize.of(config)), "tied": config.tie_word_embeddings, "family": config.model_type},
        "dtype": str(settings.torch_dtype).removeprefix("torch."),
        "gradient_checkpointing": settings.checkpointing,
        "profiles": {},
    }


def _run_profile(
    profile: Profile, settings: BenchSettings, model: PreTrainedModel, progress: Callable[[], Any]
) -> dict[str, Any]:
    device, size = torch.device(settings.device), ModelSize.of(shape_config(settings.model))
    rng = np.random.default_rng(settings.seed)
    scaled, count = profile.scaled(settings.scale), settings.batches or 1
    batches = [scaled.pairs(settings.pairs or 1, rng, size.vocabulary) for _ in range(count)]
    variants = [make(model, batches, device) for make in _variants(settings)]
    limits: dict[str, Any] = {"rounds": settings.rounds, "seconds": settings.seconds}
    times = measure(variants, model, count, device, progress=progress, **limits)
    model.zero_grad(set_to_none=True)
    figures = {each.name: _figures(each, times[each.name], settings, size) for each in variants}
    predicted = {each.name: _predicted_seconds(each, settings, size) for each in variants}

    def speedup(name: str, phase: str) -> dict[str, float]:
        ratio = paired_ratio(times[name], times["shared"], phase)
        ideal = figures[name]["flops"][phase] / figures["shared"]["flops"][phase]
        expected = getattr(predicted[name], phase) / getattr(predicted["shared"], phase)
        return {**ratio, "ideal": ideal, "efficiency": ratio["median"] / ideal, "predicted": expected}

    return {
        "variants": figures,
        "speedups": {name: {phase: speedup(name, phase) for phase in PHASES} for name in figures if name != "shared"},
        "kernels": kernel_times(batches[0], size, device, settings.torch_dtype, **settings.rows),
    }


def _variants(settings: BenchSettings) -> list[Callable[..., Variant]]:
    """Makers of the baselines that were asked for, and of shared rows, of a model, its batches and their device."""
    packed = Varlen if settings.device == "cuda" else partial(Packed, shared=False)
    makers: dict[str, Callable[..., Variant]] = {
        "trl": partial(Trl, checkpointing=settings.checkpointing),
        "padded": Padded,
        "padded_labels": PaddedLabels,
        "packed": partial(packed, max_tokens_per_row=settings.row_budget),
        "varlen": partial(Packed, shared=True, impl="varlen", **settings.rows),
        "shared": partial(Packed, shared=True, **settings.rows),
    }
    return [make for name, make in makers.items() if name in (*(settings.baselines or ()), "shared")]


def _figures(variant: Variant, times: Times, settings: BenchSettings, size: ModelSize) -> dict[str, Any]:
    work = sum(variant.work, Work())
    reference = work.forward_flops(size)
    policy = work.training_flops(size, checkpointing=settings.checkpointing, head_passes=variant.head_passes)
    seconds = {phase: times.quartiles(phase) for phase in PHASES}
    return {
        "pairs_per_second": (settings.pairs or 1) * len(times.steps) / seconds["total"]["median"],
        **asdict(work),
        "seconds": seconds,
        "peak_bytes": times.peak_bytes,
        "flops": {"total": reference + policy, "policy": policy, "reference": reference},
        "rounds": int(np.isfinite(times.of("total")[0]).sum()),
        "pairs_at_once": getattr(variant, "pairs_at_once", settings.pairs),
    }


def _predicted_seconds(variant: Variant, settings: BenchSettings, size: ModelSize) -> StepSeconds:
    """What the predictor of ``flexdpo estimate`` says of a variant's batches, before they are run."""
    machine = find_machine(settings.device)
    if isinstance(variant, Packed):
        loads = [row_load(row, size, machine) for rows in variant.rows for row in rows]
    else:
        # padded variants differ in the positions that they compute logits at
        loads = [
            padded_load(batch)._replace(targets=work.targets, kept_logits=variant.head_passes == 3)
            for batch, work in zip(variant.batches, variant.work, strict=True)
        ]
    return step_seconds(loads, size, machine, checkpointing=settings.checkpointing)


def profile_table(name: str, figures: dict[str, Any]) -> str:
    """The figures of one profile, in aligned lines."""
    header = ["pairs/s", "tokens", "policy s", "reference s", "+MB"]
    lines = [[name, *header, "speed-up (quartiles)", "ideal", "efficiency", "predicted"]]
    for variant, values in figures["variants"].items():
        line = [f"  {variant}", f"{values['pairs_per_second']:.2f}", f"{values['tokens']}"]
        line += [f"{values['seconds'][phase]['median']:.3f}" for phase in ("policy", "reference")]
        line += ["-" if values["peak_bytes"] is None else f"{values['peak_bytes'] / 1e6:.0f}"]
        if variant in figures["speedups"]:
            speed = figures["speedups"][variant]["total"]
            line += [f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})", f"{speed['ideal']:.2f}"]
            line += [f"{speed['efficiency']:.3f}", f"{speed['predicted']:.2f}"]
        lines.append(line + [""] * (len(lines[0]) - len(line)))
    text = [aligned(lines)]
    for row in figures["kernels"]:
        mask = "" if row["block_mask_ms"] is None else f", its BlockMask {row['block_mask_ms']:.2f} ms"
        text.append(
            f"  one layer, {row['layout']}, {row['kernel']}: forward {row['forward_ms']:.2f} ms, "
            f"backward {row['backward_ms']:.2f} ms{mask} ({row['tokens']} tokens)"
        )
    return "\n".join(text)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and date."""
    import transformers

    from flexdpo import __version__

    versions = {"flexdpo": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    with contextlib.suppress(ImportError):
        import trl

        versions["trl"] = trl.__version__
    cuda = device.type == "cuda"
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    processor = named[1] if named else platform.processor() or platform.machine()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if cuda else processor,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "seconds_of": "the process" if of_process(device) else "the clock",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
