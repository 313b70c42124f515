"""
The protocol of the exchange: the pods of a job send each other small documents about a save or a load, under named phases.

Called from: the executor. There are three implementations: `LocalExchange` here (all ranks in one pod: a dict), `StoreExchange` in
`executor.exchange.tcpstore` (a prefix of the job's TCPStore), `StorageExchange` in `executor.exchange.storage` (files, if the store is lost).
The coordinator is the pod of rank 0.

    every pod:    post(phase, document)
    coordinator:  collect(phase) -> {pod: document}, decide, publish(phase, document)
    every pod:    receive(phase) -> document

A second post overwrites the first: the successor of a dead executor repeats its work from the start, with the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from pillion.errors import BarrierTimeout, SidecarError

Document = dict[str, Any]


PIECE_S: Final = 1.0
"""Length of the slices of a wait for peers. Between two slices, the wait checks whether the session has ended, or the peers use the exchange on
storage by now (`SlicedExchange`)."""


def nothing() -> None:
    """Do nothing between two slices, for a wait that nothing interrupts."""


class StoreLost(SidecarError):
    """The job's store is gone for all pods, because its process has ended."""


class Exchange(Protocol):
    """
    Documents of one session, by phase and pod. See the module.

    `timeout_s` bounds every wait. Then the wait raises `BarrierTimeout`, which names the missing ranks. Any call may raise `StoreLost`.
    """

    def post(self, phase: str, document: Document) -> None:
        """(every pod) Post this pod's document."""

    def collect(self, phase: str, timeout_s: float) -> dict[int, Document]:
        """(coordinator) Wait for the documents of all pods. Return them by the pod's first rank."""

    def publish(self, phase: str, document: Document) -> None:
        """(coordinator; for a layout the pod that has it) Publish a document for all pods."""

    def receive(self, phase: str, timeout_s: float) -> Document:
        """(every pod) Wait for the published document, and return it."""

    def forget(self, phases: Sequence[str]) -> None:
        """(coordinator) Delete all posted and published documents of phases that every pod has left."""

    def unpublish(self, phases: Sequence[str]) -> None:
        """(coordinator) Delete the published documents under names that have no posted ones."""


class SlicedExchange(Exchange, Protocol):
    """An exchange whose waits call `look` at least each PIECE_S. An error of `look` ends the wait. All three implementations are sliced."""

    def collect(self, phase: str, timeout_s: float, look: Callable[[], None] = nothing) -> dict[int, Document]: ...

    def receive(self, phase: str, timeout_s: float, look: Callable[[], None] = nothing) -> Document: ...


class LocalExchange:
    """The exchange of a job of one pod: a dict. Nothing is waited for."""

    def __init__(self, first_rank: int) -> None:
        self._first_rank = first_rank
        self._posted: dict[str, Document] = {}
        self._published: dict[str, Document] = {}

    def post(self, phase: str, document: Document) -> None:
        self._posted[phase] = document

    def collect(self, phase: str, timeout_s: float, look: Callable[[], None] = nothing) -> dict[int, Document]:
        if phase not in self._posted:
            raise BarrierTimeout(phase=phase, missing=[self._first_rank], waited_s=0.0)
        return {self._first_rank: self._posted[phase]}

    def publish(self, phase: str, document: Document) -> None:
        self._published[phase] = document

    def receive(self, phase: str, timeout_s: float, look: Callable[[], None] = nothing) -> Document:
        if phase not in self._published:
            raise BarrierTimeout(phase=phase, missing=[0], waited_s=0.0)
        return self._published[phase]

    def forget(self, phases: Sequence[str]) -> None:
        for phase in phases:
            self._posted.pop(phase, None)
        self.unpublish(phases)

    def unpublish(self, phases: Sequence[str]) -> None:
        for phase in phases:
            self._published.pop(phase, None)


def encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def decode(data: bytes | str) -> Document:
    """
    Read a document.

    Raises:
        ValueError: not a document, as another program writes under these keys.
    """
    try:
        document = json.loads(data)
    except RecursionError as err:
        raise ValueError("a document of the exchange is nested too deep") from err
    if not isinstance(document, dict):
        raise ValueError("a document of the exchange must be an object")
    return document
