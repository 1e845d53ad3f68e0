import numpy as np
import pytest
import torch

from flexdpo import FlexdpoError, Group, Row, RowLayout
from flexdpo.attention import kernels
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import resolve_impl, row_mask_for
from tests.conftest import odd_groups, random_ids
from tests.oracle import dense_attention, dense_mask

KINDS = [
    CAUSAL,
    MaskKind("sliding", 6),
    MaskKind("chunked", 6),
    MaskKind("other", function=lambda b, h, q, kv: (q - kv) % 5 != 1),
]


def long_row(rng: np.random.Generator) -> Row:
    """Longer than one block of queries."""
    groups = [*odd_groups(rng), Group.from_lists(random_ids(rng, 300), [random_ids(rng, 90), random_ids(rng, 150)])]
    return Row.from_groups(groups, pad_to_multiple_of=64)


def heads(row: Row, query_heads: int, key_heads: int, value_dim: int = 8, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(1)
    shape = [(query_heads, 8), (key_heads, 8), (key_heads, value_dim)]
    return [
        torch.randn(1, h, row.layout.length, d, generator=generator, dtype=dtype).requires_grad_(grad) for h, d in shape
    ]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("query_heads", "key_heads", "value_dim"), [(4, 4, 8), (6, 2, 8), (4, 1, 5)])
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks", "both"])
def test_chunks_equal_the_dense_definition(rng, kind, query_heads, key_heads, value_dim, extras) -> None:
    row = long_row(rng)
    inputs = heads(row, query_heads, key_heads, value_dim)
    sinks = torch.linspace(-1, 2, query_heads, dtype=torch.float64).requires_grad_()
    options = {"scaling": 0.3}
    options |= {"softcap": 2.0} if extras in ("softcap", "both") else {}
    options |= {"sinks": sinks} if extras in ("sinks", "both") else {}
    leaves = [*inputs, sinks] if "sinks" in options else inputs

    row_mask = row_mask_for(row.layout, kind, "sdpa")
    got = packed_attention(*inputs, row_mask, **options)
    mask = dense_mask(row_mask.block_mask.mask_mod, 1, row.layout.length)
    want = dense_attention(*inputs, mask, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    direction = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(2))
    for mine, theirs in zip(
        torch.autograd.grad((got * direction).sum(), leaves),
        torch.autograd.grad((want * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


# which tiles a mask leaves has no part in how a dtype is computed; windows run compiled in test_recompiles
@pytest.mark.parametrize(
    ("kind", "dtype"), [(CAUSAL, torch.float32), (KINDS[2], torch.float32), (CAUSAL, torch.bfloat16)], ids=str
)
def test_compiled_flex_attention_forward_on_a_cpu(rng, kind, dtype) -> None:
    row = long_row(rng)
    inputs = heads(row, 4, 2, dtype=torch.float32, grad=False)
    row_mask = row_mask_for(row.layout, kind, "flex")
    with torch.no_grad():
        got = packed_attention(*(x.to(dtype) for x in inputs), row_mask)
        mask = dense_mask(row_mask.block_mask.mask_mod, 1, row.layout.length)
        exact = dense_attention(*(x.double() for x in inputs), mask)
        plain = dense_attention(*(x.to(dtype) for x in inputs), mask)
    # at most the plain version's own rounding in this dtype, and a band for another order of summation
    assert (got.double() - exact).abs().max() <= 1.5 * (plain.double() - exact).abs().max() + 1e-6


def test_rows_of_a_batch_are_attended_separately(rng) -> None:
    first, second = (Row.from_groups(odd_groups(rng), pad_to_multiple_of=256) for _ in range(2))
    layout = RowLayout(
        torch.cat([first.position_ids, second.position_ids]),
        torch.cat([first.subtree_end, second.subtree_end]),
        (first.num_tokens, second.num_tokens),
    )
    inputs = [torch.cat([a, 2 * a]) for a in heads(first, 4, 2, grad=False)]
    both = packed_attention(*inputs, row_mask_for(layout, CAUSAL))
    for number, row in enumerate((first, second)):
        alone = packed_attention(*(x[number : number + 1] for x in inputs), row_mask_for(row.layout, CAUSAL))
        torch.testing.assert_close(both[number : number + 1], alone)


def test_masks_are_built_once_per_kind_and_kernel(rng) -> None:
    layout = Row.from_groups(odd_groups(rng)).layout
    assert row_mask_for(layout, CAUSAL) is row_mask_for(layout, CAUSAL)
    assert row_mask_for(layout, CAUSAL) is not row_mask_for(layout, MaskKind("sliding", 3))
    assert row_mask_for(layout, MaskKind("sliding", 3)) is row_mask_for(layout, MaskKind("sliding", 3))


def test_a_long_document_does_not_keep_its_chunk_masks() -> None:
    row = Row.from_groups([Group.from_lists([1] * 6000, [[2], [3]])])
    row_mask = row_mask_for(row.layout, CAUSAL, "sdpa")
    inputs = heads(row, 1, 1, dtype=torch.float32)
    got = packed_attention(*inputs, row_mask)
    assert row_mask.biases == {}
    want = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    # the last token is the second response and does not see the first
    torch.testing.assert_close(got[:, :, :-1], want[:, :, :-1], rtol=1e-4, atol=1e-5)


def test_wrong_choices_raise(rng) -> None:
    row = Row.from_groups(odd_groups(rng))
    flex = row_mask_for(row.layout, CAUSAL, "flex")
    with pytest.raises(FlexdpoError, match="impl='flex' has no backward on a CPU; use impl='sdpa'"):
        packed_attention(*heads(row, 2, 2, dtype=torch.float32), flex)
    with pytest.raises(FlexdpoError, match="no float64 kernel on a CPU"):
        packed_attention(*heads(row, 2, 2, grad=False), flex)
    with pytest.raises(FlexdpoError, match="log-sum-exp that attention sinks need"):
        packed_attention(*heads(row, 2, 2, dtype=torch.float32, grad=False), flex, sinks=torch.zeros(2))
    with pytest.raises(FlexdpoError, match=r"impl must be one of .*'felx'; did you mean 'flex'"):
        resolve_impl("felx", torch.device("cpu"))
    short = [x[:, :, 1:] for x in heads(row, 2, 2)]
    with pytest.raises(FlexdpoError, match=r"1 rows of \d+ tokens, but attention received 1 rows of \d+"):
        packed_attention(*short, row_mask_for(row.layout, CAUSAL))


def test_auto_trains_everywhere() -> None:
    assert resolve_impl("auto", torch.device("cpu")) == "sdpa"
    assert resolve_impl("auto", torch.device("cuda")) == "flex"


# --- what a kernel takes on trust ------------------------------------------------------------------------------------

STRIDES = {
    "token by token": lambda heads, length: wide(2, length, heads, 8).transpose(1, 2),
    "cut out of one projection": lambda heads, length: wide(2, length, heads, 24)[..., 8:16].transpose(1, 2),
    "head size apart": lambda heads, length: wide(2, heads, 8, length).transpose(2, 3),
    "every other value": lambda heads, length: wide(2, heads, length, 16)[..., ::2],
    "one head for all": lambda heads, length: wide(2, 1, length, 8).expand(2, heads, length, 8),
    "one row for all": lambda heads, length: wide(1, heads, length, 8).expand(2, heads, length, 8),
    "one value for all": lambda heads, length: wide(2, heads, length, 1).expand(2, heads, length, 8),
    "in another order": lambda heads, length: wide(length, 2, 8, heads).permute(1, 3, 0, 2),
}
GRADIENTS = {
    "dense": lambda output: wide(*output.shape),
    "expanded": lambda output: wide(()).expand(output.shape),
    "head size apart": lambda output: wide(*output.transpose(2, 3).shape).transpose(2, 3),
}


def wide(*size) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_give_the_same_attention_and_gradients(strides: str, gradient: str, softcap: float | None) -> None:
    torch.manual_seed(0)
    responses = [[2] * 9 + [3] * 6, [2] * 9 + [4] * 5, [5] * 7]
    groups = [Group.from_lists([1] * 20, responses), Group.from_lists([4], [[5], [6]])]
    layout = RowLayout.stack([Row.from_groups(part).layout for part in (groups, groups[:1])])
    row_mask = row_mask_for(layout, CAUSAL, "sdpa")
    mask = dense_mask(row_mask.block_mask.mask_mod, 2, layout.length)
    inputs = [STRIDES[strides](heads, layout.length).requires_grad_() for heads in (4, 2, 2)]
    sinks = wide(8)[::2].requires_grad_()
    got = packed_attention(*inputs, row_mask, softcap=softcap, sinks=sinks)
    want = dense_attention(*inputs, mask, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    direction = GRADIENTS[gradient](want)
    found, wanted = (torch.autograd.grad(output, [*inputs, sinks], direction) for output in (got, want))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_flex_attention_gets_its_inputs_dense_at_the_last_size(monkeypatch) -> None:
    layout = Row.from_groups([Group.from_lists([1] * 20, [[2] * 9, [5] * 7])]).layout
    row_mask = row_mask_for(RowLayout.stack([layout, layout]), CAUSAL, "flex")
    seen = []
    monkeypatch.setattr(kernels, "run_flex", lambda inputs, _: seen.append(inputs[:3]) or inputs.query)
    for strides in STRIDES.values():
        inputs = [strides(heads, layout.length) for heads in (4, 2, 2)]
        packed_attention(*inputs, row_mask)
        for given, taken in zip(inputs, seen.pop(), strict=True):
            torch.testing.assert_close(taken, given, rtol=0, atol=0)
            assert taken.stride(-1) == 1
            assert 0 not in taken.stride()
            # what a model's projections leave is taken as it is
            assert taken is given or given.stride(-1) != 1 or 0 in given.stride()


def test_without_values_shapes_and_dtypes_are_those_of_attention(rng) -> None:
    row = long_row(rng)
    found = []
    for device in ("cpu", "meta"):
        row_mask = row_mask_for(row.to(device).layout, CAUSAL)
        inputs = [x.detach().to(device).requires_grad_() for x in heads(row, 6, 2, 5, torch.bfloat16)]
        got = packed_attention(*inputs, row_mask)
        found.append([(x.shape, x.dtype) for x in (got, *torch.autograd.grad(got, inputs, torch.ones_like(got)))])
    assert found[1] == found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :, 1:], v), r"1 rows of 36 tokens, but attention received 1 rows of 35"),
        (lambda q, k, v: (q, k, torch.cat([v, v])), r"1 rows of 36 tokens, but attention received 2 rows of 36"),
        (lambda q, k, v: (q[:, :3], k, v), r"Hkv a divisor of Hq, got \[1, 3, 36, 8\], \[1, 2, 36, 8\]"),
        (lambda q, k, v: (q, k, v[:, :1]), r"Hkv a divisor of Hq, got"),
        (lambda q, k, v: (q, k[..., :4], v), r"Hkv a divisor of Hq, got"),
    ],
)
@pytest.mark.parametrize("impl", ["flex", "sdpa"])
def test_shapes_that_no_kernel_checks(change, message: str, impl: str) -> None:
    layout = Row.from_groups([Group.from_lists([1] * 20, [[2] * 9, [5] * 7])]).layout
    inputs = [torch.randn(1, heads, layout.length, 8) for heads in (4, 2, 2)]
    with torch.no_grad(), pytest.raises(FlexdpoError, match=message):
        packed_attention(*change(*inputs), row_mask_for(layout, CAUSAL, impl))  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(FlexdpoError, match=r"one logit for each of 4 query heads, got \[1\]"):
        packed_attention(*inputs, row_mask_for(layout, CAUSAL, impl), sinks=torch.zeros(1))  # type: ignore[arg-type]
