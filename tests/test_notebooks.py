"""The notebooks run, are stored clean, and use nothing that a user may not."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flexdpo

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]

# public are `flexdpo` itself and these modules, as far as a name does not begin with an underscore
PUBLIC_MODULES = {"flexdpo", "flexdpo.cli"}
# what `pip install flexdpo[notebooks]` brings
DEPENDENCIES = {
    "IPython",
    "PIL",
    "datasets",
    "einops",
    "matplotlib",
    "numpy",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
}


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def code_of(notebook: dict[str, Any]) -> str:
    """All code of a notebook, without the lines that only IPython understands."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return re.sub(r"^%.*$", "", "\n\n".join(cells), flags=re.MULTILINE)


def private_uses(code: str) -> Iterator[str]:
    """Everything in some code that reaches past the public API."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if not is_public(alias.name, None))
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"from {module} import {a.name}" for a in node.names if not is_public(module, a.name))
        elif isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            yield f".{node.attr}"


def is_public(module: str, name: str | None) -> bool:
    """Whether ``from module import name``, or ``import module``, is open to everybody."""
    top = module.split(".", maxsplit=1)[0]
    if top != "flexdpo":
        return top in DEPENDENCIES or top in sys.stdlib_module_names
    if module not in PUBLIC_MODULES or name == "*":
        return False
    if module == "flexdpo":
        return name is None or name in flexdpo.__all__
    return name is None or (not name.startswith("_") and hasattr(importlib.import_module(module), name))


def test_there_are_seven_and_they_are_numbered() -> None:
    first = ["00_from_trl", "01_masks", "02_hf_attention", "03_training_step", "04_speed", "05_your_data"]
    assert [*first, "06_hybrids"] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        # ids with a meaning survive edits, so that differences stay readable
        assert re.fullmatch(r"[a-z][a-z0-9-]*", cell["id"]), cell["id"]
        assert cell["metadata"] == {}, cell["id"]
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), f"clear the output of {cell['id']}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_use_the_public_api_only(path: Path) -> None:
    assert list(private_uses(code_of(read(path)))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_prove_what_they_claim(path: Path) -> None:
    assert "assert_close" in code_of(read(path))


@pytest.mark.parametrize(
    "code",
    [
        "import flexdpo.attention._hidden",
        "from flexdpo import _register",
        "from flexdpo import nothing_of_that_name",
        "from flexdpo.show.mask_image import _draw_cells",
        "from flexdpo.show.mask_image import *",
        "from flexdpo.training.step import Runner",
        "from tests.conftest import build_model",
        "from . import neighbour",
        "import peft",
        "model._flexdpo_impl",
    ],
)
def test_the_rule_notices_what_is_not_public(code: str) -> None:
    assert len(list(private_uses(code))) == 1


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a copy from top to bottom in a folder of its own; any error in a cell fails."""
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(FOLDER / "results", tmp_path / "results")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    # three minutes is what a reader may wait for a whole notebook
    NotebookClient(
        notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is not None for cell in code)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs), "no figure"
