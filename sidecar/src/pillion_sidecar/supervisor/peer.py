"""
Finds out whether the process at the other end of a unix socket lives.

Called from: `supervisor.server`. The end of the connection is not enough: a forked child of the process may keep the socket open after its
death, such as a data loader's worker that hangs for minutes.
Must never: identify a process by its id. The kernel reuses ids; a pidfd always refers to one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Final

_log = logging.getLogger(__name__)

SO_PEERPIDFD: Final = 77
"""Socket option (Linux 6.5) that returns a pidfd of the peer, across pid namespaces. Source: include/uapi/asm-generic/socket.h."""
_CREDENTIALS: Final = struct.Struct("iII")


class Peer:
    """
    The process at the other end of a connection.

    Args:
        sock: this process's end.

    Owns: a pidfd, until `close`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.pid, self.uid, _ = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        """Process id. 0 if the process is in another pid namespace, which this process cannot see."""
        self._pidfd, self._was_gone = _pidfd(sock, self.pid)
        self._watched_by: asyncio.AbstractEventLoop | None = None

    @property
    def gone(self) -> bool:
        """Whether the process has ended. False if the kernel offers no way to know; then only the end of the connection shows it."""
        if self._pidfd is None:
            return self._was_gone
        watch = select.poll()
        watch.register(self._pidfd, select.POLLIN)
        return bool(watch.poll(0))

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` once in the running loop, when the process has ended."""
        loop = asyncio.get_running_loop()
        if self._pidfd is None:
            if self._was_gone:
                loop.call_soon(on_gone)
            return

        def end() -> None:
            self._unwatch()
            on_gone()

        loop.add_reader(self._pidfd, end)
        self._watched_by = loop

    def _unwatch(self) -> None:
        if self._watched_by is not None and self._pidfd is not None:
            self._watched_by.remove_reader(self._pidfd)
            self._watched_by = None

    def close(self) -> None:
        self._unwatch()
        if self._pidfd is not None:
            self._was_gone = self.gone
            os.close(self._pidfd)
            self._pidfd = None


def _pidfd(sock: socket.socket, pid: int) -> tuple[int | None, bool]:
    """Return a pidfd of the peer, or None; and whether the peer is known to have ended already."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD), False
    except ProcessLookupError:
        return None, True
    except OSError as err:
        _log.debug("no pidfd of pid %d by its socket: %s", pid, err)
    if pid <= 0:
        return None, False
    with contextlib.suppress(OSError):
        try:
            return os.pidfd_open(pid), False
        except ProcessLookupError:
            return None, True
    return None, False
