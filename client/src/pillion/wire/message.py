"""
Messages as frozen dataclasses, one class for each message. Known fields are checked strictly; unknown fields are ignored.

Called from: `wire.control`, `wire.save_messages`, `wire.load_messages`, `wire.events`, and the supervisor's messages to its executor.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from pillion.wire import codec
from pillion.wire.messages import BadFrame

A_co = TypeVar("A_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Base class of the messages. One message is the body of one frame."""

    type: ClassVar[str]
    """Name of the message on the wire. It tells the receiver which class to read."""

    def to_document(self) -> dict[str, object]:
        """Return the body of the frame, for `messages.encode`."""
        return {"type": self.type, **codec.write(self)}

    @classmethod
    def from_document(cls, body: Mapping[str, object]) -> Self:
        """
        Read the body of a frame.

        Raises:
            BadFrame: a field is missing or has another type. The text names the message and the field.
        """
        try:
            return cls._read(body)
        except codec.Wrong as wrong:
            raise BadFrame(f"{cls.type!r}: {wrong}") from None

    @classmethod
    def _read(cls, body: Mapping[str, object]) -> Self:
        built: Self = codec.read(cls, body)
        return built


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Message, Generic[A_co]):
    """A message with an answer: one of the message classes `A_co`, or `control.Failed`."""

    id: int = 0
    """Number that the answers repeat. The sender's connection counts its requests."""

    @classmethod
    def answers(cls) -> Mapping[str, type[Message]]:
        """Return the classes of the answers, by type."""
        return _answers(cls)


def _answers(kind: Any) -> Mapping[str, type[Message]]:
    # Any instead of type[Any]: mypy does not consider every type hashable. See `codec`.
    return _find_answers(kind)


@functools.cache
def _find_answers(kind: type[Any]) -> Mapping[str, type[Message]]:
    (answer,) = (
        typing.get_args(base)[0] for base in kind.__dict__["__orig_bases__"] if typing.get_origin(base) is Request
    )
    return by_type(typing.get_args(answer) if isinstance(answer, types.UnionType) else (answer,))


def by_type(kinds: Iterable[type[Message]]) -> Mapping[str, type[Message]]:
    """
    Return the message classes by their `type`.

    Raises:
        ValueError: two classes have the same `type`.
    """
    table: dict[str, type[Message]] = {}
    for kind in kinds:
        if table.setdefault(kind.type, kind) is not kind:
            raise ValueError(f"{kind.__name__} and {table[kind.type].__name__} have one type, {kind.type!r}")
    return table
