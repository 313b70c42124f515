"""
The whole of: what supervisor and executor say to each other arrives as it was said, and what neither can read has an end.

Called from: pytest.
"""

import json
import socket
from typing import Any

import pytest

from pillion.errors import ErrorDocument, InternalError
from pillion.wire import messages, policy
from pillion.wire.load_messages import LoadBegin, OpaqueLeaves, Tier
from pillion.wire.message import Message
from pillion.wire.messages import BadFrame
from pillion.wire.save_messages import Destination, NamedWriter
from pillion_sidecar import channel
from pillion_sidecar.executor.worker import Worker
from pillion_sidecar.session.record import Counts
from pillion_sidecar.waits import Wait, WaitKind


def sent(message: Message) -> dict[str, Any]:
    """The body of its frame, as the other side has it."""
    body: dict[str, Any] = json.loads(json.dumps(message.to_document()))
    return body


@pytest.mark.parametrize(
    "request_",
    [
        channel.Persist(
            step=5,
            slot=1,
            persist=True,
            destination=Destination(path="/x", writer=NamedWriter(name="a:B", arguments={"c": [1]})),
            retention=policy.Retention(keep_last=2),
        ),
        channel.Load(
            layouts={3: "layout"},
            arena={10: 0},
            orders={10: (7, 1)},
            strangers=(channel.Stranger(step=4, world_size=8, order=(6, 0)),),
            spare_slot=-1,
        ),
    ],
    ids=lambda each: each.type,
)
def test_a_request_arrives_as_it_was_sent(request_: channel.Persist | channel.Load) -> None:
    """JSON has no numbers for names, no tuples and no classes; the executor has them again."""
    assert channel.read_request(sent(request_)) == request_


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (channel.Ping(), channel.Pong(wait=Wait(kind=WaitKind.PEERS, what="plan", for_s=1.0, bound_s=2.0))),
        (
            channel.Persist(step=1, slot=0, persist=True, retention=policy.Retention()),
            channel.Persisted(path="/x", persist_s=1.0, order=(7, 1), counts=Counts(loads=1, store_lost=True)),
        ),
        (
            channel.Load(arena={}, orders={}, spare_slot=0),
            channel.Loaded(
                step=1,
                tier=Tier.STORAGE,
                opaque={0: OpaqueLeaves(file="/x", starts=(1,), lengths=(2,))},
                unexpected={0: ("a",)},
            ),
        ),
        (channel.Over(session="a"), channel.Failed(error=ErrorDocument("LoadError", "why").to_document())),
    ],
    ids=lambda each: each.type,
)
def test_an_answer_arrives_as_it_was_given(request_: Any, answer: channel.Answer) -> None:
    """Whatever was asked may have failed instead."""
    assert channel.read_answer(request_, sent(answer)) == answer


def test_an_event_arrives_as_it_was_said() -> None:
    """The part that is the trainer's is a message of its own channel."""
    event = channel.LoadBegun(rank=3, fills=True, begin=LoadBegin(tier=Tier.ARENA, slot=1, missing=("a",)))
    assert channel.read_event(sent(event)) == event


def test_what_is_none_of_its_messages_is_refused_by_name() -> None:
    """Also an answer to something else: both processes are of one release, so that it is a defect of ours."""
    with pytest.raises(BadFrame, match="the message 'dance' is none of ping, over"):
        channel.read_request({"type": "dance"})
    with pytest.raises(BadFrame, match="the message 'pong' is none of done, failed"):
        channel.read_answer(channel.Over(session="a"), sent(channel.Pong()))
    with pytest.raises(BadFrame, match="the message 'ping' is none of load_begun"):
        channel.read_event(sent(channel.Ping()))


@pytest.mark.parametrize("body", [{"type": "dance"}, {"type": "retain", "current": "five"}])
def test_who_asks_an_executor_what_it_cannot_read_is_answered(body: dict[str, Any]) -> None:
    """The supervisor waits for an answer to each request, and the executor goes on to the next."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        executor = Worker(theirs)
        executor._take({**body, "id": 7})
        executor._take({**channel.Ping().to_document(), "id": 8})
        decoder = messages.Decoder()
        answers: list[messages.Message] = []
        while len(answers) < 2:
            answers += messages.receive(ours, decoder)
    assert [answer["id"] for answer in answers] == [7, 8]
    failed = channel.read_answer(channel.Ping(), answers[0])
    assert isinstance(failed, channel.Failed)
    assert isinstance(ErrorDocument.from_document(failed.error).to_exception(), InternalError)
    assert channel.read_answer(channel.Ping(), answers[1]) == channel.Pong()
