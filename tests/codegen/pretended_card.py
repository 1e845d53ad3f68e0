"""A CUDA card that is pretended, so that code which asks for one is walked through line by line without any.

Tensors are the CPU's; which of them the card would hold is kept beside them, and they say so when asked for their
device. What stops on a card stops here too: operands on both sides, ``numpy()`` of what the card holds, and, where
``torch.cuda.set_sync_debug_mode("error")`` was called, whatever waits for the card. Attention kernels are replaced by
their definitions, after a look at what the kernels take on trust. Nothing of CUDA itself runs.

Two ways in::

    python -m pytest -p tests.codegen.pretended_card -m gpu      # the tests for a GPU
    python -m tests.codegen.pretended_card bench --device cuda   # flexdpo's command line
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, BlockMask, create_mask
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from flexdpo.attention import flex

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# operators whose result the host needs before it can go on
_WAITS = {"item", "tolist", "cpu", "nonzero", "unique", "masked_select", "equal", "bincount"}
_WAITS |= {"__bool__", "__int__", "__float__", "__index__"}
# they take tensors of both sides
_MOVES = {"to", "cuda", "cpu", "copy_", "__getitem__", "__setitem__", "__get__", "__set__"}
_MOVES |= {"_has_compatible_shallow_copy_type"}


def on_card(tensor: Tensor) -> bool:
    """Whether the card would hold it, asked where no mode answers for its device.

    Gradients and what else comes from C++ carry no label, and nearly all of them are the card's.
    """
    return tensor.device.type == "cpu" and not getattr(tensor, "_stays_on_host", False)


class PretendedCard(TorchFunctionMode):
    """Runs every function of torch on the CPU, and remembers which side its result is on.

    Attributes:
        stop_at_waits: Whether what waits for the card is an error.
        in_use: Whether it was ever entered.
    """

    stop_at_waits = False
    in_use = False

    def __enter__(self) -> PretendedCard:
        self.in_use = True
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if name == "__get__" and (place := _place(func.__self__.__name__, args[0])) is not None:
            return place
        if name == "cuda":
            func, name, args = torch.Tensor.to, "to", (args[0], CUDA)
        if name == "get_device":
            return 0 if on_card(args[0]) else -1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sides = [on_card(tensor) for tensor in tensors]
        target = _named_device(name, args, kwargs)
        self._refuse(name, tensors, sides, target, kwargs.get("non_blocking", False), args)
        if name == "pin_memory":
            return args[0]
        args, kwargs = tree_map(_without_cuda, (args, kwargs))
        result = _addmm(*args, **kwargs) if "out_dtype" in kwargs else func(*args, **kwargs)
        if name == "__set__" and func.__self__.__name__ == "data":
            args[0]._stays_on_host = not on_card(args[1])
        host = target == "cpu" if target else not any(sides)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not any(leaf is tensor for tensor in tensors):
                leaf._stays_on_host = host  # type: ignore[attr-defined]
        # a tensor that is there already is returned as it is, and would change its side
        if name in ("to", "cuda", "cpu") and target and result is args[0] and on_card(result) == host:
            result = result.alias() if hasattr(result, "alias") else result.view_as(result)
            result._stays_on_host = host
        return result

    def _refuse(
        self, name: str, tensors: list[Tensor], sides: list[bool], target: str | None, non_blocking: bool, args: Any
    ) -> None:
        if name == "numpy" and any(sides):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "pin_memory" and any(sides):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor', only dense CPU tensors can be pinned")
        operands = [side for side, tensor in zip(sides, tensors, strict=True) if side or tensor.ndim]
        if name not in _MOVES and len(set(operands)) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        if not self.stop_at_waits:
            return
        waits = name in _WAITS and any(sides)
        if name in ("to", "cuda", "copy_") and not non_blocking:
            waits |= len({*sides, *([target == "cuda"] if target else [])}) > 1
        waits |= name in ("tensor", "as_tensor") and target == "cuda"
        waits |= name == "__getitem__" and any(t.dtype == torch.bool for t in tensors[1:])
        if waits:
            raise RuntimeError(f"{name}: called a synchronizing CUDA operation")


def _place(attribute: str, tensor: Tensor) -> Any:
    """What a tensor answers when asked for its device; ``None`` where it is asked for something else."""
    answers = {"device": (CUDA, tensor.device), "is_cuda": (True, False), "is_cpu": (False, tensor.device == CPU)}
    return answers[attribute][0 if on_card(tensor) else 1] if attribute in answers else None


def _named_device(name: str, args: Any, kwargs: Any) -> str | None:
    """The kind of device that a call names."""
    if name in ("cuda", "cpu"):
        return name
    named = [kwargs.get("device")]
    if name == "to":
        named += args[1:]
    for value in named:
        if isinstance(value, torch.device | str):
            return torch.device(value).type
        if isinstance(value, Tensor):
            return "cuda" if on_card(value) else "cpu"
    return None


def _without_cuda(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return CPU if leaf.type == "cuda" else leaf
    return leaf.replace("cuda:0", "cpu").replace("cuda", "cpu") if isinstance(leaf, str) else leaf


def _addmm(
    added: Tensor, left: Tensor, right: Tensor, *, out: Tensor, out_dtype: torch.dtype, **factors: Any
) -> Tensor:
    """Halves multiplied into float32, which CUDA alone does, under its conditions (``_addmm_dtype_out_cuda``)."""
    halves = (torch.float16, torch.bfloat16)
    assert left.dtype == right.dtype
    assert out_dtype == left.dtype or (out_dtype == torch.float32 and left.dtype in halves)
    assert out.dtype == out_dtype
    assert added.dtype in (out_dtype, left.dtype)
    return torch.addmm(added.to(out_dtype), left.to(out_dtype), right.to(out_dtype), out=out, **factors)


# --- attention kernels by their definitions --------------------------------------------------------------------------


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_mask: BlockMask,
    scale: float | None,
    score_mod: Callable[..., Tensor] | None,
    enable_gqa: bool,
    kernel_options: dict[str, Any] | None,
    return_aux: Any = None,
) -> Any:
    """``torch.nn.attention.flex_attention`` by its definition, in float32."""
    with torch._C.DisableTorchFunction():
        assert query.dtype == key.dtype == value.dtype
        assert enable_gqa is (query.shape[1] != key.shape[1])
        for each in (query, key, value):
            assert on_card(each)
            assert each.stride(-1) == 1
            assert 0 not in each.stride()
        for name in BlockMask._TENSOR_ATTRS:
            tensor = getattr(block_mask, name)
            if tensor is None:
                continue
            assert on_card(tensor), name
            assert tensor.dtype == torch.int32, name
            assert tensor.is_contiguous(), name
        batch, heads, length, head_dim = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        groups = heads // key.shape[1]
        many = [x.to(wide).repeat_interleave(groups, dim=1) for x in (key, value)]
        scores = query.to(wide) @ many[0].transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
        if score_mod is not None:
            scores = score_mod(scores, None, None, None, None)
        allowed = create_mask(block_mask.mask_mod, batch, 1, length, length, "cpu")
        scores = scores.masked_fill(~allowed, float("-inf"))
        output = (scores.softmax(-1) @ many[1]).to(query.dtype)
        return output if return_aux is None else (output, AuxOutput(lse=scores.logsumexp(-1)))


def varlen_attn(*args: Any, **options: Any) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn`` by its definition."""
    from tests.attention.test_varlen import definition

    # torch 2.11 takes fewer key heads without being told
    options.setdefault("enable_gqa", args[0].shape[1] != args[1].shape[1])
    with torch._C.DisableTorchFunction():
        assert all(on_card(x) for x in args if isinstance(x, Tensor))
        return definition(*args, **options)


# --- installing ------------------------------------------------------------------------------------------------------


def install(card: PretendedCard) -> None:
    """Answer for a card from now on, in this process; tensors say that they lie on it under ``with card``."""

    def say(stop: str) -> None:
        card.stop_at_waits = stop == "error"

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "pretended card",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_allocated": lambda device=None: 1000,
        "max_memory_allocated": lambda device=None: 5000,
        "set_sync_debug_mode": say,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _bound(getattr(torch.cuda, name), answer))
    torch.Generator = _HostGenerator  # type: ignore[misc]
    torch.from_numpy = lambda array, _made=torch.from_numpy: _labelled(_made(array))
    _autocast_like_cpu()
    _backward_under(card)
    _label_parameters()
    flex._compile = lambda kernel_key: flex_attention
    original = torch.nn.attention.varlen.varlen_attn
    torch.nn.attention.varlen.varlen_attn = _bound(original, varlen_attn)


def _bound(original: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """The answer, to calls that torch's own function would take."""
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return answer(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


class _HostGenerator(torch.Generator):
    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls, "cpu")


def _labelled(tensor: Tensor) -> Tensor:
    tensor._stays_on_host = True  # type: ignore[attr-defined]
    return tensor


def _backward_under(card: PretendedCard) -> None:
    """Run backward functions under the card, which has stepped aside for the call that starts them."""
    run = torch.autograd._engine_run_backward

    def run_under(*args: Any, **kwargs: Any) -> Any:
        if card.in_use and card not in torch.overrides._get_current_function_mode_stack():
            with card:
                return run(*args, **kwargs)
        return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_under


def _label_parameters() -> None:
    """A parameter is on the side of its data; and a checkpoint's look at devices, from inside of C++, sees the CPU."""
    made = torch.nn.Parameter.__new__

    def labelled(cls: Any, data: Tensor | None = None, requires_grad: bool = True) -> Any:
        parameter = made(cls, data, requires_grad)
        parameter._stays_on_host = getattr(data, "_stays_on_host", False)
        return parameter

    torch.nn.Parameter.__new__ = labelled  # type: ignore[method-assign, assignment]
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    checks["default"] = lambda x: {"shape": x.shape, "dtype": x.dtype}


def _autocast_like_cpu() -> None:
    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(_without_cuda(device_type), *args, **kwargs)

    torch.autocast = Autocast  # type: ignore[misc]
    for home, name in (
        (torch, "is_autocast_enabled"),
        (torch, "get_autocast_dtype"),
        (torch.amp, "is_autocast_available"),
    ):
        asked = getattr(home, name)
        setattr(home, name, lambda *args, _asked=asked: _asked(*map(_without_cuda, args)))


# --- the two ways in -------------------------------------------------------------------------------------------------

_card = PretendedCard()


def pytest_configure() -> None:
    install(_card)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    with _card:
        return (yield)


def main() -> int:
    from flexdpo.cli import main as flexdpo
    from flexdpo.estimate import model_shapes

    # under its name, since names decide on settings
    for name in ("llama-8b", "llama-1b"):
        model_shapes.SHAPES[name] = (64, 96, 2, 8, 2, 16, 384, name == "llama-1b", "llama")
    install(_card)
    with _card:
        return flexdpo(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
