"""
The whole of: an event loop in a thread of its own, for servers that a test talks to from outside, as other processes do.

Called from: the fakes of servers in this folder.
Must never: leave its thread, or a connection, behind.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from support.deadlines import Deadline

T = TypeVar("T")


class Background:
    """
    One loop, one thread, while in ``with``.
    """

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="background", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(Deadline.SETTLE.s)
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """
        Blocks: until the work is done there; up to Deadline.SETTLE.
        """
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(Deadline.SETTLE.s)

    def call(self, work: Callable[[], T]) -> T:
        """
        The same for what needs no await.
        """

        async def called() -> T:
            return work()

        return self.run(called())

    async def _cancel_all(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
