"""A machine with a GPU may have torch, transformers and pytest and little else."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# no dependency of the kernels and the bench
MISSING = ("datasets", "trl", "hypothesis")


def run(tmp_path: Path, *words: str) -> str:
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_gpu_tests_are_found_without_them(tmp_path) -> None:
    found = run(tmp_path, "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:hypothesispytest")
    files = {line.split("::")[0] for line in found.splitlines() if "::" in line}
    # whoever makes a test for a GPU marks it so
    marked = {str(f.relative_to(ROOT)) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu\n" in f.read_text()}
    assert marked - {str(Path(__file__).relative_to(ROOT))} <= files
    assert "tests/attention/test_gpu.py" in files


def test_the_bench_runs_without_them(tmp_path) -> None:
    words = "--device cpu --profile tldr --scale 0.05 --model tiny --pairs 2 --batches 1 --rounds 1 --seconds 1"
    assert "speed-up" in run(tmp_path, "flexdpo", "bench", *words.split())
