from __future__ import annotations

import importlib
import inspect
from functools import partial
from typing import Any

import pytest
import torch

from flexdpo import Row, UnsupportedModelError
from flexdpo.layout.row import RowLayout
from flexdpo.layout.scan_plan import ScanCost
from flexdpo.mixing.kernels import SCANS, scan_along_trie
from flexdpo.mixing.tree_scan import Scan, path_scan, plan_of_levels, plan_of_paths, tree_scan
from tests.hf.architectures import needs_states
from tests.layout.test_segments import parents_by_definition, random_layouts

Inputs = dict[str, torch.Tensor]


def step(state: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A state that zeros leave as it is, and that depends on the order of what it saw."""
    return state + torch.sin(state) * k * v + k


def scan(inputs: Inputs, begin: torch.Tensor | None, final: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    state = torch.zeros_like(inputs["k"][:, 0]) if begin is None else begin
    outputs = []
    for k, v in zip(inputs["k"].unbind(1), inputs["v"].unbind(1), strict=True):
        state = step(state, k, v)
        outputs.append(state * (1 + v))
    return torch.stack(outputs, dim=1), state if final else None


def scan_by_definition(inputs: Inputs, layout: RowLayout) -> torch.Tensor:
    """Each token from the state of the token before it on its path."""
    k, v = inputs["k"].flatten(0, 1), inputs["v"].flatten(0, 1)
    parents = parents_by_definition(layout)
    states: list[torch.Tensor] = []
    outputs = []
    for token, parent in enumerate(parents):
        real = token % layout.length < layout.num_tokens[token // layout.length]
        states.append(step(states[parent] if parent >= 0 else torch.zeros_like(k[0]), k[token], v[token]))
        outputs.append(states[token] * (1 + v[token]) * real)
    return torch.stack(outputs).unflatten(0, inputs["k"].shape[:2])


def along_levels(run: Scan, inputs: Inputs, layout: RowLayout, chunk: int = 1) -> torch.Tensor:
    return tree_scan(run, inputs, plan_of_levels(layout, [ScanCost(chunk)]))


def along_paths(run: Scan, inputs: Inputs, layout: RowLayout) -> torch.Tensor:
    return path_scan(run, inputs, plan_of_paths(layout))


@pytest.mark.parametrize("layout", random_layouts()[::4])
@pytest.mark.parametrize(
    "along", [along_levels, partial(along_levels, chunk=2), partial(along_levels, chunk=3), along_paths]
)
def test_values_and_gradients_are_those_of_the_definition(layout: RowLayout, along: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (layout.batch_size, layout.length, 2)
    k, v = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = {"k": k, "v": v}
    got, want = along(scan, inputs, layout), scan_by_definition(inputs, layout)
    torch.testing.assert_close(got, want)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    for g, w in zip(*(torch.autograd.grad((weights * out).sum(), [k, v]) for out in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


def test_every_token_is_scanned_once() -> None:
    """Three responses on one prompt, two of which begin alike: places with something in them are the row's tokens."""
    row = Row.from_sequences([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7], [1, 2, 3]], pad_to_multiple_of=16)
    scanned = 0

    def counting(inputs: Inputs, begin: torch.Tensor | None, final: bool) -> Any:
        nonlocal scanned
        scanned += int(inputs["k"].ne(0).sum())
        return scan(inputs, begin, final)

    ones = torch.ones(1, 16, 1)
    along_levels(counting, {"k": ones, "v": ones}, row.layout)
    assert scanned == row.num_tokens == 7
    along_paths(counting, {"k": ones, "v": ones}, row.layout)
    assert scanned == 7 + 5 + 5 + 3


# --- calls of kernels ------------------------------------------------------------------------------------------------


def call(name: str, **kwargs: Any) -> Any:
    """A call of a kernel that returns its result for the row of two documents."""
    known, layout = SCANS[name], Row.from_sequences([[1, 2, 3], [1, 2, 4]]).layout
    shape = [1, 4, 4]
    given = {"chunk_size": 64} | {each: torch.ones(shape if each in known.time else 4) for each in known.fixed}
    args = [given.get(each, torch.ones(shape)) for each in known.positional]

    def kernel(*given: Any, **named: Any) -> Any:
        out = given[0]
        wants = named.get(known.final_state)
        return (out, torch.zeros(len(out), 1) if wants else None) if known.always_pair or wants else out

    return scan_along_trie(name, kernel, tuple(args), kwargs, layout)


@pytest.mark.parametrize("name", SCANS)
def test_a_call_returns_what_the_kernel_would(name: str) -> None:
    out = call(name)
    if SCANS[name].always_pair:
        out, state = out
        assert state is None
    assert out.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4])}, "called with cu_seqlens="),
        ({"something_new": torch.ones(1, 4)}, "called with something_new="),
        ({"initial_state": torch.ones(1)}, "called with initial_state="),
        ({"output_final_state": True}, "called with output_final_state="),
        ({"beta": torch.ones(1, 5, 4)}, "with beta for 1 rows of 5 tokens, but the layout is for 1 rows of 4"),
    ],
)
def test_what_a_packed_row_cannot_honour_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        call("chunk_gated_delta_rule", **kwargs)


def test_too_many_arguments_without_names() -> None:
    args = (torch.ones(1, 4, 4),) * 7
    with pytest.raises(UnsupportedModelError, match="7 arguments without names, and flexdpo knows 5"):
        scan_along_trie("chunk_kda", lambda: None, args, {}, Row.from_sequences([[1, 2, 3, 4]]).layout)


# arguments of fla-core 0.6 and mamba-ssm 2.3, which run in place of transformers' own where they are installed; nobody
# ran them here, since they need a CUDA device
PACKAGES = {
    "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens",
    "chunk_kda": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens",
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus "
    "dt_limit return_final_states return_varlen_states",
    "selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
}


@pytest.mark.parametrize("name", SCANS)
def test_the_packages_take_the_same_arguments(name: str) -> None:
    """As many without names in the same order, and what is passed by name under the same one."""
    known, arguments = SCANS[name], PACKAGES[name].split()
    assert len(known.positional) <= len(arguments)
    by_name = {known.initial_state, known.final_state, *known.time, *known.fixed} - {"", *known.positional}
    # where a gate is made inside of the kernel
    assert by_name - set(arguments) <= {"A_log", "dt_bias"}


@needs_states
def test_the_installed_transformers_takes_them_too() -> None:
    for model, name, own in (
        ("qwen3_next", "chunk_gated_delta_rule", "torch_chunk_gated_delta_rule"),
        ("kimi_linear", "chunk_kda", "chunk_kimi_delta_attention"),
        ("granitemoehybrid", "mamba_chunk_scan_combined", "mamba2_chunk_scan"),
        ("mamba", "selective_scan_fn", "mamba_selective_scan"),
    ):
        file = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        assert tuple(inspect.signature(getattr(file, own)).parameters)[: len(SCANS[name].positional)] == (
            SCANS[name].positional
        )
