"""
Runs blocking calls beside the event loop, in a separate daemon thread, one at a time.

Called from: `reporting.reporter`, `supervisor.root_access`. Not asyncio.to_thread: a call that never returns (a dead NFS server, a name server
that does not answer) would keep the process from ending.
Must never: run a second call before the first has returned. So at most one thread hangs.
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
    """The previous call has not returned yet."""


class BlockingCaller:
    """
    One thread for blocking calls. See the module.

    Args:
        name: name of the thread.

    Owns: the thread, from the first call until `close`. If it hangs, it ends with the process.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = False

    async def run(self, call: Callable[[], T], timeout_s: float) -> T:
        """
        Run `call` in the thread. Return its result, or raise its error.

        Blocks: up to `timeout_s`. After a timeout the call continues, and later calls raise StillBusy until it returns.

        Raises:
            TimeoutError: the call did not return within `timeout_s`.
            StillBusy: the previous call has not returned yet.
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
                done.set_result(result)  # type: ignore[arg-type]  # without an error there is a result

        def work() -> None:
            result: Any = None
            error: Exception | None = None
            try:
                result = call()
            except Exception as err:  # a boundary: the waiting caller raises it
                error = err
            with contextlib.suppress(RuntimeError):  # the event loop has ended meanwhile
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
        """Let the thread end after its current call. Blocks: never."""
        self._calls.put(None)
