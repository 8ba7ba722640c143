"""The strict JSON form of dataclasses: `encode` writes it, `decode` reads it and checks every type.

Nested objects and lists; a member of a union says by `kind` which one it is. `place` is the dotted path of a value, for
messages.
"""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jmoe.config import InputError, require

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "None"}


def encode(value: Any, hint: Any, place: str = "") -> Any:
    """The JSON form of a value declared as `hint`: dicts, lists, strings, numbers, booleans and None."""
    if dataclasses.is_dataclass(value):
        kinds = kinds_of(hint)
        name = type(value).__name__
        require(name in kinds, f"{place or 'config'} is a {name}; it must be {_one_of(kinds)}")
        hints = typing.get_type_hints(type(value))
        fields = {n: encode(getattr(value, n), h, join(place, n)) for n, h in hints.items()}
        return {"kind": name, **fields} if len(kinds) > 1 else fields
    if isinstance(value, tuple | list):
        item = item_of(hint)
        return [encode(v, item, join(place, i)) for i, v in enumerate(value)]
    return value


def decode(value: Any, hint: Any, place: str = "") -> Any:
    """The value of type `hint` whose JSON form is given; a field that is missing takes its default.

    Raises `InputError` with its place for what is unknown, of a wrong type or impossible.
    """
    kinds = kinds_of(hint)
    if kinds:
        require(isinstance(value, dict), f"{place or 'config'} is {value!r}; it must be {_one_of(kinds)}")
        return _decode_fields(value, kinds, place)
    if isinstance(value, list) and item_of(hint) is not None:
        return tuple(decode(v, item_of(hint), join(place, i)) for i, v in enumerate(value))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(value in choices, f"{place} is {value!r}; it must be {_one_of(choices)}")
        return value
    members = members_of(hint)
    if float in members and type(value) is int:
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    of_type = any(type(value) is m if m in (int, bool) else isinstance(value, m) for m in members if m in _NAMES)
    require(of_type, f"{place} is {value!r}; it must be {_one_of(_NAMES.get(m, 'a list') for m in members)}")
    require(not isinstance(value, float) or math.isfinite(value), f"{place} is {value}; it must be finite")
    return value


def _decode_fields(value: dict[str, Any], kinds: dict[str, type], place: str) -> Any:
    tagged = len(kinds) > 1
    kind = value.get("kind") if tagged else next(iter(kinds))
    cls = kinds.get(str(kind))
    if cls is None:
        near = did_you_mean(nearest(str(kind), kinds))
        raise InputError(f"{place or 'config'}: kind is {kind!r}; it must be {_one_of(kinds)}" + near)
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in hints and not (tagged and key == "kind"):
            near = [join(place, name) for name in nearest(key, hints)]
            raise InputError(f"unknown key {join(place, key)}" + did_you_mean(near))
    fields = {name: decode(value[name], hint, join(place, name)) for name, hint in hints.items() if name in value}
    try:
        return cls(**fields)
    except InputError as error:
        told = not place or str(error).startswith(place)
        raise error if told else InputError(f"{place}: {error}") from error


def members_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a type by itself is its only member."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def kinds_of(hint: Any) -> dict[str, type]:
    """The dataclasses that a type admits, by name."""
    return {m.__name__: m for m in members_of(hint) if isinstance(m, type) and dataclasses.is_dataclass(m)}


def item_of(hint: Any) -> Any:
    """X of `tuple[X, ...]`, which may be a member of a union; None if there is none."""
    return next((typing.get_args(m)[0] for m in members_of(hint) if typing.get_origin(m) is tuple), None)


def join(place: str, part: str | int) -> str:
    return f"{place}.{part}" if place else str(part)


def _one_of(choices: Iterable[Any]) -> str:
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The name most likely meant by `name`: one that ends in it, or one spelt like it."""
    names = list(names)
    return [n for n in names if n.endswith(f".{name}")][:1] or difflib.get_close_matches(name, names, n=1)


def did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""
