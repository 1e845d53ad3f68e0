"""Which torch and triton these tests know the insides of."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

# the harness replaces private parts of both, so it holds for the pairs it was tried on and no other
TRIED = {"2.13.0": "3.7.1"}


def installed_triton() -> str | None:
    """The triton that is installed, without importing it: it must not be imported before its mode is chosen."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def refusal(torch_version: str = torch.__version__, triton_version: str | None = None) -> str | None:
    """Say in one line why the harness would not hold here, or nothing where it was tried."""
    triton_version = triton_version or installed_triton()
    release, _, build = torch_version.partition("+")
    if build in ("", "cpu") and TRIED.get(release) == triton_version:
        return None
    tried = " or ".join(f"the CPU build of torch {ours} with triton {theirs}" for ours, theirs in TRIED.items())
    return (
        f"the codegen tests reach into torch and triton and were tried on {tried}, not on torch {torch_version} with "
        f"{'triton ' + triton_version if triton_version else 'no triton'}; README says how to install that pair"
    )
