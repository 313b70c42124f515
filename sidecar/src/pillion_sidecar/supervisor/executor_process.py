"""
The supervisor's end of the executor: start it, ask it, ping it, end it, and start the next one.

Called from: the supervisor (event loop). Owns: the child process and its channel. One child at a time; what it was doing when it
died is the supervisor's to repeat.

    ended by a ladder: EOF on its channel (it exits by itself) -> SIGKILL after EXIT_TIMEOUT_S -> left behind after KILL_TIMEOUT_S
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
from collections.abc import Callable, Mapping
from typing import Any, Final

from pillion.errors import ErrorDocument, PillionError
from pillion.wire import messages

_log = logging.getLogger(__name__)

EXIT_TIMEOUT_S: Final = 5.0
"""Bound for the child to exit after its channel closed, before SIGKILL: it has nothing to finish then."""
KILL_TIMEOUT_S: Final = 5.0
"""Bound for a killed child to be gone: one in an uninterruptible call (a hard NFS mount whose server is away) dies when that returns.
Nothing waits for it: it is left behind, and its successor works."""
PING_PERIOD_S: Final = 5.0


class ExecutorDied(PillionError):
    """The child ended (or was ended) while it worked on a request."""


class ExecutorHung(ExecutorDied):
    """The child was ended because what it waited for stood still beyond its bound."""

    def __init__(self, waits: Mapping[str, Any]) -> None:
        super().__init__(
            f"{waits['what']!r} stood still for {waits['for_s']:.0f} s, the bound is {waits['bound_s']:.0f} s"
        )
        self.kind = str(waits["kind"])


class ExecutorProcess:
    """
    One child process, started by `start`.

    Args:
        on_event: called on the loop with events of a running request (load progress).
        ping_timeout_s: no pong for this long and the child is killed.
        patience_s: the shortest bound of `executor.exchange.watchdog`: it is pinged often enough to see one.
        on_wait: called on the loop with what the child waits for, after each ping; None: nothing.
    """

    def __init__(
        self,
        *,
        log_level: str,
        ping_timeout_s: float,
        patience_s: float,
        on_wait: Callable[[Mapping[str, Any] | None], None],
        on_event: Callable[[messages.Message], None],
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
        self._pending: dict[int, asyncio.Future[messages.Message]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._hung: Mapping[str, Any] | None = None
        self._ended = False
        self.session_state: Mapping[str, Any] = {}
        """What the child said last of its session."""

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None and not self._ended else None

    @property
    def hung_for(self) -> str | None:
        """What it waited for when it was ended for that: see `ExecutorHung.kind`."""
        return str(self._hung["kind"]) if self._hung is not None else None

    async def start(self) -> None:
        """
        Start the child. It is ready when it answers; requests may be sent at once.

        Raises:
            ExecutorDied: no process could be made, for want of descriptors, processes or memory.
        """
        try:
            await self._start()
        except OSError as err:
            raise ExecutorDied(f"the executor cannot be started: {err}") from err

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pillion_sidecar.executor.worker",
                str(theirs.fileno()),
                self._log_level,
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                # A wait in the job's store that runs out is no news (`watch.LOOK_S`); torch writes two lines for each.
                env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            # The child's end must not stay open here: its EOF is how its death is seen.
            theirs.close()
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._tasks = [
            asyncio.create_task(self._read(reader), name="executor-read"),
            asyncio.create_task(self._ping(), name="executor-ping"),
        ]
        _log.info("executor started", extra={"pid": self._process.pid})

    async def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """
        Send a request and wait for its answer; the operation itself has the bounds.

        Raises:
            ExecutorDied: the child is gone.
            PillionError: the operation failed.
        """
        if self._writer is None or self.pid is None:
            raise ExecutorDied("the executor is not running")
        request_id = next(self._ids)
        answer: asyncio.Future[messages.Message] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = answer
        try:
            self._writer.write(messages.encode({**message, "id": request_id}))
            await self._writer.drain()
            reply = await answer
        except (ConnectionError, OSError) as err:
            raise ExecutorDied(f"the executor is gone: {err}") from err
        finally:
            self._pending.pop(request_id, None)
        self.session_state = reply.get("session_state", self.session_state)
        if reply["type"] == "failed":
            raise ErrorDocument.from_document(reply["error"]).to_exception()
        result = reply.get("result", {})
        return result if isinstance(result, dict) else {}

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = messages.Decoder()
        try:
            while data := await reader.read(messages.RECV_BYTES):
                for message in decoder.feed(data):
                    self._take(message)
        except ConnectionError:
            pass
        except Exception as err:  # a boundary: whoever waits for an answer would wait for ever
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
        if message.get("event"):
            try:
                self._on_event(message)
            except Exception:  # a boundary: an event that is not taken costs no save
                _log.exception("handling the executor's event %s failed", message.get("type"))
            return
        answer = self._pending.get(message.get("id", 0))
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _end(self, reason: str) -> None:
        """Nothing comes from the child any more; once."""
        if self._ended:
            return
        self._ended = True
        _log.warning("executor ended: %s", reason)
        for answer in self._pending.values():
            if not answer.done():
                hung = ExecutorHung(self._hung) if self._hung is not None else None
                answer.set_exception(hung or ExecutorDied(f"the executor ended: {reason}"))
        if not self._stopping:
            self._on_exit()

    async def _ping(self) -> None:
        while self.pid is not None:
            await asyncio.sleep(self._ping_period_s)
            try:
                pong = await asyncio.wait_for(self.request({"type": "ping"}), self._ping_timeout_s)
            except TimeoutError:
                _log.error("killing the executor: it has not answered a ping for %.0f s", self._ping_timeout_s)
                self.kill()
                return
            except PillionError:
                return
            waits = pong.get("waits")
            self._on_wait(waits)
            if waits is not None and waits["for_s"] > waits["bound_s"]:
                self._hung = waits
                _log.error("replacing the executor: %s", ExecutorHung(waits))
                self.kill()
                return

    def kill(self) -> None:
        """SIGKILL; requests in flight end in ExecutorDied, after KILL_TIMEOUT_S even when the child does not."""
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
        """Close the channel and wait for the child to go. Blocks: up to EXIT_TIMEOUT_S, then it is killed."""
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
    """An exit status in words: ``killed by SIGKILL``, ``exit status 1``."""
    if isinstance(status, int) and status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
