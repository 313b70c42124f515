"""
Reads of the storage for the supervisor: in a thread beside its event loop, one at a time, each with a timeout.

Called from: `supervisor.sessions`, `supervisor.session_policy`, the supervisor. Storage that hangs must not keep the supervisor from
answering its trainers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from pillion.errors import SidecarError
from pillion.wire.policy import Policy
from pillion_sidecar.concurrency import blocking
from pillion_sidecar.storage import opening
from pillion_sidecar.storage.folder import Folder

T = TypeVar("T")

ROOT_TIMEOUT_S: Final = 60.0
"""Timeout for a read of the storage: a check of the root, or a search for the newest checkpoint. Network file systems under load take
seconds."""


class RootAccess:
    """
    Runs reads of the storage. See the module.

    Args:
        ca_file: path of the authorities that are trusted beside the system's, for a bucket; empty: none.

    Owns: one thread, until `close`.
    """

    def __init__(self, ca_file: str) -> None:
        self._ca_file = ca_file
        self._caller, self._turn = blocking.BlockingCaller("root"), asyncio.Lock()

    def open(self, root: str, session_policy: Policy) -> Folder:
        """Return the folder that a root names, with what the policy says of its kind. No I/O. Raises: SettingsError."""
        return opening.open_folder(root, session_policy.storage.object_store, ca_file=self._ca_file)

    async def look_at(self, path: str, call: Callable[[], T], bound_s: float | None = None) -> T:
        """
        Run `call`, which reads `path`, in the thread. Return its result, or raise its error.

        Blocks: up to `bound_s` (None: ROOT_TIMEOUT_S), after the earlier calls.

        Raises:
            SidecarError: the storage does not answer.
        """
        bound_s = ROOT_TIMEOUT_S if bound_s is None else bound_s
        try:
            async with self._turn:
                return await self._caller.run(call, bound_s)
        except TimeoutError:
            raise SidecarError(
                f"the storage of {path} has not answered for {bound_s:.0f} s: it hangs, or is lost"
            ) from None
        except blocking.StillBusy:
            raise SidecarError(
                f"the storage of {path} has not answered an earlier request yet: it is slow, hangs, or is lost"
            ) from None

    def close(self) -> None:
        """Let the thread end after its current call. Blocks: never."""
        self._caller.close()
