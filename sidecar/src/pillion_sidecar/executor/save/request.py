"""
The whole of: what the supervisor asks the executor to persist: one save.

Producer: `supervisor.executor_client`. Consumer: `executor.save.persist`, `executor.save.dcp_writer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the supervisor asks for."""

    step: int
    slot: int
    persist: bool
    destination: Mapping[str, Any] | None
    sequence: int
    """Distinguishes saves to one directory; 0 where each step has its own."""
    started_ns: int = 0
    """When the save began, wall clock; 0: nobody knows."""
    rescued: bool = False
    """It was a snapshot for memory only, and its trainers are gone."""
    repeated: bool = False
    """Another executor may have begun it: peers may be ahead by an attempt."""
    cause: str = ""
    """What made it due."""

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Request:
        return cls(
            step=int(document["step"]),
            slot=int(document["slot"]),
            persist=bool(document["persist"]),
            destination=document.get("destination"),
            sequence=int(document.get("sequence", 0)),
            started_ns=int(document.get("started_ns", 0)),
            rescued=bool(document.get("rescued", False)),
            repeated=bool(document.get("repeated", False)),
            cause=str(document.get("cause", "")),
        )
