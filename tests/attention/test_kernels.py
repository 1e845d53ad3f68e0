import numpy as np
import pytest
import torch

from flexdpo import FlexdpoError, Group, Row, RowLayout
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.oracle import dense_attention, dense_mask
from flexdpo.attention.row_mask import resolve_impl, row_mask_for
from tests.conftest import odd_groups, random_ids

KINDS = [
    CAUSAL,
    MaskKind("sliding", 6),
    MaskKind("chunked", 6),
    MaskKind("other", function=lambda b, h, q, kv: (q - kv) % 5 != 1),
]


def long_row(rng: np.random.Generator) -> Row:
    groups = [*odd_groups(rng), Group.from_lists(random_ids(rng, 700), [random_ids(rng, 90), random_ids(rng, 150)])]
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


@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
