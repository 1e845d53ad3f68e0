"""Asks a model which of its modules draw random numbers: two tokens run, and the generators' states are compared."""

from __future__ import annotations

import contextlib
import random
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flexdpo.errors import UnsupportedModelError, first_line

# a second pass over the same two tokens may differ by what parallel sums round, never by this share of the result
_SAME = 1e-4
_SAME_HALF = 1e-2
# token ids that are special in no configuration known
_TOKENS = (11, 12)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of the generators that every module may draw from: torch's on each device, numpy's and Python's.

    Reading them waits for no device.
    """

    devices: dict[str, Tensor]
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """Read them."""
        return cls(
            {name: read() for name, read, _ in _device_generators()},
            np.random.get_state(legacy=False),  # noqa: NPY002
            random.getstate(),
        )

    def restore(self) -> None:
        """Put them back."""
        for name, _, write in _device_generators():
            if name in self.devices:
                write(self.devices[name])
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def differs(self, other: RandomState) -> bool:
        """Whether any of them was drawn from in between."""
        return self.devices_differ(other) or self.hosts_differ(other)

    def devices_differ(self, other: RandomState) -> bool:
        """Whether one of torch's was."""
        return self.devices.keys() != other.devices.keys() or any(
            not torch.equal(state, other.devices[name]) for name, state in self.devices.items()
        )

    def hosts_differ(self, other: RandomState) -> bool:
        """Whether numpy's or Python's was."""
        mine, others = self.numpy["state"], other.numpy["state"]
        same = mine["pos"] == others["pos"] and self.numpy["gauss"] == other.numpy["gauss"]
        return not same or self.python != other.python or not np.array_equal(mine["key"], others["key"])


def _device_generators() -> Iterator[tuple[str, Callable[[], Tensor], Callable[[Tensor], Any]]]:
    yield "cpu", torch.get_rng_state, torch.set_rng_state
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, generator in enumerate(torch.cuda.default_generators):
            yield f"cuda:{index}", generator.get_state, generator.set_state


def _own_generators(model: nn.Module) -> list[Any]:
    """Generators that modules keep for themselves."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, _GENERATORS)]


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else generator.getstate()


def _put_back(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


class Answer(NamedTuple):
    """What a forward did."""

    draws: Counter[str]  # how many times each module drew, by its name; ``""`` is the model itself
    result: Tensor  # the first floating-point tensor of its output
    trace: list[tuple[str, float, float]]  # operators and sums over their outputs, where these were asked for


def draws_by_module(model: nn.Module, *, training: bool | None = True) -> Counter[str] | None:
    """Ask which modules of a model draw random numbers; two tokens are run, twice.

    Generators, buffers, gradients and modes are afterwards what they were. A draw counts for the innermost module that
    was running.

    A sharded model must be asked in every process at once. ``training=None`` asks in the mode that each module has.

    Returns draws by the module's name, empty where nothing is random; ``None`` for a model that cannot run: its weights
    are on the meta device, or DeepSpeed ZeRO-3 has spread them over the processes. Raises ``UnsupportedModelError`` at
    one that wants more than token ids.
    """
    if not can_run(model):
        return None
    with left_as_it_is(model, training):
        try:
            first = ask(model)
        except (ValueError, TypeError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on token ids alone ({first_line(error)}), and a packed row has "
                "nothing else; use a newer transformers or another model, or train it without flexdpo"
            ) from error
        if first.draws:
            return Counter() if harmless(model) else first.draws
        second = ask(model)
    allowed = rounding_of(first.result) * float(first.result.abs().max())
    if float((first.result - second.result).abs().max()) > allowed or second.draws:
        # what it draws from is none of the generators that can be looked at
        return second.draws or Counter([""])
    return first.draws


def rounding_of(result: Tensor) -> float:
    """What rounding may do to a result, as a share of its largest value."""
    return _SAME_HALF if result.element_size() < 4 else _SAME


def harmless(model: nn.Module, inputs: dict[str, Any] | None = None) -> bool:
    """Whether nothing follows from what is drawn, as from a number that is compared with a rate of 0.

    Uniform numbers are replaced by the smallest and by the largest there are. Where no other operator then gives
    anything else, it does not matter what is drawn. The result alone would not show it: a fresh adapter adds 0.
    """
    low, high = (ask(model, inputs, forced=share) for share in (_SMALLEST, 1 - _SMALLEST))
    if low.draws or high.draws or len(low.trace) != len(high.trace):
        return False
    return all(
        name == other and abs(total - other_total) <= _SAME_SUM * magnitude
        for (name, total, magnitude), (other, other_total, _) in zip(low.trace, high.trace, strict=True)
    )


def can_run(model: nn.Module) -> bool:
    """Whether all weights are in memory here: not on the meta device, nor spread over processes by ZeRO-3."""
    return not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters())


class _InThread(threading.local):
    asking = 0


in_thread = _InThread()


def being_asked() -> bool:
    """Whether a model runs in this thread only to be looked at."""
    return in_thread.asking > 0


def ask(
    model: nn.Module, inputs: dict[str, Any] | None = None, *, torch_only: bool = False, forced: float | None = None
) -> Answer:
    """Run a model and see who draws.

    The caller puts back what the forward changes. Without ``inputs`` two tokens run; ``torch_only`` leaves out what
    another thread may have drawn; ``forced`` draws this share, 0 to 1, of every uniform range, and traces what follows.
    """
    inputs = _two_tokens(model) if inputs is None else inputs
    in_thread.asking += 1
    try:
        with Draws(model, torch_only=torch_only, forced=forced) as seen, torch.no_grad():
            output = model(**inputs, use_cache=False)
    finally:
        in_thread.asking -= 1
    return Answer(seen.counts, _first_floats(output), seen.trace)


def _two_tokens(model: nn.Module) -> dict[str, Any]:
    embeddings: Any = model.get_input_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    device = next(model.parameters()).device if embeddings is None else embeddings.weight.device
    input_ids = torch.tensor([_TOKENS], device=device)
    if embeddings is not None:
        input_ids %= embeddings.weight.shape[0]
    return {"input_ids": input_ids}


def _first_floats(output: Any) -> Tensor:
    if isinstance(output, torch.Tensor):
        return output.detach() if output.is_floating_point() else torch.zeros(1)
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    floats = (_first_floats(value) for value in values if value is not None)
    return next((each for each in floats if each.numel() > 1), torch.zeros(1))


class Draws(TorchDispatchMode):
    """Counts draws by module while it is entered, those of this thread only.

    torch's operators are looked at one by one, with the states read around those that are able to draw; what draws by
    another way (numpy, Python, a kernel with a generator of its own) shows at the borders of modules.
    """

    def __init__(self, model: nn.Module, *, torch_only: bool = False, forced: float | None = None) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.trace: list[tuple[str, float, float]] = []
        self.forced = forced
        self.thread = threading.get_ident()
        self.model, self.torch_only = model, torch_only
        self.running: list[str] = [""]
        self.hooks: list[Any] = []
        self.own = [] if torch_only else _own_generators(model)
        self.last = self._states()

    def __enter__(self) -> Any:
        for name, module in self.model.named_modules():
            self.hooks += [
                module.register_forward_pre_hook(self._entering(name), prepend=True),
                module.register_forward_hook(self._leaving, always_call=True),
            ]
        self.last = self._states()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self._blame()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            output = func(*args, **kwargs)
            if self.forced is not None:
                self.trace += [(str(func), *_sums(each)) for each in _tensors(output)]
            return output
        before = RandomState.now()
        output = func(*args, **kwargs)
        if RandomState.now().devices_differ(before) or kwargs.get("generator") is not None:
            packet = getattr(func, "overloadpacket", None)
            if self.forced is None or packet not in _UNIFORM:
                self.counts[self.running[-1]] += 1
            else:
                low, high = (*args[1:], *_UNIT)[:2] if packet is torch.ops.aten.uniform_ else _UNIT
                output.fill_(low + self.forced * (high - low))
            self.last = self._states()
        return output

    def _states(self) -> tuple[RandomState, list[Any]]:
        return RandomState.now(), [_state_of(generator) for generator in self.own]

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if threading.get_ident() == self.thread:
                self._blame()
                self.running.append(name)

        return enter

    def _leaving(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self._blame()
            self.running.pop()

    def _blame(self) -> None:
        if self.torch_only:
            return
        states, own = self._states()
        before, own_before = self.last
        moved = states.differs(before) or any(
            not torch.equal(new, old) if isinstance(new, torch.Tensor) else repr(new) != repr(old)
            for new, old in zip(own, own_before, strict=True)
        )
        if moved:
            self.counts[self.running[-1]] += 1
            self.last = states, own


_UNIFORM = (torch.ops.aten.rand, torch.ops.aten.rand_like, torch.ops.aten.uniform_)
_UNIT = (0.0, 1.0)
# rates below it are taken for 0
_SMALLEST = 1e-6
# parallel sums on a GPU may round differently
_SAME_SUM = 1e-3


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [each for part in output for each in _tensors(part)] if isinstance(output, tuple | list) else []


def _sums(tensor: Tensor) -> tuple[float, float]:
    # what a mask hides is infinite, and no two infinite sums are near each other
    values = tensor.detach().double().nan_to_num(nan=1.0, posinf=1.0, neginf=-1.0)
    return float(values.sum()), float(values.abs().sum())


def _put_in(container: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """Bring a dict back to what it was, and never empty it: another thread may be running the module."""
    for key in [key for key in container if key not in kept]:
        del container[key]
    for key, value in kept.items():
        if container.get(key) is not value:
            container[key] = value


@contextlib.contextmanager
def left_as_it_is(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Run a model on the side: modes, attributes, buffers and generators are put back."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    # a model's first forward may register hooks, and remember that it did in an attribute
    hooks = [(each, dict(each)) for module in modules for each in (module._forward_hooks, module._forward_pre_hooks)]
    contents = [(each, each._version, each.detach().clone()) for each in model.buffers() if not each.is_inference()]
    own = [(generator, _state_of(generator)) for generator in _own_generators(model)]
    states = RandomState.now()
    if training is not None:
        for module in modules:
            module.training = training
    try:
        with warnings.catch_warnings():
            # a checkpoint warns where nothing needs a gradient
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, kept, tensors in zip(modules, attributes, buffers, strict=True):
            _put_in(vars(module), kept)
            _put_in(module._buffers, tensors)
        for registered, before in hooks:
            _put_in(registered, before)
        with torch.no_grad():
            for buffer, version, content in contents:
                if buffer._version != version:
                    buffer.copy_(content)
        for generator, state in own:
            _put_back(generator, state)
        states.restore()
