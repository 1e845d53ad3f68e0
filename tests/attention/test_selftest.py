import re

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flexdpo import FlexdpoError, Group, Row
from flexdpo.attention import flash, selftest
from flexdpo.attention import row_mask as row_mask_module
from flexdpo.attention.blockwise import blockwise_attention
from flexdpo.attention.flash import FlashCall
from flexdpo.attention.flex import run_flex
from flexdpo.attention.inputs import AttentionCall, AttentionInputs, Shape
from flexdpo.attention.mask_mods import CAUSAL, MaskKind
from flexdpo.attention.row_mask import RowMask, row_mask_for
from flexdpo.attention.selftest import compare_kernel, require_correct_kernel
from flexdpo.attention.settings import KernelSettings, kernel_settings_as

SHAPES = [
    Shape(4, 2, 16, 16, torch.bfloat16),
    Shape(3, 1, 8, 8, torch.float32),
    Shape(2, 2, 16, 8, torch.float32),
]


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Kernels are compared on a CPU as they are on CUDA; what passed before is forgotten."""
    monkeypatch.setattr(selftest, "_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(selftest, "_passed", set())


def mask(kind: MaskKind = CAUSAL, impl: str = "sdpa") -> RowMask:
    groups = [Group.from_lists([1] * 90, [[2] * 60, [3] * 70]), Group.from_lists([4] * 50, [[5] * 20, [6] * 20, [7]])]
    return row_mask_for(Row.from_groups(groups, pad_to_multiple_of=128).layout, kind, impl)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [CAUSAL, MaskKind("sliding", 30)], ids=lambda kind: kind.name)
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True}], ids=str)
def test_a_right_kernel_passes(shape: Shape, kind: MaskKind, extras: dict) -> None:
    report = compare_kernel(AttentionCall(shape, **extras), mask(kind), attend=blockwise_attention)
    assert [found.name for found in report.comparisons[:4]] == ["output", "dQ", "dK", "dV"]
    assert len(report.comparisons) == (5 if "sinks" in extras else 4)
    assert report.wrong == []
    # the budget is an error's size, not a value's
    assert all(found.budget < 0.2 for found in report.comparisons if found.name != "dSinks")


def test_the_compiled_forward_passes() -> None:
    with torch.no_grad():
        report = compare_kernel(AttentionCall(SHAPES[0]), mask(impl="flex"), grad=False, attend=run_flex)
    assert [found.name for found in report.comparisons] == ["output"]
    assert report.wrong == []


def without_gradient_in_a_tile(which: int):
    """A kernel that forgets a tile's share of one gradient."""

    def attend(inputs, row_mask):
        fields = list(inputs)
        lost = torch.zeros(fields[which].shape[2], 1, dtype=torch.bool)
        lost[64:128] = True
        fields[which] = torch.where(lost, fields[which].detach(), fields[which])
        return blockwise_attention(AttentionInputs(*fields), row_mask)

    return attend


def leaking(inputs, row_mask):
    """A kernel that lets responses see each other."""
    whole = Row.from_groups([Group.from_lists([1] * (row_mask.layout.length - 1), [[2]], [])])
    return blockwise_attention(inputs, row_mask_for(whole.layout, CAUSAL, "sdpa"))


def not_a_number(inputs, row_mask):
    return blockwise_attention(inputs, row_mask) * torch.tensor(float("nan"))


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
    report = compare_kernel(AttentionCall(shape), mask(), attend=kernel)
    assert [found.name for found in report.wrong] == names


def heads(row_mask: RowMask) -> AttentionInputs:
    length = row_mask.layout.length
    return AttentionInputs(
        *[torch.randn(1, h, length, 16, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]
    )


def wrong_in_keys_and_values(inputs, row_mask):
    """A kernel whose output and dQ are right."""
    value = inputs.value
    last = torch.arange(value.shape[2])[:, None] == value.shape[2] - 1
    wrong = inputs._replace(value=torch.where(last, 2 * value.detach() - value, value))
    return without_gradient_in_a_tile(1)(wrong, row_mask)


@pytest.mark.parametrize("backend", ["FLASH", "AUTO"])
def test_a_complaint_gives_every_figure_and_every_suspect(on_a_cpu, backend: str) -> None:
    options = {} if backend == "AUTO" else {"BACKEND": backend}
    with kernel_settings_as(KernelSettings(kernel_options=options)):
        row_mask = mask(impl="flex")
        with pytest.raises(FlexdpoError) as raised:
            require_correct_kernel(heads(row_mask), row_mask, attend=wrong_in_keys_and_values)
    figure = r"\d\.\d\de[+-]\d\d"
    each = rf"by {figure} \(dense attention in torch.bfloat16: {figure}, allowed: {figure}\)"
    assert re.search(
        rf"backend {backend}\) and dense attention disagree under the mask 'causal' of this row: dK {each}, dV {each}, "
        r"at 4 query heads, 2 key heads, head sizes 16 and 16, 384 tokens\. Either the kernel is wrong here \(cpu, "
        rf"torch {re.escape(torch.__version__)}\) or flexdpo's own mask is; nothing was trained\. "
        + ("Use another torch, or attn_impl='sdpa'" if backend == "AUTO" else "Leave BACKEND out"),
        str(raised.value),
    )


def test_a_kernel_is_compared_once_for_each_thing_it_is_compiled_for(on_a_cpu) -> None:
    calls = []

    def counted(inputs, row_mask):
        calls.append(inputs)
        return blockwise_attention(inputs, row_mask)

    for kind in (CAUSAL, CAUSAL, MaskKind("sliding", 30), MaskKind("sliding", 31)):
        row_mask = mask(kind, "flex")
        require_correct_kernel(heads(row_mask), row_mask, attend=counted)
    with torch.no_grad():
        require_correct_kernel(heads(row_mask), row_mask, attend=counted)
    # causal, sliding with gradients, sliding without
    assert len(calls) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_can_be_compared_too(on_a_cpu, reentrant: bool) -> None:

    def layer(query, key, value):
        inputs = AttentionInputs(query, key, value)
        require_correct_kernel(inputs, row_mask, attend=blockwise_attention)
        return blockwise_attention(inputs, row_mask)

    row_mask = mask(impl="flex")
    inputs = heads(row_mask)[:3]
    plain = blockwise_attention(AttentionInputs(*inputs), row_mask)
    want = torch.autograd.grad(plain.sum(), inputs)
    checkpoint(layer, *inputs, use_reentrant=reentrant).sum().backward()
    assert len(selftest._passed) == (2 if reentrant else 1)
    torch.testing.assert_close([x.grad for x in inputs], list(want))


def test_nothing_is_compared_on_a_cpu_unasked() -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    row_mask = mask(impl="flex")
    require_correct_kernel(heads(row_mask), row_mask, attend=fail)


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
            run_flex(heads(row_mask), row_mask)


# --- what is compared, and where it is drawn --------------------------------------------------------------------------


class HostCopies(TorchDispatchMode):
    """Counts the tensors that are made on the host while kernels are compared on a pretended device."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "rand" in str(func):
            self.drawn.append((kwargs or {}).get("generator"))
        return result


def test_inputs_are_drawn_where_the_kernel_runs(monkeypatch) -> None:
    made = []
    generator = torch.Generator

    def recorded(device=None):
        made.append(device)
        return generator(device="cpu")

    monkeypatch.setattr(torch, "Generator", recorded)
    row_mask = mask()
    with HostCopies() as copies:
        compare_kernel(AttentionCall(SHAPES[1]), row_mask, attend=blockwise_attention)
    assert made == [row_mask.layout.device]
    assert len(copies.drawn) == 4
    assert None not in copies.drawn


@pytest.mark.parametrize("kernel", [(0, "dQ"), (1, "dK"), (2, "dV")], ids=str)
def test_a_long_row_is_compared_at_queries_of_every_tile(monkeypatch, kernel: tuple[int, str]) -> None:
    monkeypatch.setattr(selftest, "COMPARED_QUERIES", 24)
    row_mask = mask()
    queries = selftest._compared_queries(row_mask.layout)
    assert len(queries) <= 24
    # 8 of each tile of 128
    assert torch.bincount(queries // 128).tolist() == [8, 8, 8]
    assert compare_kernel(AttentionCall(SHAPES[1], sinks=True), row_mask, attend=blockwise_attention).wrong == []
    which, name = kernel
    report = compare_kernel(AttentionCall(SHAPES[1]), row_mask, attend=without_gradient_in_a_tile(which))
    assert [found.name for found in report.wrong] == [name]
    assert compare_kernel(AttentionCall(SHAPES[1]), row_mask, attend=not_a_number).wrong != []

    def infinite_elsewhere(inputs, row_mask):
        output = blockwise_attention(inputs, row_mask)
        place = next(k for k in range(output.shape[2]) if k not in queries)
        return output.index_fill(2, torch.tensor([place]), float("inf"))

    assert compare_kernel(AttentionCall(SHAPES[1]), row_mask, attend=infinite_elsewhere).wrong[0].name == "output"


# --- FlashAttention-4 -------------------------------------------------------------------------------------------------

FLASH_CALL = FlashCall(128, 128, torch.bfloat16, False, True)


@pytest.mark.parametrize(
    ("change", "capability", "installed", "reason"),
    [
        ({}, (9, 0), "4.0.0b26", None),
        ({}, (10, 0), "4.0.0b36", None),
        ({"sinks": True, "grad": False}, (9, 0), "4.0.0", None),
        ({}, (9, 0), None, r"not installed \(pip install --pre 'flash-attn-4>=4.0.0b26'\)"),
        ({}, (9, 0), "4.0.0b25", "4.0.0b25 has a backward that now and then reads .* install 4.0.0b26 or later"),
        ({}, (10, 0), "4.0.0b5", "install 4.0.0b26 or later"),
        ({}, (8, 0), "4.0.0b36", "no backward under a BlockMask for compute capability 8.0"),
        ({}, (12, 0), "4.0.0b36", "compute capability 12.0"),
        ({"dtype": torch.float32}, (9, 0), "4.0.0b36", "and this model in torch.float32"),
        ({"head_dim": 192}, (9, 0), "4.0.0b36", "this model's head size is 192"),
        ({"head_dim": 256, "value_dim": 256}, (9, 0), "4.0.0b36", "this model's head size is 256"),
        ({"head_dim": 100}, (10, 0), "4.0.0b36", "head sizes that 8 divides, and this model's are 100 and 128"),
        ({"sinks": True}, (10, 0), "4.0.0b36", "no gradient of the log-sum-exp"),
    ],
)
def test_flash_is_refused_with_the_reason(change: dict, capability, installed: str | None, reason: str | None) -> None:
    version = None if installed is None else Version(installed)
    found = flash.flash_refusal(FLASH_CALL._replace(**change), capability, version)
    assert found is None if reason is None else re.search(reason, found)


def test_flash_is_asked_before_it_is_compared(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "installed_flash", lambda: Version("4.0.0b25"))
    with pytest.raises(FlexdpoError, match=r"BACKEND='FLASH': flash-attn-4 4.0.0b25 .*; leave BACKEND out"):
        flash.require_flash(FLASH_CALL, torch.device("cuda"))


@pytest.mark.parametrize(("capability", "size"), [((9, 0), (128, 128)), ((10, 0), (256, 128)), ((11, 0), (256, 128))])
def test_flash_has_blocks_of_its_own(monkeypatch, capability, size: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    with kernel_settings_as(KernelSettings(kernel_options={"BACKEND": "FLASH"})):
        assert row_mask_module._block_size("flex", cuda) == size
        assert row_mask_module._block_size("sdpa", cuda) == 128
        assert row_mask_module._block_size("flex", torch.device("cpu")) == 128
    assert row_mask_module._block_size("flex", cuda) == 128
