"""How each known kernel that carries a state along the row is called, and how it is made to run along the trie.

Kernels go by the names under which transformers looks for them in other packages, whatever a model file calls its own
version: causal-conv1d, flash-linear-attention and mamba-ssm take the same arguments by name.

Shapes: ``B`` rows, ``S`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from flexdpo.errors import UnsupportedModelError
from flexdpo.layout.row_layout import RowLayout
from flexdpo.layout.scan_plan import ScanCost
from flexdpo.mixing.tree_scan import TreePlan, path_scan, plan_of_levels, plan_of_paths, tree_scan

Way = Literal["shared", "unfolded"]


@dataclass(frozen=True)
class ScanKernel:
    """What is known about the arguments of a scan."""

    positional: tuple[str, ...]  # names of those that come without one
    time: dict[str, int]  # the axis of the tokens in those that have one; rows come first
    result_axis: int  # that of the result
    fixed: frozenset[str]  # tensors that all tokens share
    initial_state: str = ""  # the argument for states to begin with; a kernel without one runs whole paths
    final_state: str = ""  # the switch for final states
    # whether a pair is returned without final states too
    always_pair: bool = False
    # what transformers' own kernel costs on a CPU with chunks of each length
    costs: tuple[ScanCost, ...] = (ScanCost(),)
    # arguments as they must be for padding of zeros to leave the state alone
    neutral: Callable[[dict[str, Any]], dict[str, Any]] = dict

    @property
    def way(self) -> Way:
        """``"shared"`` where every token runs once, ``"unfolded"`` where the paths to leaves are scanned whole."""
        return "shared" if self.initial_state else "unfolded"


def _steps_outside(arguments: dict[str, Any]) -> dict[str, Any]:
    """Make the step sizes of Mamba 2 before its kernel, which would make some of padding: bias, softplus, limits."""
    dt = arguments["dt"]
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if arguments.get("dt_bias") is not None:
        dt = dt + arguments["dt_bias"].to(dt.dtype)
    if arguments.get("dt_softplus"):
        dt = softplus(dt)
    low, high = arguments.get("dt_limit") or (0.0, float("inf"))
    changed = {"dt": dt.clamp(low, high), "dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}
    return {**arguments, **changed}


# Forward and backward in microseconds on one core, for four heads of 64 (Mamba 2: eight): what transformers' own
# kernels cost on a CPU with chunks of each length. Kernels for GPUs have their own lengths.
_DELTA_RULE_COSTS = (ScanCost(16, 34, 300, 2000), ScanCost(32, 38, 300, 2000), ScanCost(64, 49, 300, 2000))
_KDA_COSTS = (ScanCost(8, 190, 300, 5000), ScanCost(16, 170, 300, 9000), ScanCost(32, 350, 300, 12000))
_MAMBA2_COSTS = (ScanCost(32, 62, 0, 2400), ScanCost(64, 57, 0, 2400))
_MAMBA1_COSTS = (ScanCost(1, 650, 270, 2000),)
_CHUNK = "chunk_size"
# tokens that flash-linear-attention scans at once
GPU_CHUNK = 64

_DELTA_RULE = ScanKernel(
    positional=("query", "key", "value", "g", "beta"),
    time=dict.fromkeys(("query", "key", "value", "g", "beta"), 1),
    result_axis=1,
    fixed=frozenset(("A_log", "dt_bias")),
    initial_state="initial_state",
    final_state="output_final_state",
    always_pair=True,
    costs=_DELTA_RULE_COSTS,
)
SCANS = {
    "chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kda": replace(_DELTA_RULE, costs=_KDA_COSTS),
    "mamba_chunk_scan_combined": ScanKernel(
        positional=("hidden_states", "dt", "A", "B", "C", "chunk_size"),
        time=dict.fromkeys(("hidden_states", "dt", "B", "C", "z"), 1),
        result_axis=1,
        fixed=frozenset(("A", "D", "dt_bias")),
        initial_state="initial_states",
        final_state="return_final_states",
        neutral=_steps_outside,
        costs=_MAMBA2_COSTS,
    ),
    "selective_scan_fn": ScanKernel(
        positional=("hidden_states", "dt", "A", "B", "C"),
        time=dict.fromkeys(("hidden_states", "dt", "B", "C", "z"), -1),
        result_axis=-1,
        fixed=frozenset(("A", "D", "delta_bias")),
        final_state="return_last_state",
        costs=_MAMBA1_COSTS,
    ),
}
CONVOLUTION = "causal_conv1d_fn"
# the whole of a mixer in one kernel; one that returns nothing is asked for the parts
FUSED = frozenset(("mamba_inner_fn", "mamba_split_conv1d_scan_combined"))
# a single token after what a cache holds
STEPS = frozenset(
    ("causal_conv1d_update", "fused_recurrent_gated_delta_rule", "fused_recurrent_kda", "selective_state_update")
)
# what any of them takes, or takes amiss
_PACKED = frozenset(("seq_idx", "cu_seqlens"))
ARGUMENTS = _PACKED.union(*((*known.positional, *known.time, *known.fixed) for known in SCANS.values()))


def scan_along_trie(
    name: str, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], layout: RowLayout
) -> Any:
    """Run a call of the kernel that is known as ``name`` along the trie, and return what the call would.

    Raises ``UnsupportedModelError`` if the call asks for what cannot be had on a packed row.
    """
    known = SCANS[name]
    arguments = dict(zip(known.positional, args, strict=False)) | kwargs
    _require_understood(name, known, args, arguments, layout)
    arguments = known.neutral(arguments)
    inputs = {key: arguments[key].movedim(axis, 1) for key, axis in known.time.items() if _given(arguments, key)}

    plan = _plan(known, arguments, layout)
    if layout.device.type != "cuda" and known.initial_state:
        arguments[_CHUNK] = plan.chunk

    def scan(batch: dict[str, Tensor], begin: Tensor | None, wants_final: bool) -> tuple[Tensor, Tensor | None]:
        given = arguments | {key: values.movedim(1, known.time[key]) for key, values in batch.items()}
        if known.initial_state:
            given |= {known.initial_state: begin, known.final_state: wants_final}
        # in the places where they came
        first = [given.pop(key) for key in known.positional[: len(args)]]
        found = kernel(*first, **given)
        out, final = found if isinstance(found, tuple) else (found, None)
        return out.movedim(known.result_axis, 1), final

    out = (tree_scan if known.initial_state else path_scan)(scan, inputs, plan).movedim(1, known.result_axis)
    return (out, None) if known.always_pair else out


def _plan(known: ScanKernel, arguments: dict[str, Any], layout: RowLayout) -> TreePlan:
    if not known.initial_state:
        return plan_of_paths(layout, known.costs[0])
    if layout.device.type != "cuda":
        return plan_of_levels(layout, known.costs)
    return plan_of_levels(layout, (ScanCost(arguments.get(_CHUNK, GPU_CHUNK)),))


def _given(arguments: dict[str, Any], key: str) -> bool:
    return arguments.get(key) is not None


def _require_understood(
    name: str, known: ScanKernel, args: tuple[Any, ...], arguments: dict[str, Any], layout: RowLayout
) -> None:
    if len(args) > len(known.positional):
        raise UnsupportedModelError(
            f"{name} was called with {len(args)} arguments without names, and flexdpo knows {len(known.positional)}; "
            "train this model without flexdpo"
        )
    for key, value in arguments.items():
        stateful = key in (known.initial_state, known.final_state) and value is not None and value is not False
        foreign = isinstance(value, torch.Tensor) and key not in known.time and key not in known.fixed
        if stateful or foreign:
            raise UnsupportedModelError(
                f"{name} was called with {key}= on a packed row, which flexdpo does not know how to honour there; "
                "leave caches and packed-sequence arguments out, or train this model without flexdpo"
            )
        if key in known.time and value is not None:
            rows, tokens = value.shape[0], value.shape[known.time[key]]
            if (rows, tokens) != (layout.batch_size, layout.length):
                raise UnsupportedModelError(
                    f"{name} was called with {key} for {rows} rows of {tokens} tokens, but the layout is for "
                    f"{layout.batch_size} rows of {layout.length}; train this model without flexdpo"
                )
