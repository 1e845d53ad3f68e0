"""What each way in brings along: the command line answers without what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "trl", "matplotlib")


def imported_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running ``code``."""
    report = f"\nimport sys\nprint('|', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + report], check=True, capture_output=True, text=True)
    return set(done.stdout.rpartition("|")[2].split())


def test_importing_the_package_brings_nothing_heavy() -> None:
    assert imported_by("import flexdpo, flexdpo.cli") == set()


def test_a_layout_needs_torch_alone() -> None:
    code = "import flexdpo\nflexdpo.Row.from_groups([flexdpo.Group.from_lists([1, 5], [[8, 2], [9]])])"
    assert imported_by(code) == {"torch"}


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_the_command_line_says_what_it_is_at_once(word: str) -> None:
    assert imported_by(f"from flexdpo.cli import main\nassert main([{word!r}]) == 0") == set()


def test_the_help_of_training_needs_no_models() -> None:
    code = "import sys\nfrom flexdpo.cli import main\nsys.argv = ['flexdpo', 'train', '--help']\nassert main() == 0"
    found = imported_by(f"{code}\nassert 'transformers.modeling_utils' not in sys.modules")
    assert "transformers" in found
    assert not found & {"peft", "trl", "datasets", "matplotlib"}


REGISTERED = (
    "import transformers.modeling_utils as m\nassert 'flexdpo' in m.ALL_ATTENTION_FUNCTIONS.valid_keys()\n"
    "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks\n"
    "assert 'flexdpo' in masks.valid_keys()"
)


# transformers' models bring the registration in behind them, whichever of our files asks for them first
FIRST = [
    "import flexdpo",
    "import transformers.modeling_utils\nimport flexdpo",
    "import flexdpo.hf.rules",
    "import flexdpo.hf.draws",
    "import flexdpo.hf.compilation",
]


# each in a process that holds torch and nothing of transformers; what fails names itself
EACH_IN_A_FORK = """
import json, os, sys, traceback
import torch
failed = []
for code in json.loads(sys.argv[1]):
    assert "transformers" not in sys.modules
    child = os.fork()
    if child == 0:
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(code)
print("|", json.dumps(failed))
"""


def test_the_attention_is_registered_whichever_is_imported_first() -> None:
    codes = json.dumps([f"{first}\n{REGISTERED}" for first in FIRST])
    done = subprocess.run([sys.executable, "-c", EACH_IN_A_FORK, codes], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.rpartition("|")[2]) == [], done.stderr


@pytest.mark.parametrize("module", ["flexdpo.hf.unwrap", "flexdpo.objective.objective"])
def test_a_module_may_be_the_first_that_imports_transformers(module: str) -> None:
    assert "transformers" in imported_by(f"import {module}")
