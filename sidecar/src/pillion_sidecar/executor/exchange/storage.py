"""
The exchange on storage: the pods exchange documents as files on the storage that they share. It is slower than a store.

Called from: the executor, after the store is lost (`executor.session.with_failover`). The store lives in a trainer's process, and storage outlives
all trainers. So the pods can still agree on the newest snapshot, and persist it, when rank 0, which hosts the store, is dead.

    <root>/.pillion/meetings/<session>/<phase>.<first rank | decision>.json      each written once, atomically
    <root>/.pillion/meetings/<session>/open                                      missing: the session is over

A network file system may show a new name late to a client that has just looked for it (NFS: up to acdirmax, 60 s). Each check here opens the
folder again, which makes the client ask the server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

from pillion.errors import BarrierTimeout, SidecarError
from pillion.wire import names
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.storage.folder import Folder

MEETINGS: Final = "meetings"
"""Name of the folder below names.INTERNAL_DIR. It has a folder for each session that uses the exchange on storage."""
OPEN: Final = "open"
"""Name of a file that exists while the session may use this exchange."""
FIRST_POLL_S: Final = 0.02
"""First pause between two checks of the folder. Each further pause is twice as long."""
MAX_POLL_S: Final = 0.5
"""Maximum pause between two checks. 1,000 pods send the file system at most 2,000 requests a second, for the seconds of a rescue."""
OVER: Final = "another session has begun: the coordinator has removed the exchange of this one"
DECISION: Final = "decision"
"""Name of the published document of a phase, in place of a pod's first rank."""


class StorageExchange:
    """
    The exchange of one session, with a file for each document. Implements `protocol.SlicedExchange`.

    Args:
        root: the folder of the checkpoints, the same in every pod.
        session: the session of the trainers, 32 hex digits.
        pods: the ranks of every pod.
        first_rank: the first rank of this pod.
    """

    def __init__(self, root: Folder, session: str, pods: Sequence[Sequence[int]], first_rank: int) -> None:
        self._folder = _meetings(root).below(session)
        self._pods = {int(pod[0]): [int(rank) for rank in pod] for pod in pods}
        self._first_rank = first_rank
        self._folder.make()
        self._folder.put(OPEN, b"")

    def post(self, phase: str, document: protocol.Document) -> None:
        self._write(phase, str(self._first_rank), document)

    def collect(
        self, phase: str, timeout_s: float, look: Callable[[], None] = protocol.nothing
    ) -> dict[int, protocol.Document]:
        self._wait(phase, {str(first): ranks for first, ranks in self._pods.items()}, timeout_s, look)
        return {first: self._read(phase, str(first)) for first in sorted(self._pods)}

    def publish(self, phase: str, document: protocol.Document) -> None:
        self._write(phase, DECISION, document)

    def receive(self, phase: str, timeout_s: float, look: Callable[[], None] = protocol.nothing) -> protocol.Document:
        self._wait(phase, {DECISION: self._pods.get(0, [0])}, timeout_s, look)
        return self._read(phase, DECISION)

    def forget(self, phases: Sequence[str]) -> None:
        self._remove(phases, [*map(str, self._pods), DECISION])

    def unpublish(self, phases: Sequence[str]) -> None:
        self._remove(phases, [DECISION])

    def _remove(self, phases: Sequence[str], whose: Sequence[str]) -> None:
        with contextlib.suppress(OSError):
            self._folder.delete([_name(phase, who) for phase in phases for who in whose])

    def _write(self, phase: str, who: str, document: protocol.Document) -> None:
        try:
            self._folder.put(_name(phase, who), protocol.encode(document))
        except FileNotFoundError as err:
            raise SidecarError(OVER) from err

    def _read(self, phase: str, who: str) -> protocol.Document:
        return protocol.decode(self._folder.read(_name(phase, who)))

    def _wait(self, phase: str, awaited: dict[str, list[int]], timeout_s: float, look: Callable[[], None]) -> None:
        started = time.monotonic()
        pause_s = FIRST_POLL_S
        while True:
            there = self._folder.files()
            if OPEN not in there:
                raise SidecarError(OVER)
            missing = {who: ranks for who, ranks in awaited.items() if _name(phase, who) not in there}
            if not missing:
                return
            waited_s = time.monotonic() - started
            if waited_s >= timeout_s:
                ranks = sorted(rank for each in missing.values() for rank in each)
                raise BarrierTimeout(phase=phase, missing=ranks, waited_s=waited_s)
            time.sleep(min(pause_s, timeout_s - waited_s))
            look()
            pause_s = min(pause_s * 2, MAX_POLL_S)


def _name(phase: str, who: str) -> str:
    return f"{phase.replace('/', '.')}.{who}.json"


def _meetings(root: Folder) -> Folder:
    return root.below(f"{names.INTERNAL_DIR}/{MEETINGS}")


def is_used(root: Folder, session: str) -> bool:
    """Whether a pod of this session uses the exchange on storage. Raises: OSError."""
    return _meetings(root).below(session).entry(OPEN) is not None


def forget_sessions(root: Folder, *, but: str) -> None:
    """Remove the exchanges of earlier sessions. Called from: the coordinator, when a session opens."""
    with contextlib.suppress(OSError):
        for name in _meetings(root).folders():
            if name != but:
                folder = _meetings(root).below(name)
                folder.delete(folder.files())
                folder.remove_if_empty()
