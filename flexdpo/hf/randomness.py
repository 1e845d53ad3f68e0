"""Nothing random may happen to a token that several responses share: an ordinary run would draw anew for each.

No list of dropout modules and settings is complete, so :mod:`flexdpo.hf.draws` asks the model; here what makes it draw
is set to 0, or the model is refused, and packed forwards are watched.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.draws import RandomState, ask, draws_by_module, harmless, left_as_it_is
from flexdpo.hf.unwrap import backbone_of, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAY_OUT = "call flexdpo.disable_dropout(model), which sets every rate to 0 that can be, or train it without flexdpo"


def disable_dropout(model: nn.Module) -> Callable[[], None]:
    """Set to 0 whatever makes a model draw random numbers in training: dropout, layer drop, jitter, noise.

    Dropout modules are set to 0. Where numbers are still drawn, the settings of the modules that draw them, and of
    their configs, are set to 0 one after the other; one stays 0 if fewer numbers are drawn then and the model's result
    in evaluation mode is the same. A model that cannot be run now (on the meta device, or spread over processes by
    DeepSpeed ZeRO-3) cannot be asked: there everything is set to 0 that is called dropout, jitter or noise, and its
    first packed row is looked at, as that of every model.

    Returns what puts every setting back. Raises ``UnsupportedModelError`` naming the modules that draw random numbers
    however they are set; the model is left as it was.
    """
    base = unwrap_model(model)
    changed = [_Rate([(vars(m), "p")], "p") for m in base.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    undoes = [rate.zero() for rate in changed]
    # what looks at images is not asked, since nobody here has one
    undoes += [rate.zero() for part in _beside_backbone(base) for rate in called_random(part)]

    def put_back() -> None:
        while undoes:
            undoes.pop()()

    draws = draws_by_module(base)
    if draws is None:
        undoes += [rate.zero() for rate in called_random(base)]
    elif draws:
        draws, more = _search(base, draws)
        undoes += more
        if draws:
            put_back()
            raise UnsupportedModelError(
                f"{_named(base, draws, 'in training')}, and no setting stops it: shared tokens would be drawn once "
                "where an ordinary run draws for each response, so train this model without flexdpo"
            )
    return put_back


def require_no_draws(model: nn.Module, setting: str) -> None:
    """Refuse a model that draws random numbers in training.

    Raises ``UnsupportedModelError`` naming the modules.
    """
    base = unwrap_model(model)
    draws = draws_by_module(base)
    if draws:
        raise UnsupportedModelError(
            f"{setting}, but {_named(base, draws, 'in training')}: shared tokens would be drawn once where an ordinary "
            f"run draws for each response; {WAY_OUT}"
        )


@dataclass(frozen=True)
class _Rate:
    """One setting, wherever it is kept: places ``(container, key)`` that are changed together."""

    places: list[tuple[Any, Any]]
    name: str

    def zero(self) -> Callable[[], None]:
        """Set it to 0, and return what undoes that."""
        before = [container[key] for container, key in self.places]
        for container, key in self.places:
            container[key] = 0.0

        def undo() -> None:
            for (container, key), value in zip(self.places, before, strict=True):
                container[key] = value

        return undo


def _search(base: nn.Module, draws: Counter[str]) -> tuple[Counter[str], list[Callable[[], None]]]:
    """Set to 0, by trial, what makes modules draw; return what still draws, and what undoes the changes."""
    modules = dict(base.named_modules())
    want = _evaluated(base)
    undoes = [rate.zero() for rate in called_random(base)]
    # mostly the names are right, which one question shows
    if (found := _still_drawn(base, want)) is not None and not found:
        return found, undoes
    while undoes:
        undoes.pop()()
    stuck: set[type] = set()
    while outer := [name for name in draws if type(modules[name]) not in stuck]:
        # a decoder that skips layers hides what these draw, so the outermost comes first
        kind = type(modules[min(outer, key=lambda name: (name.count("."), name))])
        drawing = [name for name in draws if type(modules[name]) is kind]
        for rate in _settings(modules, drawing):
            undo = rate.zero()
            found = _still_drawn(base, want)
            if found is not None and sum(found[name] for name in drawing) < sum(draws[name] for name in drawing):
                draws = found
                undoes.append(undo)
                # what is drawn for nothing is seen as such once nothing else is drawn
                stuck.clear()
                break
            undo()
        else:
            stuck.add(kind)
    return draws, undoes


def _still_drawn(base: nn.Module, want: Tensor | None) -> Counter[str] | None:
    """What is drawn with a setting at 0; ``None`` where the model no longer runs or evaluates as before."""
    try:
        found, got = draws_by_module(base), _evaluated(base)
    except (ArithmeticError, RuntimeError, ValueError, TypeError, UnsupportedModelError):
        return None
    if want is None or got is None:
        return None
    same = got.shape == want.shape and float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    return found if same else None


def _evaluated(base: nn.Module) -> Tensor | None:
    """The result of two tokens in evaluation mode; ``None`` where even that is random."""
    with left_as_it_is(base, training=False):
        answer = ask(base)
    return None if answer.draws else answer.result


def _settings(modules: dict[str, nn.Module], names: list[str]) -> Iterator[_Rate]:
    """Numbers that modules may read: their own and their configs', then those of the modules around them."""
    name: str | None = names[0]
    seen: set[int] = set()
    while name is not None:
        kind = type(modules[name])
        alike = [module for module in modules.values() if type(module) is kind]
        places: dict[tuple[str, Any], list[tuple[Any, Any]]] = {}
        for module in alike:
            for key, value in vars(module).items():
                if _may_be_rate(value):
                    places.setdefault((key, None), []).append((vars(module), key))
                inside = _inside(value)
                if inside is not None and id(inside) not in seen:
                    seen.add(id(inside))
                    for part in range(len(inside)) if isinstance(inside, list) else list(inside):
                        if _may_be_rate(inside[part]):
                            places.setdefault((key, part), []).append((inside, part))
        yield from (_Rate(found, str(key[0])) for key, found in places.items())
        name = (name.rsplit(".", 1)[0] if "." in name else "") if name else None


def _may_be_rate(value: object) -> bool:
    return isinstance(value, float) and value > 0


def _inside(value: Any) -> Any:
    """What holds the numbers of a config, a namespace, a dict or a list; ``None`` for anything else."""
    if isinstance(value, dict | list):
        return value
    plain = isinstance(value, nn.Module | torch.Tensor | type) or callable(value)
    return None if plain or not hasattr(value, "__dict__") else vars(value)


def _beside_backbone(base: PreTrainedModel) -> list[nn.Module]:
    """The parts of a model of text and images that do not run for text."""
    backbone = backbone_of(base)
    return [] if base.base_model is backbone else [part for part in base.base_model.children() if part is not backbone]


_RANDOM_NAMES = ("drop", "jitter", "noise")


def called_random(model: nn.Module) -> list[_Rate]:
    """Settings above 0 by whose name they are for something random."""
    containers = {id(vars(module)): vars(module) for module in model.modules()}
    configs = (getattr(module, "config", None) for module in model.modules())
    containers |= {id(vars(config)): vars(config) for config in configs if hasattr(config, "__dict__")}
    return [
        _Rate([(container, key)], key)
        for container in containers.values()
        for key, value in container.items()
        if _may_be_rate(value) and any(part in key for part in _RANDOM_NAMES)
    ]


def _named(model: nn.Module, draws: Counter[str], when: str) -> str:
    """The modules that draw, a few of them by name, with the settings above 0 that may be the cause."""
    modules = dict(model.named_modules())
    names = sorted(draws, key=lambda name: (name.count("."), name))
    shown = ", ".join(f"{type(modules[name]).__name__} ({name or 'the model itself'})" for name in names[:3])
    more = f" and {len(names) - 3} more modules" if len(names) > 3 else ""
    s = "s" if len(names) == 1 else ""
    rates = sorted({rate.name + "=" + repr(rate.places[0][0][rate.places[0][1]]) for rate in called_random(model)})
    rates += [f"p={p}" for p in sorted({m.p for m in model.modules() if isinstance(m, _DropoutNd) and m.p > 0})]
    settings = f" (above 0: {', '.join(rates[:6])})" if rates else ""
    return f"{shown}{more} draw{s} random numbers {when}{settings}"


def refuse_draws(module: PreTrainedModel, before: RandomState, now: RandomState, inputs: dict[str, Any]) -> None:
    """Stop after a packed forward during which a module drew random numbers.

    Others may have drawn them meanwhile, so the backbone is run once more, without a layout, and looked at alone.

    Raises ``UnsupportedModelError`` naming the modules and the way out.
    """
    length = next(iter(inputs.values())).shape[1]
    known: dict[int, int] = vars(module).setdefault("_flexdpo_harmless", {})
    mark = mark_of(module)
    if length <= known.get(mark, 0):
        return
    backbone = backbone_of(module)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        # what carries a state alone knows no positions
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
    # numpy and Python do not tell which thread drew: it must be the same module three times
    torch_only = not now.hosts_differ(before)
    with left_as_it_is(backbone, None):
        answers = [ask(backbone, inputs, torch_only=torch_only).draws for _ in range(1 if torch_only else 3)]
        found = set.intersection(*map(set, answers))
        if not found or harmless(backbone, inputs):
            # other lengths are looked at when they are much longer
            known[mark] = 2 * length
            return
    raise UnsupportedModelError(
        f"{_named(backbone, Counter(found), 'while a packed row runs')}: a token that several responses share would "
        f"be drawn once where an ordinary run draws for each; {WAY_OUT}"
    )


@dataclass(eq=False)
class DrawsWatch:
    """Whether a model draws random numbers as it is now: asked once for each state of its modes and settings."""

    known: dict[int, bool] = field(default_factory=dict)

    def draws(self, model: nn.Module) -> bool:
        """Whether the next forward would draw, in the mode that every module has now."""
        mark = mark_of(model)
        if mark not in self.known:
            found = draws_by_module(model, training=None)
            self.known[mark] = bool(called_random(model)) if found is None else bool(found)
        return self.known[mark]


def mark_of(model: nn.Module) -> int:
    """A number that changes with modes, settings, hooks and active adapters."""
    found: list[Any] = []
    for module in model.modules():
        own = vars(module)
        found += [each for each in own.values() if each.__class__ in (bool, float)]
        found += [str(each) for each in own.values() if each.__class__ is list and len(each) < 4]
        found.append(len(own["_forward_hooks"]) + len(own["_forward_pre_hooks"]))
    config: Any = getattr(model, "config", None)
    if config is not None:
        found += [each for each in vars(config).values() if each.__class__ is float]
    return hash(tuple(found))
