"""Memory and time of a row in pieces against the row whole and one pair: ``python -m tests.objective.bench_pieces``.

A prompt of 8192 tokens with 16 responses of 512, on a tiny model. Each run has a process of its own, whose resident
peak and CPU time are taken. ``one`` is the prompt with a single response.

Peaks are taken twice: of the process as it stands, and of what is alive, where malloc is told to hand every tensor's
memory back.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from flexdpo import Group, Row, pack, prepare_model, response_logps

PROMPT, RESPONSE, RESPONSES = 8192, 512, 16
BUDGET = PROMPT + RESPONSE
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 16384,
}
_NO_DROPS = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=1024),
    "gpt2": lambda: GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=2,
        vocab_size=2048,
        n_positions=16384,
        bos_token_id=1,
        eos_token_id=2,
        **_NO_DROPS,
    ),
}


# above this size memory is mapped, and so given back, whatever was freed before
HANDED_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def measure(name: str, what: str, environment: dict[str, str] | None = None) -> dict[str, float]:
    """Bytes at the peak of a step beyond what was there before it, and its seconds, in a process of its own."""
    command = [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__, name, what]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | (environment or {}))
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(what: str) -> Row:
    rng = np.random.default_rng(0)
    prompt, *responses = (rng.integers(3, 2048, size).tolist() for size in (PROMPT, *[RESPONSE] * RESPONSES))
    if what == "one":
        return Row.from_groups([Group.from_lists(prompt, responses[:1], [])])
    (row,) = pack([Group.from_lists(prompt, responses, [])], BUDGET if what == "pieces" else None)
    return row


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def _measured(name: str, what: str) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = prepare_model(AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="flexdpo"))

    def step(row: Row) -> None:
        sums = response_logps(model, row).sums
        (sums * torch.linspace(0.1, 1, len(sums), dtype=sums.dtype)).sum().backward()
        model.zero_grad(set_to_none=True)

    step(Row.from_groups([Group.from_lists([1] * 50, [[2] * 9, [3] * 9])]))
    row = _row(what)
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.process_time()
    step(row)
    return {"bytes": _status("VmHWM") - before, "seconds": time.process_time() - began}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.stdout.write(json.dumps(_measured(*sys.argv[1:])) + "\n")
    else:
        for model_name in CONFIGS:
            told = []
            for peak, environment in (("memory", {}), ("alive", HANDED_BACK)):
                runs = {what: measure(model_name, what, environment) for what in ("one", "whole", "pieces")}
                one, whole, pieces = (run["bytes"] for run in runs.values())
                told.append(f"{peak} {pieces / one:.2f} of one response's, whole {whole / one:.2f}")
                if not environment:
                    told.append(f"time {runs['pieces']['seconds'] / runs['whole']['seconds']:.2f} of whole")
            sys.stdout.write(f"{model_name}: {'; '.join(told)}\n")
