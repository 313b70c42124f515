"""
The session record, from which a restarted sidecar continues its session: the ranks, and the counts that all pods share.

Called from: `supervisor.executor_client` (writes), `supervisor.sessions` (reads it at the start). It is one small file in the runtime
directory, beside the arena, so that a restarted container adopts both or neither.
A record of an earlier release may lack fields, which then have their defaults. Unknown fields are ignored.
Must never: contain user data. A record of the wrong form is ignored.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pillion.wire import codec, control
from pillion_sidecar import shared_files

_log = logging.getLogger(__name__)

FILE: Final = "session.json"
KEPT_BEFORE: Final = 16
"""Maximum earlier sessions in the record. There would be more only if trainers died this often in a row before an executor had started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The counts of a session. All pods have the same numbers, because all ranks load and rescue together."""

    loads: int = 0
    """Number of loads that have begun."""
    epoch: int = 0
    """Number of loads that have succeeded."""
    rescues: int = 0
    """Number of rescues that were decided."""
    store_lost: bool = False
    """Whether the job's store is lost, so that the pods use the exchange on storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """See the module."""

    session: str
    hello: control.Hello
    """Who the ranks are, in the words of the hello that opened the session."""
    policy: Mapping[str, Any]
    root: str
    before: tuple[str, ...] = ()
    """Earlier sessions of this pod, newest first. Any of them may still be the root's owner, if no later one has claimed the root."""
    trainers: tuple[tuple[int, int], ...] = ()
    """Processes of the trainers, as `supervisor.returning.process` has them."""
    generation: int | None = None
    signals: int | None = None
    """Number of the last signal that was delivered. None: not known."""
    counts: Counts = field(default_factory=Counts)
    uploads: int = 0
    """Number of uploads that have ended, the same in every pod."""
    uploading: tuple[int, int, int] | None = None
    """Step, generation and epoch of the copy that is being uploaded. None: there is none, or the pods have not agreed on it."""


def write(runtime_dir: str, record: Record) -> None:
    """
    Replace the record. It is not synced, as the directory is in memory.

    Never raises: an error is logged, and the session continues without a record.
    """
    path = os.path.join(runtime_dir, FILE)
    try:
        with open(shared_files.create(f"{path}.new", 0o600), "w", encoding="utf-8") as file:
            json.dump(codec.write(record), file)
        os.replace(f"{path}.new", path)
    except OSError as err:
        _log.warning("cannot write the session record, so a restarted sidecar cannot continue this session: %s", err)


def read(runtime_dir: str) -> Record | None:
    """Return the record of the previous session. None if there is none, or if it cannot be read."""
    try:
        with open(os.path.join(runtime_dir, FILE), encoding="utf-8") as file:
            record: Record = codec.read(Record, json.load(file))
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, codec.Wrong) as err:
        _log.warning("ignored an unreadable session record: %r", err)
        return None
