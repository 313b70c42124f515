"""
The whole of: whether the process at the other end of a socket is seen to end, by each way that a kernel offers.

Called from: pytest.
"""

import asyncio
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pillion_sidecar.supervisor import peer
from pillion_sidecar.supervisor.peer import Peer
from support.deadlines import Deadline, soon


class OfAnOlderKernel:
    """The socket before Linux 6.5: it names its peer by a number alone, which is 0 for one of another pid namespace."""

    def __init__(self, sock: socket.socket, *, seen: bool) -> None:
        self._sock, self._seen = sock, seen

    def getsockopt(self, level: int, option: int, *length: int) -> Any:
        if option == peer.SO_PEERPIDFD:
            raise OSError(92, "Protocol not available")
        found: Any = self._sock.getsockopt(level, option, *length)
        return found if self._seen else bytes(4) + found[4:]


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, Callable[[], None]]]:
    """The sidecar's end of a connection that a child made, and what ends the child; this process holds the child's end as well."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    live, go = os.pipe()
    theirs = socket.socket(socket.AF_UNIX)
    pid = os.fork()
    if pid == 0:
        os.close(go)
        theirs.connect(listener.getsockname())
        select.select([live], [], [])
        os._exit(0)
    os.close(live)
    ended: list[int] = []

    def end() -> None:
        if not ended:
            os.close(go)
            ended.append(os.waitpid(pid, 0)[1])

    ours, _ = listener.accept()
    with listener, theirs, ours:
        try:
            yield ours, end
        finally:
            end()


@pytest.mark.parametrize("older", [False, True], ids=["by its socket", "by its number"])
def test_the_end_of_a_process_is_seen_while_another_holds_its_socket(
    connected: tuple[socket.socket, Callable[[], None]], older: bool
) -> None:
    """A stuck worker of a data loader keeps the socket open; the trainer's own end is seen all the same, and once."""
    sock, end = connected
    seen: list[str] = []

    async def scenario() -> None:
        of = Peer(OfAnOlderKernel(sock, seen=True) if older else sock)  # type: ignore[arg-type] # a socket by its one method
        of.watch(lambda: seen.append("gone"))
        assert not of.gone
        end()
        await soon(lambda: seen, Deadline.REPLY, "the end is seen")
        assert of.gone
        of.close()
        assert of.gone

    asyncio.run(scenario())
    assert seen == ["gone"]


def test_a_process_that_no_way_reaches_is_not_taken_for_dead(
    connected: tuple[socket.socket, Callable[[], None]],
) -> None:
    """On an older kernel a trainer of another pid namespace has the number 0: only the end of its connection tells of its death."""
    sock, end = connected

    async def scenario() -> None:
        of = Peer(OfAnOlderKernel(sock, seen=False))  # type: ignore[arg-type] # a socket by its one method
        of.watch(lambda: pytest.fail("nothing was seen"))
        end()
        assert not of.gone
        of.close()

    asyncio.run(scenario())
