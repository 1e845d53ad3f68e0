"""``flexdpo bench``: what sharing and packing gain on this machine, against padded and packed training."""

import json
import sys
import time
from dataclasses import dataclass

from flexdpo.bench.bench import run_bench
from flexdpo.bench.settings import BenchSettings
from flexdpo.commands.options import OptionParser, settings_of, writable
from flexdpo.objective.loss_types import setting


@dataclass
class BenchOptions:
    """What the measurement's own settings do not hold."""

    drop_in: bool = setting(
        False,
        "Measure flexdpo.share_prefixes instead: padded batches of 8 and 16 completions of one prompt, 1, 4 and 16 "
        "times as long as they are, with and without it. Takes --device, --model, --threads, --seed, --scale, --json.",
    )
    json: str | None = setting(None, "Write every figure to this file.")


_OF_DROP_IN = {"device", "model", "threads", "seed", "scale", "json", "drop_in"}


def parser() -> OptionParser:
    """The options."""
    options = OptionParser(
        prog="flexdpo bench",
        usage="flexdpo bench [--device DEVICE] [--profile NAME] [--model NAME] [--json FILE] [options]",
        description="Time a DPO step (policy forward and backward, reference forward) on pairs with the lengths of "
        "six datasets: prompts shared, against the same pairs the ordinary ways. Efficiency is the speed-up divided by "
        "what the multiplications saved allow.",
    )
    options.add_settings(BenchSettings, "the measurement")
    options.add_settings(BenchOptions, "what is measured, and where the figures go")
    return options


def run(argv: list[str]) -> int:
    """Run ``flexdpo bench`` with the words after it; prints a table per profile."""
    options = parser()
    found = options.read(argv)
    if found.drop_in:
        options.require_effect(found, vars(found).keys() - _OF_DROP_IN, "with --drop_in")
    settings = settings_of(BenchSettings, found)
    target = writable(found.json)
    started, is_screen = time.perf_counter(), sys.stderr.isatty()

    def progress(text: str) -> None:
        if is_screen:
            print(f"\r\033[K{time.perf_counter() - started:6.0f} s  {text}", end="", file=sys.stderr, flush=True)

    def report(table: str) -> None:
        if is_screen:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(table, flush=True)

    if found.drop_in:
        from flexdpo.bench.dropin import bench_completions

        result = bench_completions(settings, report=report)
    else:
        result = run_bench(settings, progress=progress, report=report)
    if target is not None:
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {target}")
    return 0
