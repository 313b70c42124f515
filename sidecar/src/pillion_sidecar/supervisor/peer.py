"""
The whole of: whether the process at the other end of a unix socket lives.

Called from: `supervisor.server`. The end of a connection alone does not say it: whatever that process forked may hold the socket open after its
death, a data loader's worker that is stuck for minutes or an evaluator for hours.
Must never: take a number for a process. A number is given again to another one; a pidfd names one process for good.
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
"""Linux 6.5: a pidfd of the peer, across pid namespaces. Source: include/uapi/asm-generic/socket.h."""
_CREDENTIALS: Final = struct.Struct("iII")


class Peer:
    """
    The process that connected.

    Args:
        sock: the connected end of ours.

    Owns: a pidfd, until `close`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.pid, self.uid, _ = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        """0 where the process is in a pid namespace that is not seen from here."""
        self._pidfd, self._was_gone = _pidfd(sock, self.pid)
        self._watched_by: asyncio.AbstractEventLoop | None = None

    @property
    def gone(self) -> bool:
        """Whether its process has ended. False also where the kernel gives no way to see it: then the end of its connection says so."""
        if self._pidfd is None:
            return self._was_gone
        watch = select.poll()
        watch.register(self._pidfd, select.POLLIN)
        return bool(watch.poll(0))

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` in the running loop, once, when the process has ended."""
        loop = asyncio.get_running_loop()
        if self._pidfd is None:
            if self._was_gone:
                loop.call_soon(on_gone)
            return

        def seen() -> None:
            self._unwatch()
            on_gone()

        loop.add_reader(self._pidfd, seen)
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
    """A pidfd of the peer, or None; and whether the peer is known to be gone already."""
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
