"""Runs the selected cases of each module in child processes, two at a time, and hands every test its own outcome.

A test module of this folder says ``SUITE = Suite(module of the cases, interpret)`` and parametrises its tests by
``case``; each of them takes the fixture ``outcome``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.codegen.versions import refusal

ROOT = Path(__file__).parents[2]


class Suite(NamedTuple):
    """Cases that share a process.

    Attributes:
        module: Where ``CASES`` is; see :mod:`tests.codegen.child`.
        interpret: Whether triton interprets kernels or compiles them.
        card: Which of :mod:`tests.codegen.fake_card` they are for; a test's parameter ``card`` comes before it.
    """

    module: str
    interpret: bool
    card: str = "H100"


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker("codegen") for item in session.items) and (why := refusal()):
        raise pytest.UsageError(why)


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Suite, Future[dict[str, Any]]]:
    """All suites with a selected test, each by one child."""
    selected: dict[Suite, dict[str, None]] = {}
    for item in request.session.items:
        if "outcome" in getattr(item, "fixturenames", ()):
            selected.setdefault(_suite_of(item), {})[item.callspec.params["case"]] = None  # type: ignore[attr-defined]
    pool = ThreadPoolExecutor(2)
    return {
        suite: pool.submit(run_suite, suite, list(names), tmp_path_factory.mktemp("codegen"))
        for suite, names in selected.items()
    }


def _suite_of(item: Any) -> Suite:
    suite: Suite = item.module.SUITE
    return suite._replace(card=item.callspec.params.get("card", suite.card))


def run_suite(suite: Suite, names: list[str], folder: Path) -> dict[str, Any]:
    """Run cases in a child: by name the lines that it wrote."""
    out = folder / "outcomes.jsonl"
    settings = {
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1" if suite.interpret else "0",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    command = [sys.executable, "-m", "tests.codegen.child", suite.module, suite.card, str(out), *names]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    found = {line["case"]: line for line in map(json.loads, lines)}
    died = {"error": f"its process ended with {done.returncode} before this case was done:\n{done.stderr[-4000:]}"}
    return {name: found.get(name, died) for name in names}


@pytest.fixture
def outcome(request: pytest.FixtureRequest, outcomes: dict[Suite, Future[dict[str, Any]]]) -> Any:
    """What the case of this test returned in its child."""
    line = outcomes[_suite_of(request.node)].result()[request.node.callspec.params["case"]]
    if "error" in line:
        pytest.fail(line["error"], pytrace=False)
    return line["result"]
