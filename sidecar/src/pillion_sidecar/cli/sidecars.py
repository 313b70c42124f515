"""
The sidecars that run on this machine for this user, or in this pod: where they are, and what they answer. Called from: `cli.saving`, `cli.doctor`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pillion import connection
from pillion.errors import SidecarUnavailable
from pillion.wire import control, names
from pillion_sidecar.cli.exits import Ended, Exit

ANSWER_TIMEOUT_S: Final = 5.0
"""Timeout for an answer of a sidecar. Its loop answers in milliseconds, unless it or the machine hangs."""


@dataclass(frozen=True, slots=True)
class Found:
    """A runtime directory, and what its sidecar answers."""

    runtime_dir: str
    status: control.Status | None = None
    problem: str = ""
    """Why there is no answer. A directory whose sidecar has ended is no problem of a running job."""

    @property
    def socket(self) -> str:
        return os.path.join(self.runtime_dir, names.CONTROL_SOCKET)


def find(environ: Mapping[str, str], runtime_dir: str = "") -> list[Found]:
    """
    Return the sidecars of this user: the one of a directory that is named or that injection has set, or else all on this machine.

    Blocks: up to ANSWER_TIMEOUT_S for each that does not answer.
    """
    named = runtime_dir or environ.get(names.ENV_RUNTIME_DIR, "")
    return [look(folder) for folder in ([named] if named else _folders())]


def _folders() -> list[str]:
    found = []
    for base in dict.fromkeys(("/dev/shm", tempfile.gettempdir())):
        found += sorted(Path(base).glob(f"{names.RUNTIME_PREFIX}{os.getuid()}-*/{names.CONTROL_SOCKET}"))
    # Anybody may make a directory of such a name. This user's sidecars have directories of their own.
    return [str(path.parent) for path in found if path.parent.lstat().st_uid == os.getuid()]


def look(runtime_dir: str) -> Found:
    """Ask one sidecar for its status. Blocks: up to ANSWER_TIMEOUT_S."""
    try:
        answer = connection.ask(os.path.join(runtime_dir, names.CONTROL_SOCKET), control.ReadStatus(), ANSWER_TIMEOUT_S)
    except SidecarUnavailable as err:
        return Found(runtime_dir, problem=str(err))
    if isinstance(answer, control.Failed):
        return Found(runtime_dir, problem=str(answer.error.get("message", answer.error)))
    return Found(runtime_dir, status=answer)


def of_root(found: list[Found], root: str) -> Found:
    """
    Return the one sidecar that answers, or the one of a root.

    Raises:
        Ended: none, or several, with what can be named.
    """
    answering = [each for each in found if each.status is not None]
    wanted = [each for each in answering if not root or _is_same(each.status, root)]
    if len(wanted) == 1:
        return wanted[0]
    shown = ", ".join(f"{each.status.root or 'no root yet'} ({each.runtime_dir})" for each in answering if each.status)
    if not answering:
        reasons = "; ".join(each.problem for each in found) or "none of this user runs on this machine"
        raise Ended(Exit.UNREACHABLE, f"no sidecar answers: {reasons}")
    if not wanted:
        raise Ended(Exit.FOUND, f"no sidecar here saves to {root}; those that run save to {shown}")
    raise Ended(Exit.USAGE, f"several sidecars run: name a ROOT, or one with --runtime-dir: {shown}")


def _is_same(status: control.Status | None, root: str) -> bool:
    if status is None or not status.root:
        return False
    if "://" in root or "://" in status.root:
        return root.rstrip("/") == status.root.rstrip("/")
    return os.path.realpath(root) == os.path.realpath(status.root)
