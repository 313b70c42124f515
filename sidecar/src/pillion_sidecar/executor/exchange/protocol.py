"""
How the pods of a job tell each other about a save or a load: small documents under named phases.

Called from: the executor. Three implementations: `LocalExchange` here (all ranks in one pod: a dict), `StoreExchange` in
`executor.exchange.tcpstore` (a prefix of the job's TCPStore), `StorageExchange` in `executor.exchange.storage` (files, when the store is lost).
The coordinator is the pod of rank 0.

    every pod:    post(phase, document)
    coordinator:  collect(phase) -> {pod: document}, decide, publish(phase, document)
    every pod:    receive(phase) -> document

Posting twice overwrites: an executor that died is repeated by its successor from the start, with the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from pillion.errors import BarrierTimeout, SidecarError

Document = dict[str, Any]


PIECE_S: Final = 1.0
"""How long a wait for others goes on before it asks whether it is to go on (`SlicedExchange`): a store that does not answer is noticed
this long, and its bound, after the question; a session that ended is left within it."""


def nothing() -> None:
    """For a wait that nobody interrupts."""


class StoreLost(SidecarError):
    """The store that the pods meet in is gone, for all of them: it lived in a process that ended."""


class Exchange(Protocol):
    """
    See the module. All waits are bounded by `timeout_s` and end in `BarrierTimeout`, which names the missing ranks; any call
    may raise `StoreLost`.
    """

    def post(self, phase: str, document: Document) -> None:
        """(every pod) Say this pod's part."""

    def collect(self, phase: str, timeout_s: float) -> dict[int, Document]:
        """(coordinator) Wait for all pods' parts, by the pod's first rank."""

    def publish(self, phase: str, document: Document) -> None:
        """(coordinator; a layout: the pod that has it) Say what everybody may read."""

    def receive(self, phase: str, timeout_s: float) -> Document:
        """(every pod) Wait for the decision."""

    def forget(self, phases: Sequence[str]) -> None:
        """(coordinator) Delete all that was posted and published under phases that every pod has left."""

    def unpublish(self, phases: Sequence[str]) -> None:
        """(coordinator) Delete what was published, and never posted, under these names."""


class SlicedExchange(Exchange, Protocol):
    """An exchange whose waits call `look` each PIECE_S or more often; what that raises ends them. All three are."""

    def collect(self, phase: str, timeout_s: float, look: Callable[[], None] = nothing) -> dict[int, Document]: ...

    def receive(self, phase: str, timeout_s: float, look: Callable[[], None] = nothing) -> Document: ...


class LocalExchange:
    """One pod has all ranks: nothing to wait for."""

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


def decode(data: bytes) -> Document:
    """
    Raises:
        ValueError: not a document; somebody else writes into our prefix.
    """
    try:
        document = json.loads(data)
    except RecursionError as err:
        raise ValueError("a document of the exchange is nested too deep") from err
    if not isinstance(document, dict):
        raise ValueError("a document of the exchange must be an object")
    return document
