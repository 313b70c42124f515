"""
The whole of: that each message class reads what it writes, and takes or refuses whatever else comes.

Called from: pytest.
Must never: list messages by hand; the tables of the wire have them.
"""

import contextlib
import dataclasses
import json
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

from pillion.wire import control, events, messages
from pillion.wire.message import Message, Request
from support import messages_drawn

SAID: Final = {
    *control.TRAINERS.values(),
    *control.OBSERVED.values(),
    *events.EVENTS.values(),
    control.Hello,
    control.Failed,
}
ANSWERS: Final = {each for kind in SAID if issubclass(kind, Request) for each in kind.answers().values()}
KINDS: Final = sorted(SAID | ANSWERS, key=lambda kind: kind.__qualname__)

of_any_kind = st.sampled_from(KINDS)


@given(of_any_kind.flatmap(messages_drawn.of_class))
def test_a_message_is_read_as_it_was_written(sent: Message) -> None:
    """Through a frame, and with a field beside it that a newer release may have added."""
    (received,) = messages.Decoder().feed(messages.encode({**sent.to_document(), "of a newer release": 1}))
    assert received["type"] == sent.type
    assert type(sent).from_document(received) == sent


@given(of_any_kind.flatmap(lambda kind: st.tuples(st.just(kind), messages_drawn.bodies_for(kind))))
def test_whatever_comes_is_a_message_or_a_bad_frame(case: tuple[type[Message], dict[str, Any]]) -> None:
    """No body makes a reader raise anything else, and what it takes can be written again."""
    kind, body = case
    with contextlib.suppress(messages.BadFrame):
        json.dumps(kind.from_document(json.loads(json.dumps(body, default=dataclasses.asdict))).to_document())
