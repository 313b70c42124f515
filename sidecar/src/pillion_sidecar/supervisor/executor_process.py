"""
One executor process: starts it, sends it requests, pings it, and ends it.

Called from: `supervisor.executor_client`, on the event loop. Owns: the child process and its channel. If the child dies, the caller
decides what to repeat.

    end of a child: EOF on its channel (it exits by itself) -> SIGKILL after EXIT_TIMEOUT_S -> left behind after KILL_TIMEOUT_S
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

from pillion.errors import ErrorDocument, PillionError
from pillion.wire import messages
from pillion.wire.message import Message, Request
from pillion_sidecar import channel
from pillion_sidecar.session.record import Counts
from pillion_sidecar.waits import Wait, WaitKind

_log = logging.getLogger(__name__)
A = TypeVar("A", bound=channel.Answer)

EXIT_TIMEOUT_S: Final = 5.0
"""Timeout for the child's exit after its channel was closed. It has nothing to finish then. Afterwards it gets SIGKILL."""
KILL_TIMEOUT_S: Final = 5.0
"""Timeout for the end of a killed child. A child in an uninterruptible call (a hard NFS mount whose server is away) dies when the call
returns. Nothing waits for it: it is left behind, and its successor works."""
PING_PERIOD_S: Final = 5.0
"""Maximum interval of the pings."""


class ExecutorDied(PillionError):
    """The child is not running, or ended during a request."""


class ExecutorHung(ExecutorDied):
    """The child was killed because its wait for storage or peers took longer than its timeout."""

    def __init__(self, wait: Wait) -> None:
        super().__init__(f"{wait.what!r} stood still for {wait.for_s:.0f} s, the bound is {wait.bound_s:.0f} s")
        self.kind = wait.kind


class ExecutorProcess:
    """
    One child process, started by `start`.

    Args:
        log_level: level of the child's log.
        ping_timeout_s: timeout for the answer to a ping. Then the child is killed.
        patience_s: shortest timeout of a wait in `executor.exchange.watchdog`. The pings are frequent enough to notice it.
        on_wait: called on the loop after each ping, with the wait that the child is in. None: it does not wait.
        on_event: called on the loop with each event of `channel.EVENTS`.
        on_exit: called on the loop when the child has ended without `stop`.
    """

    def __init__(
        self,
        *,
        log_level: str,
        ping_timeout_s: float,
        patience_s: float,
        on_wait: Callable[[Wait | None], None],
        on_event: Callable[[Message], None],
        on_exit: Callable[[], None],
    ) -> None:
        self._log_level = log_level
        self._ping_timeout_s = ping_timeout_s
        self._ping_period_s = min(PING_PERIOD_S, ping_timeout_s, patience_s / 4)
        self._on_wait = on_wait
        self._on_event = on_event
        self._on_exit = on_exit
        self._stopping = False
        self._ids = itertools.count(1)
        self._pending: dict[int, tuple[Request[Any], asyncio.Future[channel.Answer]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._hung: Wait | None = None
        self._ended = False
        self.counts: Counts | None = None
        """Counts of the session in the child's newest answer. None: it has not sent any."""

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None and not self._ended else None

    @property
    def hung_for(self) -> WaitKind | None:
        """Kind of the wait for which the child was killed. None: it was not killed for a wait."""
        return self._hung.kind if self._hung is not None else None

    async def start(self) -> None:
        """
        Start the child. Requests may be sent at once; it answers when it is ready.

        Raises:
            ExecutorDied: the system lacks descriptors, processes or memory for a child.
        """
        try:
            await self._start()
        except OSError as err:
            raise ExecutorDied(f"the executor cannot be started: {err}") from err

    async def _start(self) -> None:
        own_end, child_end = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pillion_sidecar.executor.worker",
                str(child_end.fileno()),
                self._log_level,
                pass_fds=(child_end.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                # torch logs two lines for each wait in the store that times out. Such timeouts are normal (`exchange.watchdog`).
                env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ},
            )
        except BaseException:
            own_end.close()
            raise
        finally:
            # The child's end must not stay open in this process, which notices the child's death by EOF.
            child_end.close()
        reader, self._writer = await asyncio.open_unix_connection(sock=own_end)
        self._tasks = [
            asyncio.create_task(self._read(reader), name="executor-read"),
            asyncio.create_task(self._ping(), name="executor-ping"),
        ]
        _log.info("executor started", extra={"pid": self._process.pid})

    async def request(self, request: Request[A]) -> A:
        """
        Send a request, and wait for its answer.

        Blocks: without a timeout of its own. The waits of the operation are bounded, and pings notice a child that hangs.

        Raises:
            ExecutorDied: the child is not running, or ended meanwhile.
            PillionError: the operation failed.
        """
        if self._writer is None or self.pid is None:
            raise ExecutorDied("the executor is not running")
        request_id = next(self._ids)
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = (request, answered)
        try:
            self._writer.write(messages.encode({**request.to_document(), "id": request_id}))
            await self._writer.drain()
            answer: A | channel.Failed = await answered
        except (ConnectionError, OSError) as err:
            # Its end is noticed here before the reader or the watcher of processes notices it. A request that is sent again is to find a successor.
            del self._pending[request_id]
            self._end(f"its channel is broken: {err}")
            raise ExecutorDied(f"the executor is gone: {err}") from err
        finally:
            self._pending.pop(request_id, None)
        self.counts = answer.counts or self.counts
        if isinstance(answer, channel.Failed):
            raise ErrorDocument.from_document(answer.error).to_exception()
        return answer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = messages.Decoder()
        try:
            while data := await reader.read(messages.RECV_BYTES):
                for message in decoder.feed(data):
                    self._take(message)
        except ConnectionError:
            pass
        except Exception as err:  # a boundary: otherwise the waiting requests would never end
            _log.exception("replacing the executor after an invalid message: %s", type(err).__name__)
            self.kill()
        process = self._process
        status: int | str = "unknown"
        if process is not None:
            try:
                status = await asyncio.wait_for(process.wait(), EXIT_TIMEOUT_S)
            except TimeoutError:
                self.kill()
        self._end(describe_exit(status))

    def _take(self, message: messages.Message) -> None:
        if "id" not in message:
            try:
                self._on_event(channel.read_event(message))
            except Exception:  # a boundary: no save fails because of an event
                _log.exception("handling the executor's event %s failed", message["type"])
            return
        asked = self._pending.get(message["id"])
        if asked is not None and not asked[1].done():
            request, answered = asked
            answered.set_result(channel.read_answer(request, message))

    def _end(self, reason: str) -> None:
        """Fail the pending requests, because the child has ended or was left behind. Only the first call has an effect."""
        if self._ended:
            return
        self._ended = True
        _log.warning("executor ended: %s", reason)
        for _, answered in self._pending.values():
            if not answered.done():
                hung = ExecutorHung(self._hung) if self._hung is not None else None
                answered.set_exception(hung or ExecutorDied(f"the executor ended: {reason}"))
        if not self._stopping:
            self._on_exit()

    async def _ping(self) -> None:
        while self.pid is not None:
            await asyncio.sleep(self._ping_period_s)
            try:
                pong = await asyncio.wait_for(self.request(channel.Ping()), self._ping_timeout_s)
            except TimeoutError:
                _log.error("killing the executor: it has not answered a ping for %.0f s", self._ping_timeout_s)
                self.kill()
                return
            except PillionError:
                return
            wait = pong.wait
            self._on_wait(wait)
            if wait is not None and wait.for_s > wait.bound_s:
                self._hung = wait
                _log.error("replacing the executor: %s", ExecutorHung(wait))
                self.kill()
                return

    def kill(self) -> None:
        """Send SIGKILL. Pending requests raise ExecutorDied, at the latest after KILL_TIMEOUT_S, even if the child still exists."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            asyncio.get_running_loop().call_later(KILL_TIMEOUT_S, self._abandon)

    def _abandon(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._end("not even by SIGKILL: it is in an uninterruptible call, and left behind")
        else:
            self._end("killed")

    async def stop(self) -> None:
        """End the child, first by closing its channel, then by SIGKILL. Blocks: up to EXIT_TIMEOUT_S + KILL_TIMEOUT_S."""
        self._stopping = True
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), EXIT_TIMEOUT_S)
            except TimeoutError:
                self.kill()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), KILL_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def describe_exit(status: int | str) -> str:
    """Return an exit status in words: ``killed by SIGKILL``, ``exit status 1``."""
    if isinstance(status, int) and status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
