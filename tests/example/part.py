"""A part of the standard library that every Python has; reading all of it takes longer than a test."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path

from flexdpo.example.stdlib import SourceFunction, StandardLibrary, read_standard_library

PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml")


@cache
def half_of_the_part() -> StandardLibrary:
    """Every other module of the part: enough for twenty held-out pairs, tokenised in a second."""
    part = part_of_the_library()
    modules = list(part.texts)[::2]
    return StandardLibrary(
        {module: part.texts[module] for module in modules},
        tuple(function for function in part.functions if function.module in modules),
        (),
    )


@cache
def part_of_the_library() -> StandardLibrary:
    texts: dict[str, str] = {}
    functions: list[SourceFunction] = []
    for package in PACKAGES:
        part = read_standard_library(Path(sysconfig.get_path("stdlib")) / package)
        texts |= {f"{package}/{module}": text for module, text in part.texts.items()}
        functions += [replace(function, module=f"{package}/{function.module}") for function in part.functions]
    return StandardLibrary(texts, tuple(functions), ())
