"""Attention leaf by leaf, with torch's kernel replaced by its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import flexdpo
from flexdpo import FlexdpoError, Group, Row, RowLayout
from flexdpo.attention import torch_varlen, varlen
from flexdpo.attention.flex import kernel_key_of
from flexdpo.attention.inputs import AttentionCall, Shape
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import RowMask, row_mask_for
from flexdpo.attention.selftest import compare_kernel
from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from flexdpo.attention.varlen import plan_for, varlen_attention
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.hf.compilation import compile_decoder_layers
from tests.conftest import build_model, odd_groups
from tests.oracle import dense_attention, dense_mask


def definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` computes, and what it wants to be handed."""
    assert return_aux is None
    assert enable_gqa is (query.shape[1] != key.shape[1])
    for each in (query, key, value):
        assert each.ndim == 3
        assert each.is_contiguous()
    for starts, longest, tokens in ((cu_seq_q, max_q, query), (cu_seq_k, max_k, key)):
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        assert (int(starts[0]), int(starts[-1])) == (0, tokens.shape[0])
        assert type(longest) is int
        assert longest == int(starts.diff().max())
        assert int(starts.diff().min()) > 0
    left, right = window_size
    groups, outputs = query.shape[1] // key.shape[1], []
    for q_start, q_stop, k_start, k_stop in zip(
        *(x.tolist() for x in (cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:])), strict=True
    ):
        q = query[q_start:q_stop].transpose(0, 1)
        k, v = (x[k_start:k_stop].transpose(0, 1).repeat_interleave(groups, dim=0) for x in (key, value))
        scores = q @ k.transpose(1, 2) * (scale if scale is not None else q.shape[-1] ** -0.5)
        behind = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
        hidden = (behind > right) if right >= 0 else torch.zeros_like(behind, dtype=torch.bool)
        hidden |= (behind < -left) if left >= 0 else False
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).contiguous()


def replace_varlen_attn(monkeypatch: pytest.MonkeyPatch, *, self_attention: bool = False) -> list[str]:
    """Put the definition in the place of torch's kernel, which needs a GPU; returns the calls' kinds as they come."""
    seen: list[str] = []

    def replacement(*args: Any, enable_gqa: bool = False, **options: Any) -> torch.Tensor:
        query, key, value, query_starts, key_starts, *longest = args
        # torch 2.15 may run one tensor given twice by cuDNN, which aligns queries and keys at their beginnings
        assert (query_starts is key_starts) is self_attention
        seen.append("self-attention" if self_attention else "fewer queries")
        return definition(query, key, value, query_starts, key_starts, *longest, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", replacement)
    monkeypatch.setattr(varlen, "require_flash", lambda query: None)
    monkeypatch.setattr(torch_varlen, "require_flash", lambda query: None)
    return seen


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_varlen_attn(monkeypatch)


def deep_row(seed: int) -> Row:
    """Documents whose sequences are drawn from two words, so that branches part again and again."""
    rng = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return rng.integers(1, 3, rng.integers(1, most)).tolist()

    groups = [Group.from_lists(ids(6), [ids(9) for _ in range(rng.integers(1, 8))], []) for _ in range(5)]
    # a document of one token
    groups.insert(2, Group.from_lists([1], [[2]], []))
    return Row.from_groups(groups, pad_to_multiple_of=int(rng.integers(1, 20)))


def deepest(row: Row) -> int:
    """The most branchings on one root path."""
    parents = {int(p): 0 for p in row.predictors}
    for parent in row.predictors.tolist():
        parents[parent] += 1
    return max(sum(parents.get(int(token), 0) > 1 for token in path) for path in row.response_paths)


def heads(layout: RowLayout, query_heads: int, key_heads: int, dtype: torch.dtype = torch.float64, dim: int = 8):
    generator = torch.Generator().manual_seed(1)
    shape = (layout.batch_size, layout.length)
    drawn = [torch.randn(*shape, h, dim, generator=generator) for h in (query_heads, key_heads, key_heads)]
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in drawn]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("kind", [CAUSAL, *(MaskKind("sliding", size) for size in (1, 2, 5))], ids=str)
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (6, 2)])
def test_values_and_gradients_equal_the_dense_definition(kind: MaskKind, query_heads: int, key_heads: int) -> None:
    depth = 0
    for seed in range(6):
        rows = [deep_row(3 * seed + number) for number in range(1 + seed % 3)]
        depth = max(depth, *(deepest(row) for row in rows))
        layout = RowLayout.stack([row.layout for row in rows])
        inputs = heads(layout, query_heads, key_heads)
        row_mask = row_mask_for(layout, kind, "varlen")
        got = packed_attention(*inputs, row_mask, scaling=0.3)
        mask = dense_mask(row_mask.block_mask.mask_mod, layout.batch_size, layout.length)
        want = dense_attention(*inputs, mask, scaling=0.3)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        direction = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(2))
        mine, theirs = (torch.autograd.grad((x * direction).sum(), inputs) for x in (got, want))
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert depth >= 3


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [CAUSAL, MaskKind("sliding", 30)], ids=lambda kind: kind.name)
def test_the_self_tests_comparison_passes_and_finds_a_leak(dtype: torch.dtype, kind: MaskKind, monkeypatch) -> None:
    # a prompt that sixteen responses share: its gradients are sums of seventeen
    groups = [Group.from_lists([1] * 90, [[2 + k] * 9 for k in range(16)], []), *odd_groups(np.random.default_rng(0))]
    row_mask = row_mask_for(Row.from_groups(groups, pad_to_multiple_of=128).layout, kind, "varlen")
    shape = Shape(4, 2, 16, 16, dtype)
    assert compare_kernel(AttentionCall(shape), row_mask, attend=varlen_attention).wrong == []

    def from_the_beginning(*args: Any, scale: Any = None, window_size: Any = None, enable_gqa: Any = None) -> Any:
        """Causal from the first key on, as cuDNN aligns."""
        query, key, value, query_starts, key_starts, longest, _ = args
        sizes = query_starts.diff().tolist()
        first = [
            torch.cat([part[:size] for part, size in zip(x.split(key_starts.diff().tolist()), sizes, strict=True)])
            for x in (key, value)
        ]
        bounds = (query_starts, query_starts.clone(), longest, longest)
        return definition(query, *first, *bounds, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", from_the_beginning)
    wrong = compare_kernel(AttentionCall(shape), row_mask, attend=varlen_attention).wrong
    assert {"output", "dQ", "dK", "dV"} == {found.name for found in wrong}


@pytest.mark.usefixtures("on_a_cpu")
def test_torch_2_11_takes_no_enable_gqa(monkeypatch) -> None:
    layout = deep_row(0).layout
    inputs = heads(layout, 4, 2)
    want = packed_attention(*inputs, row_mask_for(layout, CAUSAL, "varlen"))

    def of_2_11(*args: Any, return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1)) -> torch.Tensor:
        return definition(*args, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_2_11)
    torch.testing.assert_close(packed_attention(*inputs, row_mask_for(layout, CAUSAL, "varlen")), want)


def test_a_plan_by_hand() -> None:
    first = Group.from_lists([1, 2, 3], [[4, 5], [6, 7, 8]])
    # the second response begins with the first's tokens and goes on, the third parts from it
    second = Group.from_lists([1], [[4, 5], [4, 5, 6], [4, 9]], [])
    row = Row.from_groups([first, second], pad_to_multiple_of=16)
    plan = plan_for(row.layout)
    assert plan.counts == (13,)
    # prompt and first response are one run; then the other response
    assert plan.sequences.query_starts.tolist() == [0, 5, 8, 12, 13]
    assert plan.sequences.key_starts.tolist() == [0, 5, 11, 15, 18]
    assert plan.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 8, 9, 12]
    assert plan.sequences[2:] == (5, 6)
    assert plan_for(row.layout) is plan


def test_keys_are_the_tokens_of_the_ordinary_run(rng) -> None:
    groups = [Group.from_lists(rng.integers(3, 90, 40).tolist(), [[k] * 7 for k in range(5)], []) for _ in range(20)]
    row = Row.from_groups(groups)
    assert plan_for(row.layout).keys.numel() == row.unshared_tokens


@pytest.mark.usefixtures("on_a_cpu")
def test_tokens_that_see_only_themselves_get_their_values() -> None:
    layout = RowLayout(torch.zeros(2, 4, dtype=torch.int64), torch.arange(1, 5).expand(2, 4), (1, 0))
    inputs = heads(layout, 4, 2)
    got = packed_attention(*inputs, row_mask_for(layout, CAUSAL, "varlen"))
    torch.testing.assert_close(got, inputs[2].repeat_interleave(2, dim=1))
    (to_value,) = torch.autograd.grad(got.sum(), inputs[2])
    torch.testing.assert_close(to_value, torch.full_like(to_value, 2))


def test_a_layout_that_was_moved_is_planned_where_it_came_from() -> None:
    layout = deep_row(0).layout
    moved = layout.to("meta")
    assert moved.on_host() is layout
    assert moved.without_masks().on_host() is layout
    # on the device itself the numbers could not be read
    plan = plan_for(moved)
    assert plan.counts == plan_for(layout).counts
    assert plan.keys.device.type == plan.sequences.query_starts.device.type == "meta"


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(("name", "how"), [("llama", "plain"), ("mistral", "checkpointed"), ("llama", "compiled")])
def test_a_model_gives_the_same_log_probabilities_and_gradients(name: str, how: str) -> None:
    row = Row.from_groups(odd_groups(np.random.default_rng(3)), pad_to_multiple_of=32)

    def run(impl: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = flexdpo.prepare_model(build_model(name), impl=impl).train()
        if how == "checkpointed":
            enable_checkpointing(model)
        if how == "compiled" and impl == "varlen":
            compile_decoder_layers(model, backend="eager")
        sums = flexdpo.response_logps(model, row).sums
        sums.cos().sum().backward()
        return sums.detach(), [parameter.grad for parameter in model.parameters()]

    torch.testing.assert_close(run("varlen"), run("sdpa"), rtol=1e-9, atol=1e-10)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "dtype", "dim", "message"),
    [
        (CAUSAL, {"softcap": 30.0}, torch.bfloat16, 8, r"bounds its attention scores \(softcap 30\)"),
        (CAUSAL, {"sinks": torch.zeros(2)}, torch.bfloat16, 8, "its attention has sinks"),
        (MaskKind("chunked", 6), {}, torch.bfloat16, 8, r"not causal or a sliding window \(in chunks of 6 positions\)"),
        (MaskKind("other", function=lambda b, h, q, kv: kv <= q), {}, torch.bfloat16, 8, "a function of its own"),
        (CAUSAL, {}, torch.bfloat16, 8, "is FlashAttention on a GPU, and this model is on cpu"),
    ],
)
def test_refusals_give_the_reason(kind: MaskKind, options: dict, dtype, dim: int, message: str) -> None:
    layout = deep_row(0).layout
    with pytest.raises(FlexdpoError, match=rf"impl='varlen' .*{message}.*; use impl='flex'"):
        packed_attention(*heads(layout, 2, 2, dtype, dim), row_mask_for(layout, kind, "varlen"), **options)


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        (torch.float32, 64, r"needs bfloat16 or float16 \(weights or autocast\), got torch.float32"),
        (torch.float64, 64, "got torch.float64"),
        (torch.bfloat16, 20, "at most 256 that is a multiple of 8, got 20"),
        (torch.float16, 288, "got 288"),
    ],
)
def test_what_flash_attention_does_not_run_is_refused(dtype: torch.dtype, dim: int, message: str) -> None:
    query = torch.empty(1, 2, 3, dim, dtype=dtype, device="meta")
    on_a_gpu = type("Query", (), {"device": torch.device("cuda"), "dtype": query.dtype, "shape": query.shape})()
    with pytest.raises(FlexdpoError, match=message):
        torch_varlen.require_flash(on_a_gpu)


def test_values_of_another_size_are_refused() -> None:
    layout = deep_row(0).layout
    query, key, _ = heads(layout, 2, 2, torch.bfloat16)
    value = heads(layout, 2, 2, torch.bfloat16, 4)[2]
    with pytest.raises(FlexdpoError, match="head size 8 and its values 4"):
        packed_attention(query, key, value, row_mask_for(layout, CAUSAL, "varlen"))


@pytest.mark.usefixtures("on_a_cpu")
def test_a_window_over_positions_that_jump_is_refused() -> None:
    layout = RowLayout(torch.tensor([[0, 1, 5, 6]]), torch.tensor([[4, 4, 4, 4]]), (4,))
    inputs = heads(layout, 2, 2)
    packed_attention(*inputs, row_mask_for(layout, CAUSAL, "varlen"))
    with pytest.raises(FlexdpoError, match="position_ids of this row do not rise by one"):
        packed_attention(*inputs, row_mask_for(layout, MaskKind("sliding", 3), "varlen"))


# --- the self-test's bookkeeping -------------------------------------------------------------------------------------


def test_one_comparison_serves_rows_of_every_length() -> None:
    def key_of(length: int, impl: str) -> Any:
        row = Row.from_groups([Group.from_lists([1] * length, [[2]], [])])
        row_mask: RowMask = row_mask_for(row.layout, CAUSAL, impl)  # type: ignore[arg-type]
        return kernel_key_of(AttentionCall(Shape(2, 2, 8, 8, torch.float32)), row_mask, "cpu", grad=True)

    with kernel_settings_as(KernelSettings(lengths="bucket")):
        assert key_of(20, "varlen") == key_of(30, "varlen")
        assert key_of(20, "flex") != key_of(30, "flex")
