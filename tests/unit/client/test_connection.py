"""
The whole of: the client's end of the control channel against a sidecar that is gone, silent, or talks nonsense.

Called from: pytest.
Must never: start a sidecar; the other end is a socket of this test.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pillion import connection
from pillion.errors import IncompatibleCheckpoint, SidecarUnavailable
from pillion.wire import control, events, messages
from pillion.wire.load_messages import Load
from pillion.wire.message import Message
from pillion.wire.save_messages import Claim, Reserve, Sealed
from support import deadlines
from support.deadlines import Deadline

CLAIM = Claim(step=1, room_bytes=1, persist=True)


@contextlib.contextmanager
def connected(
    folder: Path,
    serve: Callable[[socket.socket], None],
    lost: list[str],
    on_event: Callable[[Message], None] | None = None,
) -> Iterator[tuple[connection.Connection, list[Message]]]:
    """A connection whose other end runs `serve` in a thread, and the events that came."""
    path = str(folder / "s")
    told: list[Message] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()

        def accept() -> None:
            peer, _ = listener.accept()
            with peer:
                serve(peer)

        thread = threading.Thread(target=accept)
        thread.start()
        link = connection.Connection(
            path, connect_timeout_s=Deadline.REPLY.s, on_event=on_event or told.append, on_lost=lost.append
        )
        try:
            yield link, told
        finally:
            link.close()
            thread.join(Deadline.SETTLE.s)


def _read(peer: socket.socket, decoder: messages.Decoder) -> messages.Message:
    while True:
        for message in messages.receive(peer, decoder):
            return message


def test_nobody_listening_is_sidecar_unavailable_with_the_path(tmp_path: Path) -> None:
    """A missing socket, and one that a killed sidecar left behind, are both SidecarUnavailable."""
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(stale))
    for path in (tmp_path / "missing", stale):
        with pytest.raises(SidecarUnavailable, match=str(path)):
            connection.Connection(str(path), connect_timeout_s=1.0, on_event=print, on_lost=print)


def test_another_user_that_listens_is_no_sidecar_of_this_run(tmp_path: Path) -> None:
    """A run without a cluster takes memory and bytes from its own user alone; in a pod the volume guards the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        for uid in (os.getuid(), None):
            connection.Connection(
                str(tmp_path / "s"),
                connect_timeout_s=Deadline.REPLY.s,
                on_event=print,
                on_lost=lambda _: None,
                peer_uid=uid,
            ).close()
        with pytest.raises(SidecarUnavailable, match=f"user {os.getuid()} listens .*, and not user {os.getuid() + 1}"):
            connection.Connection(
                str(tmp_path / "s"), connect_timeout_s=1.0, on_event=print, on_lost=print, peer_uid=os.getuid() + 1
            )


def test_a_silent_sidecar_ends_a_request_at_its_bound(tmp_path: Path) -> None:
    """The error names the request; the connection is still there for the next one."""
    lost: list[str] = []

    def serve(peer: socket.socket) -> None:
        decoder = messages.Decoder()
        _read(peer, decoder)
        second = _read(peer, decoder)
        peer.sendall(messages.encode({"type": "latest", "id": second["id"]}))
        peer.recv(1)

    with connected(tmp_path, serve, lost) as (link, _):
        with pytest.raises(SidecarUnavailable, match="'reserve'"):
            link.request(Reserve(room_bytes=1), 0.05)
        assert link.request(control.FindLatest(), Deadline.REPLY.s) == control.Latest()
    assert lost == []


def test_a_silent_sidecar_that_holds_training_up_is_told_of_before_the_bound_and_known_as_silent_until_it_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning has the longest wait of the training. The next claim need not wait as long again."""
    monkeypatch.setattr(connection, "SILENCE_WARNING_S", 0.05)
    speak = threading.Event()

    def serve(peer: socket.socket) -> None:
        assert speak.wait(Deadline.REPLY.s)
        peer.sendall(messages.encode({"type": "notice", "text": "back"}))
        peer.recv(1 << 16)

    with connected(tmp_path, serve, []) as (link, told):
        assert not link.silent
        with pytest.raises(SidecarUnavailable, match="gave no answer to 'claim'"):
            next(link.stream(CLAIM, 0.1, warns=True))
        assert "has not answered 'claim'" in caplog.text
        assert link.silent
        speak.set()
        deadlines.eventually(lambda: told, Deadline.REPLY, "the sidecar to speak again")
        assert not link.silent


def test_a_sidecar_that_goes_away_ends_every_request_and_is_told_once(tmp_path: Path) -> None:
    """EOF fails the waiting request at once, later ones too, and on_lost comes exactly once."""
    lost: list[str] = []

    def serve(peer: socket.socket) -> None:
        _read(peer, messages.Decoder())

    with connected(tmp_path, serve, lost) as (link, _):
        with pytest.raises(SidecarUnavailable):
            link.request(Load(layout=""), Deadline.REPLY.s)
        deadlines.eventually(lambda: lost, Deadline.REPLY, "on_lost was called")
        with pytest.raises(SidecarUnavailable):
            link.send(Sealed(step=1))
        assert link.lost
    assert len(lost) == 1


def test_nonsense_from_the_sidecar_breaks_the_connection_and_nothing_else(tmp_path: Path) -> None:
    """Bytes that are no frame end the connection with the reason."""
    lost: list[str] = []

    def serve(peer: socket.socket) -> None:
        _read(peer, messages.Decoder())
        peer.sendall(b"\xff" * 64)
        peer.recv(1)

    with connected(tmp_path, serve, lost) as (link, _), pytest.raises(SidecarUnavailable, match="broke"):
        link.request(CLAIM, Deadline.REPLY.s)
    assert len(lost) == 1


@pytest.mark.parametrize("error", [AttributeError("no cadence"), SystemExit(1)], ids=lambda e: type(e).__name__)
def test_an_event_that_cannot_be_taken_is_a_lost_connection(tmp_path: Path, error: BaseException) -> None:
    """The listening thread never ends in silence: who waits is answered, and the session looks for a sidecar again."""
    lost: list[str] = []

    def serve(peer: socket.socket) -> None:
        _read(peer, messages.Decoder())
        peer.sendall(messages.encode({"type": "notice", "text": "hello"}))
        peer.recv(1)

    def fail(_: Message) -> None:
        raise error

    with connected(tmp_path, serve, lost, on_event=fail) as (link, _):
        with pytest.raises(SidecarUnavailable, match=type(error).__name__):
            link.request(CLAIM, Deadline.REPLY.s)
        assert link.lost
    assert len(lost) == 1


def test_answers_find_their_request_and_events_their_handler(tmp_path: Path) -> None:
    """Answers in another order than the requests, a late answer without a request, and an event between them are kept apart."""
    lost: list[str] = []

    def serve(peer: socket.socket) -> None:
        decoder = messages.Decoder()
        requests: list[messages.Message] = []
        while len(requests) < 2:
            requests += messages.receive(peer, decoder)
        peer.sendall(messages.encode({"type": "late", "id": 999}))
        peer.sendall(messages.encode({"type": "notice", "text": "hello"}))
        for request in sorted(requests, key=lambda message: int(message["room_bytes"]), reverse=True):
            peer.sendall(
                messages.encode({"type": "reserved", "id": request["id"], "capacities": [request["room_bytes"]]})
            )
        peer.recv(1)

    with connected(tmp_path, serve, lost) as (link, told):
        answers: dict[int, object] = {}

        def ask(room_bytes: int) -> None:
            answers[room_bytes] = link.request(Reserve(room_bytes=room_bytes), Deadline.REPLY.s).capacities

        threads = [threading.Thread(target=ask, args=(size,)) for size in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(Deadline.REPLY.s)
    assert answers == {1: (1,), 2: (2,)}
    assert told == [events.Notice(text="hello")]


def test_a_refusal_is_raised_as_the_error_that_it_is(tmp_path: Path) -> None:
    """A `failed` answer becomes the named exception, with its fields."""

    def serve(peer: socket.socket) -> None:
        request = _read(peer, messages.Decoder())
        error = {"kind": "IncompatibleCheckpoint", "message": "no", "detail": {"fqns": ["a.b"]}}
        peer.sendall(messages.encode({"type": "failed", "id": request["id"], "error": error}))
        peer.recv(1)

    with connected(tmp_path, serve, []) as (link, _), pytest.raises(IncompatibleCheckpoint) as caught:
        link.request(Load(layout=""), Deadline.REPLY.s)
    assert caught.value.fqns == ("a.b",)


def test_what_only_a_newer_client_knows_is_passed_over(tmp_path: Path) -> None:
    """An event and an answer of unknown types cost nothing: the answer that is known is waited for."""

    def serve(peer: socket.socket) -> None:
        request = _read(peer, messages.Decoder())
        peer.sendall(messages.encode({"type": "of a newer release"}))
        peer.sendall(messages.encode({"type": "of a newer release", "id": request["id"]}))
        peer.sendall(messages.encode({"type": "reserved", "id": request["id"], "capacities": [5], "more": 1}))
        peer.recv(1)

    lost: list[str] = []
    with connected(tmp_path, serve, lost) as (link, told):
        assert link.request(Reserve(room_bytes=1), Deadline.REPLY.s).capacities == (5,)
    assert (told, lost) == ([], [])
