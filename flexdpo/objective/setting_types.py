"""Whether the settings of a dataclass are of the types that its fields declare, asked of the fields themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from flexdpo.errors import FlexdpoError, found

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", NoneType: "None"}


def require_types(settings: Any, declared: type, names: Iterable[str]) -> None:
    """Refuse values of other types than the dataclass ``declared`` gives their fields.

    A whole number may come as a text of digits, as command lines have it, or as a float such as ``8.0``: it is set
    anew as the number.
    """
    hints = get_type_hints(declared)
    for name in names:
        hint, value = hints[name], getattr(settings, name)
        if _may_be(int, hint) and not _may_be(float, hint) and _is_whole(value):
            setattr(settings, name, value := int(value))
        if not _is(value, hint):
            raise FlexdpoError(f"{name} must be {_in_words(hint)}, got {found(value)}; give one, or leave it out")


def is_number(hint: Any) -> bool:
    """Whether a declared type has numbers and ``None`` only."""
    return {*_kinds(hint)} <= {int, float, NoneType}


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _may_be(kind: type, hint: Any) -> bool:
    return kind in _kinds(hint)


def _is_whole(value: Any) -> bool:
    return value.isdecimal() if isinstance(value, str) else isinstance(value, float) and value.is_integer()


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is(value, kind) for kind in get_args(hint))
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str | PathLike)
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(_is(each, parts[0]) for each in value)
    return not isinstance(kind, type) or isinstance(value, Mapping if kind is dict else kind)


def _in_words(hint: Any) -> str:
    words = [
        f"a list of {_WORDS[get_args(kind)[0]].removeprefix('a ')}s"
        if get_origin(kind) in (list, tuple)
        else _WORDS.get(kind, "a dict")
        for kind in _kinds(hint)
    ]
    return " or ".join(words)
