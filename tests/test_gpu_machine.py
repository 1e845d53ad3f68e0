"""A machine with a GPU may have torch, transformers and pytest and little else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# no dependency of the kernels and the bench
MISSING = ("datasets", "trl", "hypothesis")
# both in one process, most of whose time goes into imports
BENCH_AND_COLLECT = """
import sys
import pytest
from flexdpo.cli import main
words = "--device cpu --profile tldr --scale 0.05 --model tiny --pairs 2 --batches 1 --rounds 1 --seconds 1"
code = main(["bench", *words.split()])
print("bench ended with", code)
sys.exit(pytest.main(["-q", "-m", "gpu", "--collect-only", "-p", "no:hypothesispytest"]))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("missing")
    for name in MISSING:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')")
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BENCH_AND_COLLECT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_gpu_tests_are_found_without_them(printed: str) -> None:
    files = {line.split("::")[0] for line in printed.splitlines() if "::" in line}
    # whoever makes a test for a GPU marks it so
    marked = {str(f.relative_to(ROOT)) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu\n" in f.read_text()}
    assert marked - {str(Path(__file__).relative_to(ROOT))} <= files
    assert "tests/attention/test_gpu.py" in files


def test_the_bench_runs_without_them(printed: str) -> None:
    assert "bench ended with 0" in printed
    assert "speed-up" in printed
