"""
The whole of: blocking calls beside the event loop, in a daemon thread of their own, one at a time.

Called from: `reporting.reporter`. Not asyncio.to_thread: a call that never returns (a dead NFS server, a name server that does not answer) would
keep the process from ending, and the drain has a bound.
Must never: run a second call while the first has not returned, so that what hangs is one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class StillBusy(Exception):
    """The call before has not returned yet."""


class BlockingCaller:
    """
    See the module.

    Owns: one thread, from the first call until `close`; one that hangs then ends with the process.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = False

    async def run(self, call: Callable[[], T], timeout_s: float) -> T:
        """
        What `call` returns, or raises.

        Blocks: up to `timeout_s`; the call itself goes on, and is then in the way of the next.

        Raises:
            TimeoutError: it did not return within `timeout_s`.
            StillBusy: the call before did not return yet.
        """
        if self._busy:
            raise StillBusy
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._busy = True

        def settle(result: T | None, error: BaseException | None) -> None:
            self._busy = False
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]  # a result where there is no error

        def work() -> None:
            result: Any = None
            error: Exception | None = None
            try:
                result = call()
            except Exception as err:  # a boundary: whatever it is goes to whoever waits
                error = err
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, result, error)

        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put(work)
        return await asyncio.wait_for(done, timeout_s)

    def _serve(self) -> None:
        while (work := self._calls.get()) is not None:
            work()

    def close(self) -> None:
        """Let the thread end. Blocks: never."""
        self._calls.put(None)
