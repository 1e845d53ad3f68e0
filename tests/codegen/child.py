"""Runs cases in a process of its own: ``python -m tests.codegen.child MODULE CARD OUT CASE...``.

The harness replaces parts of torch for a whole process, and triton chooses between interpreter and compiler when it is
imported. Start-up costs more than most cases, so one process runs all cases of a module:
``CASES``, a function of the :class:`~tests.codegen.as_if_cuda.Recording` for each name. ``OUT`` gets one JSON object a
line: ``{"case": ..., "result": ...}`` or ``{"case": ..., "error": traceback}``.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path

from tests.codegen import as_if_cuda, fake_card


def main() -> None:
    module_name, card, out, *names = sys.argv[1:]
    warnings.filterwarnings("ignore", message=".*force_disable_caches.*")
    module = import_module(module_name)
    recording = as_if_cuda.install(getattr(fake_card, card))
    with Path(out).open("a", encoding="utf-8") as sink:
        for name in names:
            start = time.process_time()
            try:
                line = {"case": name, "result": module.CASES[name](recording)}
            except Exception:
                line = {"case": name, "error": traceback.format_exc()}
            print(json.dumps(line | {"cpu_seconds": round(time.process_time() - start, 1)}), file=sink, flush=True)


if __name__ == "__main__":
    main()
