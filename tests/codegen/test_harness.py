import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.codegen.versions import TRIED, refusal

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("build", ["", "+cpu"])
def test_the_pairs_that_were_tried_are_taken(build: str) -> None:
    for torch_version, triton_version in TRIED.items():
        assert refusal(torch_version + build, triton_version) is None


@pytest.mark.parametrize(
    ("torch_version", "triton_version"), [("2.99.0+cpu", "3.7.1"), ("2.13.0+cpu", "9.9.9"), ("2.13.0+cu130", "3.7.1")]
)
def test_other_versions_are_refused_in_one_line(torch_version: str, triton_version: str) -> None:
    said = refusal(torch_version, triton_version)
    assert said is not None
    assert "\n" not in said
    assert f"not on torch {torch_version} with triton {triton_version}; README says how" in said


def test_the_extra_readme_and_the_tests_name_the_same_pair() -> None:
    ((torch_version, triton_version),) = TRIED.items()
    assert f'codegen = ["triton=={triton_version}"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"the CPU build of torch {torch_version} " in readme
    assert f"pip install --no-deps triton=={triton_version} && pytest -m codegen" in readme


@pytest.mark.codegen
def test_elsewhere_the_marker_stops_with_that_line_alone(tmp_path: Path) -> None:
    # another triton, found before the installed one
    (tmp_path / "triton-9.9.9.dist-info").mkdir()
    (tmp_path / "triton-9.9.9.dist-info" / "METADATA").write_text("Name: triton\nVersion: 9.9.9\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "codegen", "tests/codegen/test_kernels.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR")]
    assert "with triton 9.9.9; README says how to install that pair" in line
