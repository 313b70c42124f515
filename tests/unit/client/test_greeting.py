"""
The whole of: what a trainer does whose sidecar goes away at each hello, and when it warns.

Called from: pytest.
Must never: start a sidecar; the other end is a socket of this test.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillion import errors, group, session
from pillion.wire import names
from support.deadlines import Deadline

ALONE = group.Group(
    rank=0, world_size=1, pods=((0,),), run_id="run", session="0" * 32, store=None, store_problem="", attempt=0
)


@contextlib.contextmanager
def leaving(folder: Path) -> Iterator[list[int]]:
    """A sidecar that takes each connection and ends it; the list grows by one each time."""
    hellos: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / names.CONTROL_SOCKET))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    hellos.append(len(hellos))
                    peer.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield hellos
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(Deadline.SETTLE.s)


def test_a_sidecar_that_leaves_at_each_hello_is_asked_with_pauses_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Thousands of silent hellos in a minute would hide the cause in the sidecar's log."""
    monkeypatch.setattr(session, "CONNECT_TIMEOUT_S", 0.15)
    monkeypatch.setattr(session, "HELLO_PAUSE_S", 0.05)
    with (
        leaving(tmp_path) as hellos,
        caplog.at_level(logging.WARNING),
        pytest.raises(errors.SidecarUnavailable) as raised,
    ):
        session.Session(
            ALONE,
            root=str(tmp_path),
            policy_document=None,
            key="key",
            store_mode=None,
            on_event=lambda _: None,
            environ={names.ENV_RUNTIME_DIR: str(tmp_path)},
        )
    assert 2 <= len(hellos) <= 4
    assert f"({len(hellos)} so far)" in str(raised.value)
    assert "did not answer the hello (2 so far)" in caplog.text
