"""What the log-probabilities of targets cost with and without full logits: memory and time, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.objective.linear_logps import linear_logps, logits_logps

Way = Literal["chunked", "full logits", "linear_cross_entropy"]
WAYS: tuple[Way, ...] = ("chunked", "full logits", "linear_cross_entropy")
# the logits and what their logsumexp and gather leave behind or need on the way back, measured
_COPIES_OF_LOGITS = 5.1


@dataclass(frozen=True)
class LogpsCost:
    """One measured pass.

    Attributes:
        way: How it was computed.
        forward_s: Seconds.
        backward_s: Seconds.
        peak_bytes: Memory at its highest, beyond what stood before the pass (inputs and weight), gradients included.
    """

    way: Way
    forward_s: float
    backward_s: float
    peak_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds, forward and backward."""
        return self.forward_s + self.backward_s


def measure_logps(
    way: Way,
    *,
    targets: int = 8192,
    vocabulary: int = 131_072,
    hidden: int = 512,
    threads: int = 1,
) -> LogpsCost:
    """Measure one forward and backward pass in a process of its own, in float32 on the CPU.

    A fresh process, because memory once used stays with the allocator and would hide the next peak.

    Args:
        way: ``"chunked"`` is what training uses; ``"full logits"`` the ordinary computation;
            ``"linear_cross_entropy"`` torch's own (2.13 and later).
        targets: Tokens to predict.
        vocabulary: Words.
        hidden: Size of the hidden states.
        threads: Of torch.

    Raises:
        FlexdpoError: if full logits would need more memory than the machine has left; nothing is started then.
    """
    if way not in WAYS:
        raise FlexdpoError(f"unknown way {way!r}; known: {', '.join(WAYS)}")
    if way == "full logits":
        _require_memory(targets * vocabulary * 4 * _COPIES_OF_LOGITS)
    request = {"way": way, "targets": targets, "vocabulary": vocabulary, "hidden": hidden, "threads": threads}
    # sys.path travels along, so that a checkout that is not installed measures itself
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "flexdpo.bench.logps", json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["killed, perhaps for want of memory"]
        raise FlexdpoError(f"measuring {way!r} with {targets} targets and {vocabulary} words failed: {last[0]}")
    return LogpsCost(**json.loads(done.stdout.splitlines()[-1]))


def _require_memory(needed: float) -> None:
    import psutil  # type: ignore[import-untyped,unused-ignore]

    available = psutil.virtual_memory().available
    if available < needed:
        raise FlexdpoError(
            f"full logits of this size need about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free; measure "
            "with fewer targets, since their memory grows with the number of targets and the chunked one does not"
        )


def compare_logps(**sizes: int) -> dict[str, float]:
    """Measure training's way and full logits.

    Args:
        sizes: As for :func:`measure_logps`.

    Returns:
        ``memory_ratio`` and ``time_ratio``, chunked over full logits, and the figures they come from.
    """
    chunked, full = measure_logps("chunked", **sizes), measure_logps("full logits", **sizes)
    return {
        "memory_ratio": chunked.peak_bytes / full.peak_bytes,
        "time_ratio": chunked.total_s / full.total_s,
        "chunked_peak_bytes": chunked.peak_bytes,
        "full_peak_bytes": full.peak_bytes,
        "chunked_s": chunked.total_s,
        "full_s": full.total_s,
    }


def _run(way: Way, targets: int, vocabulary: int, hidden: int, threads: int) -> dict[str, Any]:
    import time

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    states = torch.empty(targets, hidden).normal_(generator=generator).requires_grad_()
    # drawn in place: a temporary as large as the weight would already be the peak of a lean pass
    weight = torch.empty(vocabulary, hidden).normal_(std=0.05, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (targets,), generator=generator)
    gradient = torch.empty(targets).normal_(generator=generator)
    before = _peak_resident_bytes()
    start = time.perf_counter()
    logps = _logps(way, states, weight, labels)
    middle = time.perf_counter()
    logps.backward(gradient)
    end = time.perf_counter()
    peak = _peak_resident_bytes() - before
    return {"way": way, "forward_s": middle - start, "backward_s": end - middle, "peak_bytes": peak}


def _peak_resident_bytes() -> int:
    """The most memory this process ever held."""
    if sys.platform == "linux":
        # getrusage would go on counting from the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    else:  # noqa: RET505 - mypy looks at one platform only
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _logps(way: Way, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if way == "chunked":
        return linear_logps(states, weight, None, labels).logps
    if way == "linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise FlexdpoError(f"torch {torch.__version__} has no linear_cross_entropy; it came with torch 2.13")
    if way == "full logits":
        return logits_logps(torch.nn.functional.linear(states, weight), labels).logps
    losses: torch.Tensor = torch.nn.functional.linear_cross_entropy(
        states, weight, labels, reduction="none", options=torch.nn.LinearCrossEntropyOptions()
    )
    return -losses


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(**json.loads(sys.argv[1]))) + "\n")
