"""``flexdpo bench``: what sharing and packing gain on this machine, against padded and packed training."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flexdpo.bench.bench import BASELINES, BenchSettings, run_bench
from flexdpo.bench.profiles import load_profiles
from flexdpo.commands.options import OptionParser
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.model_shapes import SHAPES


@dataclass
class BenchArguments:
    """What to measure."""

    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one."})
    profile: str = field(
        default="all", metadata={"help": f"Lengths of which dataset: {', '.join(load_profiles())}, or all."}
    )
    scale: float = field(default=1.0, metadata={"help": "Factor on every length."})
    model: str = field(default="tiny", metadata={"help": f"Shape with random weights: {', '.join(SHAPES)}."})
    baseline: list[str] | None = field(
        default=None,
        metadata={
            "help": f"What to compare with, of {', '.join(BASELINES)}: padded sequences with stock attention and full "
            "logits; the same with logits at labels only, as TRL has them on GPUs; packed rows whose prompts are not "
            "shared (FlashAttention's varlen_attn on CUDA); shared rows through varlen_attn (CUDA); TRL's trainer. By "
            "default padded and packed, and on CUDA all but TRL."
        },
    )
    pairs: int | None = field(default=None, metadata={"help": "Pairs per step; by default 16 on a CPU, 8 on CUDA."})
    batches: int | None = field(
        default=None, metadata={"help": "Different batches of that many pairs; by default 2 on a CPU, 1 on CUDA."}
    )
    rounds: int = field(default=24, metadata={"help": "Most measurements of each batch."})
    seconds: float = field(default=40.0, metadata={"help": "Per profile: no round but four begins later."})
    dtype: str | None = field(
        default=None, metadata={"help": "float32 or bfloat16; by default float32 on a CPU and bfloat16 on CUDA."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Run layers again in the backward pass; by default for llama-1b and -8b on CUDA."},
    )
    max_tokens_per_row: int | None = field(
        default=None, metadata={"help": "Longest packed row in tokens; by default 32768 on CUDA."}
    )
    lengths: str = field(
        default="dynamic",
        metadata={"help": "How FlexAttention is compiled: dynamic (one kernel) or bucket (one per row length)."},
    )
    threads: int = field(
        default=1, metadata={"help": "Threads on a CPU; several wait for each other where the machine is busy."}
    )
    seed: int = field(default=0, metadata={"help": "Of lengths, tokens and weights."})
    json: str | None = field(default=None, metadata={"help": "Write every figure to this file."})
    drop_in: bool = field(
        default=False,
        metadata={
            "help": "Measure flexdpo.share_prefixes instead: a padded batch of 2 prompts with 8 completions each, with "
            "and without it. Takes --device, --model, --threads, --seed and --scale."
        },
    )


def run(argv: list[str]) -> int:
    """Run ``flexdpo bench`` with the words after it; prints a table per profile."""
    options = OptionParser(
        (BenchArguments,),
        prog="flexdpo bench",
        usage="flexdpo bench [--device DEVICE] [--profile NAME] [--model NAME] [--json FILE] [options]",
        description="Time a DPO step (policy forward and backward, reference forward) on pairs with the lengths of "
        "six datasets: prompts shared, against the same pairs the ordinary ways. Efficiency is the speed-up divided by "
        "what the multiplications saved allow.",
    )
    if {"-h", "--help"} & set(argv):
        options.print_help()
        return 0
    (arguments,) = options.parse_with_config(argv)
    if arguments.drop_in:
        return _bench_drop_in(arguments)
    target = _writable(arguments.json)
    result = run_bench(_settings(arguments), progress=_progress(), report=_report)
    if target is not None:
        target.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
        print(f"written to {target}")
    return 0


def _bench_drop_in(arguments: BenchArguments) -> int:
    from flexdpo.bench.dropin import SharingBenchSettings, bench_sharing

    settings = SharingBenchSettings(
        device=_device(arguments),
        model=arguments.model,
        prompt_tokens=round(512 * arguments.scale),
        completion_tokens=round(128 * arguments.scale),
        threads=arguments.threads,
        seed=arguments.seed,
    )
    print(bench_sharing(settings).table())
    return 0


def _device(arguments: BenchArguments) -> str:
    import torch

    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return arguments.device


def _settings(arguments: BenchArguments) -> BenchSettings:
    return BenchSettings(
        device=_device(arguments),
        profile=arguments.profile,
        scale=arguments.scale,
        model=arguments.model,
        baselines=None if arguments.baseline is None else tuple(dict.fromkeys(arguments.baseline)),
        pairs=arguments.pairs,
        batches=arguments.batches,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        dtype=arguments.dtype,
        gradient_checkpointing=arguments.gradient_checkpointing,
        max_tokens_per_row=arguments.max_tokens_per_row,
        lengths=arguments.lengths,
        threads=arguments.threads,
        seed=arguments.seed,
    )


def _writable(name: str | None) -> Path | None:
    """The result file, tried now: minutes of measuring must not end in a missing folder."""
    if name is None:
        return None
    path = Path(name)
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise FlexdpoError(
            f"--json {path} cannot be written: {error.strerror}; name a file in a folder that exists"
        ) from error
    return path


def _report(table: str) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(table, flush=True)


def _progress() -> Callable[[str], None]:
    started = time.perf_counter()

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{time.perf_counter() - started:6.0f} s  {text}", end="", file=sys.stderr, flush=True)

    return show
