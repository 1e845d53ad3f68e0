"""Training memory grows with a row's length, not with its square."""

import subprocess
import sys

import pytest

ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BEGIN = """
import ctypes, pathlib, re, torch
from transformers import LlamaConfig, LlamaForCausalLM
from flexdpo import Group, Row, prepare_model, response_logps
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.attention.row_mask import row_mask_for

def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1)) / 1024

def grown(run):
    # forget the largest resident size so far, and give back what is free
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS")
    run()
    return megabytes("VmHWM") - before
"""

# the whole step of a tiny model on a row of 64k tokens, in documents of a thousand
STEP = """
model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, vocab_size=16))
prepare_model(model)
def row(documents):
    return Row.from_groups([Group.from_lists([1] * 512, [[2] * 256, [3] * 256]) for _ in range(documents)])
def step(documents):
    with torch.no_grad():
        response_logps(model, row(documents))
    response_logps(model, row(documents)).sums.sum().backward()
step(1)
print(grown(lambda: step(64)))
"""

# one attention layer on a single long document, four times as long the second time
LAYER = """
def run(length):
    mask = row_mask_for(Row.from_groups([Group.from_lists([1] * (length - 2), [[2], [3]])]).layout, CAUSAL)
    heads = [torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3)]
    packed_attention(*heads, mask, softcap={softcap}).sum().backward()
run(1024)
print(grown(lambda: run(2048)), grown(lambda: run(8192)))
"""


def printed(script: str) -> list[float]:
    run = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, check=True)
    return [float(word) for word in run.stdout.split()]


@pytest.fixture(scope="module")
def both() -> list[float]:
    """Of the step and of the layer, in one process, most of whose time goes into imports."""
    return printed(STEP + LAYER.format(softcap=None))


@ONLY_LINUX
def test_a_step_on_64k_tokens_holds_no_square_matrix(both: list[float]) -> None:
    megabytes = both[0]
    # a byte for every pair of 64k tokens would be 4 GB
    assert megabytes < 400


@ONLY_LINUX
@pytest.mark.parametrize("softcap", [None, pytest.param(2.0, marks=pytest.mark.slow)])
def test_one_long_document_takes_memory_linear_in_its_length(both: list[float], softcap: float | None) -> None:
    shorter, longer = both[1:] if softcap is None else printed(LAYER.format(softcap=softcap))
    # the scores that autograd would keep are several times 8k x 8k float32, 268 MB each
    assert longer < 250
    # linear would be 4 times, quadratic 16 times
    assert longer < 8 * shorter + 32
