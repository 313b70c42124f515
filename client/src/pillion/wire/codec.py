"""
How a dataclass becomes JSON and JSON becomes the dataclass: one reader and one writer for each, made once of its fields.

Called from: `wire.message`. Fields have plain types: `int`, `str`, `bool`, `float`, a StrEnum, `Mapping` (by text or number), `tuple`,
another such dataclass, a union of these, `Any`. A value of another type, or a missing one that has no default, is `Wrong`; a field that the
class does not know is passed over.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Read = Callable[[object], Any]
Write = Callable[[Any], object]


class Wrong(Exception):
    """
    A value that a field does not allow.

    Args:
        why: what is wrong.
        allowed: the type that is allowed, where another came.
    """

    def __init__(self, why: str, allowed: str = "") -> None:
        super().__init__(why)
        self.why, self.allowed = why, allowed
        self.where: list[str] = []
        """From the value outwards: indexes and names, the field's name last."""

    def __str__(self) -> str:
        if not self.where:
            return self.why
        name, *inwards = reversed(self.where)
        return f"the field {name!r}{''.join(f'[{each}]' for each in inwards)} {self.why}"


def read(kind: type[Any], body: object) -> Any:
    """
    A dataclass of this class, from what JSON had.

    Raises:
        Wrong: a field is missing, or of another type.
    """
    return _fields(kind).read(body)


def write(value: Any) -> dict[str, object]:
    """A dataclass as JSON has it, without what it is."""
    return {name: field.write(getattr(value, name)) for name, field in _fields(type(value)).by_name.items()}


@dataclass(frozen=True, slots=True)
class _Field:
    read: Read
    write: Write
    required: bool


@dataclass(frozen=True, slots=True)
class _Fields:
    """Of one dataclass."""

    kind: type[Any]
    by_name: Mapping[str, _Field]

    def read(self, body: object) -> Any:
        if not isinstance(body, Mapping):
            raise _not("object", body)
        values = {}
        for name, field in self.by_name.items():
            if name in body:
                values[name] = _at(name, field.read, body[name])
            elif field.required:
                wrong = Wrong("is missing")
                wrong.where.append(name)
                raise wrong
        return self.kind(**values)


def _fields(kind: Any) -> _Fields:
    # Any: mypy does not take every type for hashable, as the cache below wants it.
    return _made(kind)


@functools.cache
def _made(kind: type[Any]) -> _Fields:
    hints = typing.get_type_hints(kind)
    return _Fields(
        kind,
        {
            each.name: _Field(
                *_both(hints[each.name]),
                required=each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING,
            )
            for each in dataclasses.fields(kind)
        },
    )


def _at(where: object, read: Read, value: object) -> Any:
    try:
        return read(value)
    except Wrong as wrong:
        wrong.where.append(str(where)[:80])
        raise


def _not(allowed: str, value: object) -> Wrong:
    # reprlib: what came may be nested as deep as the reader of JSON goes.
    return Wrong(f"must be {allowed}, not {reprlib.repr(value)}", allowed)


def _same(value: Any) -> Any:
    return value


def _both(hint: Any) -> tuple[Read, Write]:
    """How a value of this type is read, and written."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _same, _same
    if hint in _PLAIN:
        return _PLAIN[hint], _same
    if origin in (types.UnionType, typing.Union):
        return _union(arguments)
    if origin is tuple and arguments[1:] == (...,):
        return _sequence(arguments[0])
    if origin is tuple:
        return _exactly(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(*arguments)
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return _enum(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return lambda value: read(hint, value), write  # not before it is needed: it may name itself
    raise TypeError(f"a message cannot have a field of the type {hint}")


def _int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _not("int", value)


def _float(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise Wrong("is too large") from None
    raise _not("float", value)


def _exact(kind: type[Any]) -> Read:
    def read(value: object) -> Any:
        if isinstance(value, kind):
            return value
        raise _not(kind.__name__, value)

    return read


def _nothing(value: object) -> None:
    if value is not None:
        raise _not("null", value)


_PLAIN: Final[Mapping[Any, Read]] = {
    int: _int,
    float: _float,
    str: _exact(str),
    bool: _exact(bool),
    type(None): _nothing,
}


def _union(kinds: tuple[Any, ...]) -> tuple[Read, Write]:
    ways = [(typing.get_origin(kind) or kind, *_both(kind)) for kind in kinds]

    def read(value: object) -> Any:
        failed: list[Wrong] = []
        for _, each, _ in ways:
            try:
                return each(value)
            except Wrong as wrong:
                failed.append(wrong)
        if len(inner := [wrong for wrong in failed if wrong.where]) == 1:
            raise inner[0]
        raise _not(" or ".join(wrong.allowed for wrong in failed if wrong.allowed), value)

    def write(value: Any) -> object:
        return next((each(value) for kind, _, each in ways if isinstance(value, kind)), value)

    return read, write


def _sequence(kind: Any) -> tuple[Read, Write]:
    read_one, write_one = _both(kind)

    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise _not("list", value)
        return tuple([_at(index, read_one, each) for index, each in enumerate(value)])

    return read, lambda value: [write_one(each) for each in value]


def _exactly(kinds: tuple[Any, ...]) -> tuple[Read, Write]:
    each_way = [_both(kind) for kind in kinds]

    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
            raise _not(f"list of {len(kinds)}", value)
        return tuple([_at(index, way[0], each) for index, (way, each) in enumerate(zip(each_way, value, strict=True))])

    return read, lambda value: [way[1](each) for way, each in zip(each_way, value, strict=True)]


def _mapping(key: Any, kind: Any) -> tuple[Read, Write]:
    read_one, write_one = _both(kind)
    read_key, write_key = (_number, str) if key is int else (_both(key)[0], _same)
    plain = read_one is _same and key is not int

    def read(value: object) -> Mapping[Any, Any]:
        if not isinstance(value, Mapping):
            raise _not("object", value)
        if plain:
            return value
        return {_at(each, read_key, each): _at(each, read_one, value[each]) for each in value}

    return read, _same if plain else lambda value: {write_key(each): write_one(value[each]) for each in value}


def _number(key: object) -> int:
    """A number as JSON has it where it is the name of a field."""
    try:
        if str(number := int(str(key))) == str(key):
            return number
    except ValueError:
        pass
    raise _not("a number", key)


def _enum(kind: type[enum.StrEnum]) -> tuple[Read, Write]:
    def read(value: object) -> enum.StrEnum:
        try:
            return kind(str(value))
        except ValueError:
            raise _not(f"one of {', '.join(kind)}", value) from None

    return read, str
