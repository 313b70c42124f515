"""
The whole of: what the control socket does at its end.

Called from: pytest.
"""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from pillion.wire import control, messages
from pillion.wire.message import Message, Request
from pillion_sidecar.supervisor import server as server_module
from pillion_sidecar.supervisor.server import ControlServer, TrainerConnection
from support.deadlines import Deadline, soon

HELLO = control.Hello(id=1, session="a" * 32, run_id="r", rank=0, world_size=1, pods=((0,),))


class Waiting:
    """A handler whose hello waits, as for the saves of the session before."""

    def __init__(self) -> None:
        self.greeted = 0

    async def hello(self, client: TrainerConnection, message: control.Hello) -> None:
        self.greeted += 1
        await asyncio.get_running_loop().create_future()

    async def message(self, client: TrainerConnection, message: Message) -> None:
        raise AssertionError("no hello was answered")

    def observed(self, client: TrainerConnection, request: Request[Any]) -> None:
        raise AssertionError("nobody but a trainer is here")

    async def lost(self, client: TrainerConnection) -> None:
        raise AssertionError("no hello was answered")


@pytest.mark.parametrize("says_hello", [True, False], ids=["in its hello", "before it"])
def test_a_sidecar_that_ends_while_a_trainer_waits_logs_no_traceback(tmp_path: Path, says_hello: bool) -> None:
    """Every pod ends so: its log would end with a traceback for each trainer that is connected."""
    complaints: list[dict[str, Any]] = []

    path = str(tmp_path / "control")
    trainer = socket.socket(socket.AF_UNIX)

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        handler = Waiting()
        server = ControlServer(path, handler)
        await server.start()
        trainer.connect(path)
        if says_hello:
            trainer.sendall(messages.encode(HELLO.to_document()))
            await soon(lambda: handler.greeted, Deadline.REPLY, "the trainer is heard")
        else:
            await soon(lambda: server.num_connections, Deadline.REPLY, "the trainer is there")
        server.stop_listening()
        # And the loop ends here, as the sidecar's does, and cancels what still runs.

    with trainer:
        asyncio.run(scenario())
    assert complaints == []


def test_a_connection_too_many_is_told_so_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was closed without a word, and came again at once until its bound."""
    monkeypatch.setattr(server_module, "CLIENT_LIMIT", 1)
    path = str(tmp_path / "control")
    first, second = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)

    async def scenario() -> messages.Message:
        handler = Waiting()
        server = ControlServer(path, handler)
        await server.start()
        first.connect(path)
        first.sendall(messages.encode(HELLO.to_document()))
        await soon(lambda: handler.greeted, Deadline.REPLY, "the first one is heard")
        second.connect(path)
        second.sendall(messages.encode({"type": "hello", "id": 7}))
        second.setblocking(False)
        async with asyncio.timeout(Deadline.REPLY.s):
            answer = messages.Decoder().feed(await asyncio.get_running_loop().sock_recv(second, messages.RECV_BYTES))
        await soon(lambda: server.num_connections == 1, Deadline.REPLY, "the second one is gone")
        server.stop_listening()
        return next(iter(answer))

    with first, second:
        refused = asyncio.run(scenario())
    assert (refused["type"], refused["id"]) == ("failed", 7)
    assert "1 connections are open, and more are not allowed" in refused["error"]["message"]
