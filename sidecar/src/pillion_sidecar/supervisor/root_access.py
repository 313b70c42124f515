"""
The supervisor's looks at the storage: beside its loop, one at a time, each with a bound.

Called from: `supervisor.sessions`, `supervisor.session_policy`, the supervisor. Storage that hangs must not keep the supervisor from
answering its trainers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from pillion.errors import SidecarError
from pillion_sidecar.concurrency import blocking

T = TypeVar("T")

ROOT_TIMEOUT_S: Final = 60.0
"""Bound for the storage to show whether it can be used, or what its newest checkpoint is; network file systems under load take seconds."""


class RootAccess:
    """
    See the module.

    Owns: one thread, until `close`.
    """

    def __init__(self) -> None:
        self._caller, self._turn = blocking.BlockingCaller("root"), asyncio.Lock()

    async def look_at(self, path: str, call: Callable[[], T], bound_s: float | None = None) -> T:
        """
        What `call` returns, or raises, of a path on the storage.

        Blocks: up to `bound_s` (None: ROOT_TIMEOUT_S), behind the looks before it.

        Raises:
            SidecarError: the storage does not answer.
        """
        bound_s = ROOT_TIMEOUT_S if bound_s is None else bound_s
        try:
            async with self._turn:
                return await self._caller.run(call, bound_s)
        except (TimeoutError, blocking.StillBusy):
            raise SidecarError(
                f"the storage of {path} has not answered for {bound_s:.0f} s: it hangs, or is lost"
            ) from None

    def close(self) -> None:
        """Let the thread end. Blocks: never."""
        self._caller.close()
