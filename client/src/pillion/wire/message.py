"""
Messages as frozen dataclasses: one class for each. What a peer sends is read strictly, and what it sends besides is passed over.

Called from: `wire.control`, `wire.save_messages`, `wire.load_messages`, `wire.events`; the supervisor and its executor have some of their own.
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
    """What travels in one frame."""

    type: ClassVar[str]
    """Of the frame: it says which class the other side reads."""

    def to_document(self) -> dict[str, object]:
        """The frame's body: what `messages.encode` takes."""
        return {"type": self.type, **codec.write(self)}

    @classmethod
    def from_document(cls, body: Mapping[str, object]) -> Self:
        """
        Raises:
            BadFrame: a field is missing, or of another type; the text names message and field.
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
    """A message that is answered, with one of the messages `A_co`, or with a failure."""

    id: int = 0
    """What the answers repeat; the sender's connection counts them."""

    @classmethod
    def answers(cls) -> Mapping[str, type[Message]]:
        """The classes of its answers, by type."""
        return _answers(cls)


def _answers(kind: Any) -> Mapping[str, type[Message]]:
    # Any: as in `codec`, for mypy.
    return _made(kind)


@functools.cache
def _made(kind: type[Any]) -> Mapping[str, type[Message]]:
    (answer,) = (
        typing.get_args(each)[0] for each in kind.__dict__["__orig_bases__"] if typing.get_origin(each) is Request
    )
    return by_type(typing.get_args(answer) if isinstance(answer, types.UnionType) else (answer,))


def by_type(kinds: Iterable[type[Message]]) -> Mapping[str, type[Message]]:
    """
    The classes by the type of their frames.

    Raises:
        ValueError: two have the same.
    """
    table: dict[str, type[Message]] = {}
    for kind in kinds:
        if table.setdefault(kind.type, kind) is not kind:
            raise ValueError(f"{kind.__name__} and {table[kind.type].__name__} have one type, {kind.type!r}")
    return table
