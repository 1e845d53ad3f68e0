import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flexdpo import FlexdpoError, Group, Row
from flexdpo.attention import selftest
from flexdpo.attention.flex import run_flex
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.piecewise import piecewise_attention
from flexdpo.attention.row_mask import RowMask, row_mask_for
from flexdpo.attention.selftest import Shape, compare_kernel, require_correct_kernel
from flexdpo.attention.settings import KernelSettings, kernel_settings_as

SHAPES = [
    Shape(4, 2, 16, 16, torch.bfloat16),
    Shape(3, 1, 8, 8, torch.float32),
    Shape(2, 2, 16, 8, torch.float32),
]


def mask(kind: MaskKind = CAUSAL, impl: str = "sdpa") -> RowMask:
    groups = [Group.from_lists([1] * 90, [[2] * 60, [3] * 70]), Group.from_lists([4] * 50, [[5] * 20, [6] * 20, [7]])]
    return row_mask_for(Row.from_groups(groups, pad_to_multiple_of=128).layout, kind, impl)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [CAUSAL, MaskKind("sliding", 30)], ids=lambda kind: kind.name)
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True}], ids=str)
def test_a_right_kernel_passes(shape: Shape, kind: MaskKind, extras: dict) -> None:
    report = compare_kernel(shape, mask(kind), attend=piecewise_attention, **extras)
    assert [found.name for found in report.comparisons[:4]] == ["output", "dQ", "dK", "dV"]
    assert len(report.comparisons) == (5 if "sinks" in extras else 4)
    assert report.wrong == []
    # the budget is an error's size, not a value's
    assert all(found.budget < 0.2 for found in report.comparisons if found.name != "dSinks")


def test_the_compiled_forward_passes() -> None:
    with torch.no_grad():
        report = compare_kernel(SHAPES[0], mask(impl="flex"), grad=False, attend=run_flex)
    assert [found.name for found in report.comparisons] == ["output"]
    assert report.wrong == []


def without_gradient_in_a_tile(which: int):
    """A kernel that forgets a tile's share of one gradient."""

    def attend(*inputs, **options):
        tensors = list(inputs)
        lost = torch.zeros(tensors[which].shape[2], 1, dtype=torch.bool)
        lost[64:128] = True
        tensors[which] = torch.where(lost, tensors[which].detach(), tensors[which])
        return piecewise_attention(*tensors, **options)

    return attend


def leaking(query, key, value, row_mask, *rest):
    """A kernel that lets responses see each other."""
    whole = Row.from_groups([Group.from_lists([1] * (row_mask.layout.length - 1), [[2]], [])])
    return piecewise_attention(query, key, value, row_mask_for(whole.layout, CAUSAL, "sdpa"), *rest)


def not_a_number(*inputs):
    return piecewise_attention(*inputs) * torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        (without_gradient_in_a_tile(0), ["dQ"]),
        (without_gradient_in_a_tile(1), ["dK"]),
        (without_gradient_in_a_tile(2), ["dV"]),
        (leaking, ["output", "dQ", "dK", "dV"]),
        (not_a_number, ["output", "dQ", "dK", "dV"]),
    ],
    ids=["dQ", "dK", "dV", "leak", "nan"],
)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_wrong_kernel_is_found(shape: Shape, kernel, names: list[str]) -> None:
    report = compare_kernel(shape, mask(), attend=kernel)
    assert [found.name for found in report.wrong] == names


def heads(row_mask: RowMask) -> list[torch.Tensor]:
    length = row_mask.layout.length
    return [torch.randn(1, h, length, 16, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]


def test_flash_is_refused_with_the_figure_where_its_gradients_are_wrong() -> None:
    with kernel_settings_as(KernelSettings(kernel_options={"BACKEND": "FLASH"})):
        row_mask = mask()
        with pytest.raises(
            FlexdpoError,
            match=r"backend FLASH\) is wrong .*its dK is off by \d.*dense attention in torch.bfloat16 is off by \d.*"
            r"4 query heads, 2 key heads, head size 16, 384 tokens, mask 'causal'; leave BACKEND out",
        ):
            require_correct_kernel(*heads(row_mask), row_mask, None, None, None, attend=without_gradient_in_a_tile(1))


def test_a_kernel_is_compared_once_for_each_thing_it_is_compiled_for(monkeypatch) -> None:
    monkeypatch.setattr(selftest, "_passed", set())
    calls = []

    def counted(*inputs):
        calls.append(inputs)
        return piecewise_attention(*inputs)

    with kernel_settings_as(KernelSettings(kernel_options={"BACKEND": "FLASH"})):
        for kind in (CAUSAL, CAUSAL, MaskKind("sliding", 30), MaskKind("sliding", 31)):
            row_mask = mask(kind)
            require_correct_kernel(*heads(row_mask), row_mask, None, None, None, attend=counted)
        with torch.no_grad():
            require_correct_kernel(*heads(row_mask), row_mask, None, None, None, attend=counted)
    # causal, sliding with gradients, sliding without
    assert len(calls) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_can_be_compared_too(monkeypatch, reentrant: bool) -> None:
    monkeypatch.setattr(selftest, "_passed", set())

    def layer(query, key, value):
        require_correct_kernel(query, key, value, row_mask, None, None, None, attend=piecewise_attention)
        return piecewise_attention(query, key, value, row_mask, None, None, None)

    with kernel_settings_as(KernelSettings(kernel_options={"BACKEND": "FLASH"})):
        row_mask = mask()
        inputs = heads(row_mask)
        plain = piecewise_attention(*inputs, row_mask, None, None, None)
        want = torch.autograd.grad(plain.sum(), inputs)
        checkpoint(layer, *inputs, use_reentrant=reentrant).sum().backward()
    assert len(selftest._passed) == (2 if reentrant else 1)
    torch.testing.assert_close([x.grad for x in inputs], list(want))


def test_nothing_is_compared_on_a_cpu_unasked() -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    row_mask = mask()
    require_correct_kernel(*heads(row_mask), row_mask, None, None, None, attend=fail)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": "buckets"}, r"lengths must be one of .*'buckets'; did you mean 'bucket'"),
        ({"max_kernels": 0}, "max_kernels must be at least 1"),
        ({"kernel_options": {"BLOCKM": 64}}, r"kernel_options has no 'BLOCKM'; did you mean 'BLOCK_M"),
        ({"kernel_options": {"ROWS_GUARANTEED_SAFE": True}}, "packed rows do not keep"),
        ({"kernel_options": {"fwd_BLOCKS_ARE_CONTIGUOUS": True}}, "packed rows do not keep"),
        ({"kernel_options": {"BACKEND": "CUDNN"}}, r"BACKEND must be one of .*'CUDNN'"),
    ],
)
def test_wrong_settings_raise(settings: dict, message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        KernelSettings(**settings)


def test_other_backends_need_cuda() -> None:
    with kernel_settings_as(KernelSettings(kernel_options={"BACKEND": "TRITON"})):
        row_mask = mask(impl="flex")
        with torch.no_grad(), pytest.raises(FlexdpoError, match="BACKEND='TRITON' needs CUDA"):
            run_flex(*heads(row_mask), row_mask, None, None, None)
