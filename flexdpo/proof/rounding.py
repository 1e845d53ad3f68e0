"""What rounding is: in which dtype a run rounds, a run that rounds otherwise, and how far two runs are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_HALF_QUANTILE = 0.9


class CoarsestRounding(TorchDispatchMode):
    """Watches every operation for the coarsest dtype: autocast cannot be asked, and norms compute in their own."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0  # of that dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.eps = max(self.eps, torch.finfo(output.dtype).eps)
        return output


def rounded_otherwise(embedded: Tensor, rounding: float, seed: int = 0) -> Tensor:
    """Move every number by about ``rounding``, relative to itself: another batch alone may happen to round alike."""
    noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(embedded)
    return embedded + embedded * noise * rounding


def token_error(pairs: Iterable[tuple[Tensor, Tensor]], rounding: float = 0.0) -> float:
    """The largest difference at any token of ``[L, ...]``, relative to the largest value; NaN without any pair.

    In half precision (of the tensors, or with a coarser ``rounding`` than float32's) a router may send single tokens to
    other experts for a rounding, so that nine in ten tokens have to do.
    """
    differences, largest, half = [], 0.0, rounding > torch.finfo(torch.float32).eps
    for got, want in pairs:
        half |= torch.finfo(want.dtype).bits < 32
        largest = max(largest, float(want.abs().max()))
        differences.append((got.double() - want.double()).abs().reshape(len(want), -1).amax(dim=1))
    if not differences:
        return float("nan")
    error = float(torch.cat(differences).quantile(_HALF_QUANTILE if half else 1.0)) / max(largest, 1e-30)
    # NaN stands for what was not compared
    return float("inf") if math.isnan(error) else error
