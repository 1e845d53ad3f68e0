"""The commands for the day a card is at hand, walked through on one that is pretended."""

import subprocess
import sys

import pytest

from flexdpo.bench.profiles import load_profiles
from tests.codegen.conftest import ROOT

pytestmark = pytest.mark.codegen
# rows whose scores a CPU would hold for minutes run the same lines as shorter ones
SHORT = "not 4096 and not 8192 and not 32768 and not many_steps and not first_row"
ON_A_CARD = "waits or waiting or every_length or no_multiple or mha or on_a_gpu or behind_the_head"


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_bench_measures_every_arm_on_every_profile() -> None:
    small = "--scale 0.05 --pairs 2 --rounds 1 --seconds 1"
    words = f"bench --device cuda --profile all --model llama-8b {small}"
    printed = run("tests.codegen.pretended_card", *words.split()).splitlines()
    firsts = [line.split()[0] for line in printed if line.split()]
    variants = ["padded", "padded_labels", "packed", "varlen", "shared"]
    assert [first for first in firsts if first != "one"] == [x for name in load_profiles() for x in (name, *variants)]
    kernels = [line.split(",")[2].split(":")[0].strip() for line in printed if line.strip().startswith("one layer")]
    assert kernels == ["varlen_attn", "flexdpo", "flexdpo", "varlen_attn"] * len(load_profiles())


def test_the_tests_for_a_gpu_pass() -> None:
    files = ("tests/attention/test_gpu.py", "tests/objective/test_gpu.py", "tests/dropin/test_share.py")
    plugin = ("-p", "tests.codegen.pretended_card", "-p", "no:cacheprovider")
    printed = run("pytest", "-q", "-m", "gpu", *plugin, "-k", f"({SHORT}) and ({ON_A_CARD})", *files)
    assert " passed" in printed
    assert "failed" not in printed
    assert "skipped" not in printed
