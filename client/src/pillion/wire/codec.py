"""
Converts dataclasses to JSON values and back. Each class has one reader and one writer, which are built once from its fields.

Called from: `wire.message`. A field's type may be `int`, `str`, `bool`, `float`, a StrEnum, `Mapping` (keys are text or numbers), `tuple`,
another such dataclass, a union of these, or `Any`. A value of another type is `Wrong`, and so is a missing value without a default. Unknown
fields of the JSON object are ignored.
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
        why: the problem, as the end of a sentence that begins with the field's name.
        allowed: the allowed type. Empty if the type is not the problem.
    """

    def __init__(self, why: str, allowed: str = "") -> None:
        super().__init__(why)
        self.why, self.allowed = why, allowed
        self.keys: list[str] = []
        """Indexes and names that lead to the value, innermost first. The last one is the name of the field."""

    def __str__(self) -> str:
        if not self.keys:
            return self.why
        name, *inner_keys = reversed(self.keys)
        return f"the field {name!r}{''.join(f'[{key}]' for key in inner_keys)} {self.why}"


def read(kind: type[Any], body: object) -> Any:
    """
    Return an instance of the dataclass `kind` with the values of a JSON object.

    Raises:
        Wrong: a field is missing or has another type.
    """
    return _fields(kind).read(body)


def write(value: Any) -> dict[str, object]:
    """Return the fields of a dataclass instance as a JSON object. The object does not name the class."""
    return {name: field.write(getattr(value, name)) for name, field in _fields(type(value)).by_name.items()}


@dataclass(frozen=True, slots=True)
class _Field:
    read: Read
    write: Write
    required: bool


@dataclass(frozen=True, slots=True)
class _Fields:
    """The readers and writers of one dataclass's fields."""

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
                wrong.keys.append(name)
                raise wrong
        return self.kind(**values)


def _fields(kind: Any) -> _Fields:
    # Any instead of type[Any]: the cache below needs hashable arguments, and mypy does not consider every type hashable.
    return _build_fields(kind)


@functools.cache
def _build_fields(kind: type[Any]) -> _Fields:
    hints = typing.get_type_hints(kind)
    return _Fields(
        kind,
        {
            field.name: _Field(
                *_reader_and_writer(hints[field.name]),
                required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            )
            for field in dataclasses.fields(kind)
        },
    )


def _at(key: object, read: Read, value: object) -> Any:
    """Read the value under `key`. An error gets the key, cut to 80 characters."""
    try:
        return read(value)
    except Wrong as wrong:
        wrong.keys.append(str(key)[:80])
        raise


def _not(allowed: str, value: object) -> Wrong:
    # reprlib shortens the value, which may be nested as deeply as the JSON parser allows.
    return Wrong(f"must be {allowed}, not {reprlib.repr(value)}", allowed)


def _same(value: Any) -> Any:
    return value


def _reader_and_writer(hint: Any) -> tuple[Read, Write]:
    """Return the functions that read and write a value of this type."""
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
        return _fixed_tuple(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(*arguments)
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return _enum(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return lambda value: read(hint, value), write  # resolved at the first use, because a class may refer to itself
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
    members = [(typing.get_origin(kind) or kind, *_reader_and_writer(kind)) for kind in kinds]

    def read(value: object) -> Any:
        failed: list[Wrong] = []
        for _, read_member, _ in members:
            try:
                return read_member(value)
            except Wrong as wrong:
                failed.append(wrong)
        if len(inner := [wrong for wrong in failed if wrong.keys]) == 1:
            raise inner[0]
        raise _not(" or ".join(wrong.allowed for wrong in failed if wrong.allowed), value)

    def write(value: Any) -> object:
        return next((write_member(value) for kind, _, write_member in members if isinstance(value, kind)), value)

    return read, write


def _sequence(kind: Any) -> tuple[Read, Write]:
    read_entry, write_entry = _reader_and_writer(kind)

    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise _not("list", value)
        return tuple([_at(index, read_entry, entry) for index, entry in enumerate(value)])

    return read, lambda value: [write_entry(entry) for entry in value]


def _fixed_tuple(kinds: tuple[Any, ...]) -> tuple[Read, Write]:
    readers, writers = zip(*map(_reader_and_writer, kinds), strict=True)

    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
            raise _not(f"list of {len(kinds)}", value)
        entries = enumerate(zip(readers, value, strict=True))
        return tuple([_at(index, read_entry, entry) for index, (read_entry, entry) in entries])

    return read, lambda value: [write_entry(entry) for write_entry, entry in zip(writers, value, strict=True)]


def _mapping(key: Any, kind: Any) -> tuple[Read, Write]:
    read_entry, write_entry = _reader_and_writer(kind)
    read_key, write_key = (_number, str) if key is int else (_reader_and_writer(key)[0], _same)
    plain = read_entry is _same and key is not int

    def read(value: object) -> Mapping[Any, Any]:
        if not isinstance(value, Mapping):
            raise _not("object", value)
        if plain:
            return value
        return {_at(name, read_key, name): _at(name, read_entry, value[name]) for name in value}

    return read, _same if plain else lambda value: {write_key(name): write_entry(value[name]) for name in value}


def _number(key: object) -> int:
    """Read a number that is the key of a JSON object, where it is text."""
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
