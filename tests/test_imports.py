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
    "import transformers.modeling_utils\nimport flexdpo",
    "import flexdpo.hf.rules",
    "import flexdpo.hf.draws",
    "import flexdpo.hf.compilation",
]


NO_TRL = """
import sys
sys.modules["trl"] = None
import flexdpo
assert "flexdpo.trl" not in sys.modules
"""
USED = """
assert callable(flexdpo.share_prefixes)
assert callable(flexdpo.trl.enable)
"""


# each in a process that holds nothing of transformers, but from the second on all that it imports: that takes longer
EACH_IN_A_FORK = """
import gc, importlib, json, os, sys, traceback
import torch
gc.disable()
failed, loaded = [], None
for code in json.loads(sys.argv[1]):
    assert not {"transformers", "flexdpo"} & sys.modules.keys()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        ours = ("transformers", "flexdpo", "trl")
        others = [name for name in sys.modules if name.partition(".")[0] not in ours]
        with os.fdopen(writer, "w") as pipe:
            json.dump(others, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        others = pipe.read()
    if os.waitpid(child, 0)[1] != 0:
        failed.append(code)
    elif loaded is None:
        loaded = [importlib.import_module(name) for name in json.loads(others)]
print("|", json.dumps(failed))
"""


def test_any_module_may_be_the_first_that_imports_transformers() -> None:
    """The attention is registered whichever it is, and none of them needs trl."""
    alone = [
        f"import sys, {name}\nassert 'transformers' in sys.modules"
        for name in ("flexdpo.hf.unwrap", "flexdpo.objective.objective")
    ]
    codes = json.dumps([*(f"{first}\n{REGISTERED}" for first in FIRST), f"{NO_TRL}{REGISTERED}{USED}", *alone])
    done = subprocess.run([sys.executable, "-c", EACH_IN_A_FORK, codes], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.rpartition("|")[2]) == [], done.stderr
