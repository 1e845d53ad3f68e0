"""README's table of rooms and CONTRIBUTING name what is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")


def named_in(text: str) -> list[str]:
    """What stands between backticks, code that is set apart left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_readme_has_every_room_in_the_order_of_imports() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("Imports point down this table only")[1]
    cells = [line.split("|")[1] for line in readme.split("\n\n")[1].splitlines()[2:]]
    rooms = [re.sub(r"/$|\.py$", "", name) for cell in cells for name in named_in(cell)]
    layers = runpy.run_path(str(ROOT / ".ci" / "import_directions.py"))["LAYERS"]
    assert rooms == [layer for layer in layers if layer not in ("errors", "__main__")]


def test_the_files_that_contributing_names_exist() -> None:
    files = {name for name in named_in(GUIDE) if re.fullmatch(r"[\w./]+(\.py|/)", name)}
    assert len(files) > 15
    assert [name for name in files if not (ROOT / name).exists() and not (ROOT / "flexdpo" / name).exists()] == []


def test_the_names_that_contributing_gives_stand_in_the_code() -> None:
    code = [path for folder in ("flexdpo", "tests", ".ci") for path in (ROOT / folder).rglob("*.py")]
    known = {word for path in code if path != Path(__file__) for word in re.findall(r"\w+", path.read_text("utf-8"))}
    assert {name for name in named_in(GUIDE) if name.isidentifier()} - known == set()
