"""
The exchange of several pods over the storage that they share: slower than a store, and there when the job's store is not.

Called from: the executor, once the store is lost (`executor.session.with_failover`). The store lives in a trainer; storage outlives all of them, so
that the newest snapshot can still be agreed on and persisted when rank 0, which hosts the store, is dead.

    <root>/.pillion/meetings/<session>/<phase>.<first rank | decision>.json      each written once, atomically

A network file system may show a new name late to a client that has just looked for it (NFS: up to acdirmax, 60 s); each look here opens
the folder anew, which makes the client ask.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Final

from pillion.errors import BarrierTimeout, SidecarError
from pillion.wire import names
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.storage import durable

MEETINGS: Final = "meetings"
POLL_FIRST_S: Final = 0.02
POLL_MOST_S: Final = 0.5
"""Between two looks: 1,000 pods then ask the file system 2,000 times a second at most, for the seconds that a rescue takes."""
OVER: Final = "other trainers are there: the coordinator has removed what this session met in"
DECISION: Final = "decision"


class StorageExchange:
    """
    Phases as files. Implements `exchange.Exchange`.

    Args:
        root: the root of the checkpoints, the same folder in every pod.
        session: of these trainers; 32 hex digits.
        pods: ranks of every pod.
        first_rank: this pod's.
    """

    def __init__(self, root: str, session: str, pods: Sequence[Sequence[int]], first_rank: int) -> None:
        self._folder = os.path.join(root, names.INTERNAL_DIR, MEETINGS, session)
        self._pods = {int(pod[0]): [int(rank) for rank in pod] for pod in pods}
        self._first_rank = first_rank
        os.makedirs(self._folder, exist_ok=True)

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
        for phase in phases:
            for who in whose:
                with contextlib.suppress(OSError):
                    os.unlink(self._path(phase, who))

    def _path(self, phase: str, who: str) -> str:
        return os.path.join(self._folder, f"{phase.replace('/', '.')}.{who}.json")

    def _write(self, phase: str, who: str, document: protocol.Document) -> None:
        try:
            durable.replace_file(self._path(phase, who), protocol.encode(document))
        except FileNotFoundError as err:
            raise SidecarError(OVER) from err

    def _read(self, phase: str, who: str) -> protocol.Document:
        with open(self._path(phase, who), "rb") as file:
            return protocol.decode(file.read())

    def _wait(self, phase: str, awaited: dict[str, list[int]], timeout_s: float, look: Callable[[], None]) -> None:
        started = time.monotonic()
        pause_s = POLL_FIRST_S
        while True:
            try:
                there = set(os.listdir(self._folder))
            except FileNotFoundError as err:
                raise SidecarError(OVER) from err
            missing = {
                who: ranks for who, ranks in awaited.items() if os.path.basename(self._path(phase, who)) not in there
            }
            if not missing:
                return
            waited_s = time.monotonic() - started
            if waited_s >= timeout_s:
                ranks = sorted(rank for each in missing.values() for rank in each)
                raise BarrierTimeout(phase=phase, missing=ranks, waited_s=waited_s)
            time.sleep(min(pause_s, timeout_s - waited_s))
            look()
            pause_s = min(pause_s * 2, POLL_MOST_S)


def is_used(root: str, session: str) -> bool:
    """Whether some pod of this session meets on storage."""
    return bool(root) and os.path.isdir(os.path.join(root, names.INTERNAL_DIR, MEETINGS, session))


def forget_sessions(root: str, *, but: str) -> None:
    """Remove what earlier sessions left. Called from: the coordinator, when a session opens."""
    folder = os.path.join(root, names.INTERNAL_DIR, MEETINGS)
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name != but:
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
