"""
The whole of: what a message's fields may be, and what a peer is told that sends another.

Called from: pytest.
"""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from pillion.wire import control, load_messages, message, messages
from pillion.wire.message import Message, Request


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent(Message):
    """One field of each kind."""

    type: ClassVar[str] = "sent"
    number: int
    seconds: float = 0.0
    colour: Colour = Colour.RED
    part: Part | None = None
    by_rank: Mapping[int, tuple[str, int]] = dataclasses.field(default_factory=dict)
    anything: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Request[Sent]):
    type: ClassVar[str] = "asked"


def test_a_body_becomes_the_fields_and_the_fields_a_body() -> None:
    """JSON has no enums, no tuples and no numbers for names; a message has. A whole number of seconds is one, too."""
    body = {
        "type": "sent",
        "number": 1,
        "seconds": 2,
        "colour": "blue",
        "part": {"name": "a", "sizes": [1, 2]},
        "by_rank": {"3": ["b", 4]},
        "anything": [None],
    }
    read = Sent.from_document(body)
    assert read == Sent(
        number=1,
        seconds=2.0,
        colour=Colour.BLUE,
        part=Part(name="a", sizes=(1, 2)),
        by_rank={3: ("b", 4)},
        anything=[None],
    )
    assert read.to_document() == body


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "'sent': the field 'number' is missing"),
        ({"number": "1"}, "'sent': the field 'number' must be int, not '1'"),
        ({"number": True}, "'sent': the field 'number' must be int, not True"),
        ({"number": 1, "seconds": 10**400}, "'sent': the field 'seconds' is too large"),
        ({"number": 1, "seconds": None}, "'sent': the field 'seconds' must be float, not None"),
        ({"number": 1, "colour": "green"}, "'sent': the field 'colour' must be one of red, blue, not 'green'"),
        ({"number": 1, "colour": []}, "'sent': the field 'colour' must be one of red, blue, not []"),
        ({"number": 1, "part": 5}, "'sent': the field 'part' must be object or null, not 5"),
        ({"number": 1, "part": {}}, "'sent': the field 'part'[name] is missing"),
        (
            {"number": 1, "part": {"name": "", "sizes": [0, "1"]}},
            "'sent': the field 'part'[sizes][1] must be int, not '1'",
        ),
        ({"number": 1, "by_rank": {"x": ["", 0]}}, "'sent': the field 'by_rank'[x] must be a number, not 'x'"),
        ({"number": 1, "by_rank": {"1": [""]}}, "'sent': the field 'by_rank'[1] must be list of 2, not ['']"),
    ],
)
def test_a_wrong_field_is_refused_with_the_names_of_message_and_field(body: dict[str, Any], text: str) -> None:
    """And with where in it the value is, what is allowed, and what came."""
    with pytest.raises(messages.BadFrame) as caught:
        Sent.from_document(body)
    assert str(caught.value) == text


def test_a_request_knows_its_answers() -> None:
    """They are said once, where the request is; a reader of types and the program have them from there."""
    assert Asked.answers() == {"sent": Sent}
    assert load_messages.Load.answers().keys() == {"load_begin", "load_progress", "loaded"}


def test_two_messages_of_one_type_are_refused() -> None:
    """A table that took one of them would read the other's fields."""
    with pytest.raises(ValueError, match=r"ReadStatus and Status have one type"):
        message.by_type((control.Status, control.ReadStatus))
