"""
What a sidecar's successor needs to go on with the session that it finds: who the ranks are, and how far the pods have counted together.

Called from: `supervisor.executor_client` (writes), the supervisor at its start (reads). One small file in the runtime directory: it lives and dies with the
arena, so that a restarted container adopts both, or neither.
Must never: hold anything of a user's; be trusted beyond its types (a damaged one is none).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pillion_sidecar import shared_files

_log = logging.getLogger(__name__)

FILE: Final = "session.json"
KEPT_BEFORE: Final = 16
"""Sessions that are remembered: trainers that die faster than an executor starts would have to do so this often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the executor of a session has counted; equal in every pod where the pods have agreed on it."""

    loads: int = 0
    """Loads that were begun: all ranks load together."""
    epoch: int = 0
    """Loads that ended well."""
    rescues: int = 0
    """Rescues that were decided."""
    store_lost: bool = False
    """The pods meet on storage."""

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Counts:
        return cls(
            loads=int(document.get("loads", 0)),
            epoch=int(document.get("epoch", 0)),
            rescues=int(document.get("rescues", 0)),
            store_lost=bool(document.get("store_lost", False)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """See the module."""

    session: str
    hello: Mapping[str, Any]
    """Who the ranks are, in the words of the hello that opened the session."""
    policy: Mapping[str, Any]
    root: str
    before: tuple[str, ...] = ()
    """The sessions that this pod served before it, the last one first: each may own the root, if those behind it never began there."""
    trainers: tuple[tuple[int, int], ...] = ()
    """Processes of the trainers, as `supervisor.returning.process` has them."""
    generation: int | None = None
    signals: int | None = None
    """Number of the last message to all pods that was passed on."""
    counts: Counts = field(default_factory=Counts)


def write(runtime_dir: str, record: Record) -> None:
    """Replace the record. No sync: the folder is memory. A full one is logged: the session goes on without."""
    path = os.path.join(runtime_dir, FILE)
    try:
        with open(shared_files.create(f"{path}.new", 0o600), "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(record), file)
        os.replace(f"{path}.new", path)
    except OSError as err:
        _log.warning("cannot write the session record, so a restarted sidecar cannot continue this session: %s", err)


def read(runtime_dir: str) -> Record | None:
    """The record of the session before; None: there was none, or it cannot be read."""
    try:
        with open(os.path.join(runtime_dir, FILE), encoding="utf-8") as file:
            document = json.load(file)
        return Record(
            session=str(document["session"]),
            hello=dict(document["hello"]),
            policy=dict(document["policy"]),
            root=str(document["root"]),
            before=tuple(str(each) for each in document.get("before", [])),
            trainers=tuple((int(pid), int(started)) for pid, started in document.get("trainers", [])),
            generation=None if document["generation"] is None else int(document["generation"]),
            signals=None if document["signals"] is None else int(document["signals"]),
            counts=Counts.from_document(document["counts"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        _log.warning("ignored an unreadable session record: %r", err)
        return None
