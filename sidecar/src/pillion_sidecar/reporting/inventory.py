"""
The whole of: what storage holds now, for reports: every committed checkpoint with its size, times, ranks and cause.

Called from: `reporting.reporter`, in a thread of its own: storage may hang. A look costs one listing of the root, and for each checkpoint that
is new a small manifest; the rest is remembered.
Must never: write anything but the probe, or take a checkpoint for damaged (that is the loader's business).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from pillion.wire import home, manifest, names
from pillion_sidecar.arena.pod_arena import check_root
from pillion_sidecar.checkpoint import catalog, commit
from pillion_sidecar.status.status import rfc3339

AGAIN_S: Final = 60.0
"""How often what is remembered is looked at again: somebody else may have removed a checkpoint's marker, or written another. Also
how often the root is probed with a small file."""


@dataclass(frozen=True, slots=True)
class _Known:
    marker_ns: int
    entry: home.CommittedCheckpoint


class Inventory:
    """
    See the module.

    Args:
        root: the directory of the job's checkpoints.
        name: what it is called in the volume; paths in reports begin with it.
    """

    def __init__(self, root: str, name: str) -> None:
        self._root = root
        self._name = name
        self._known: dict[int, _Known] = {}
        self._looked_s: float | None = None
        self._problem = ""

    def look(self, now_s: float, stale: frozenset[int]) -> tuple[tuple[home.CommittedCheckpoint, ...], str]:
        """
        What is committed, newest first, `home.MAX_CHECKPOINTS` at most; and why the storage cannot be used, empty when it can.

        Args:
            now_s: monotonic.
            stale: steps that were written anew since the last look.

        Raises:
            OSError: the root cannot be listed.
        """
        try:
            listed = [names.parse_step_directory(each) for each in os.listdir(self._root)]
        except FileNotFoundError:
            listed = []
        steps = sorted((step for step in listed if step is not None), reverse=True)
        again = self._looked_s is None or now_s - self._looked_s >= AGAIN_S
        if again:
            self._looked_s = now_s
        if again or self._problem:
            self._problem = "; ".join(check_root(self._root))
        committed: dict[int, _Known] = {}
        for step in steps:
            if len(committed) == home.MAX_CHECKPOINTS:
                break
            before = self._known.get(step)
            if before is None or again or step in stale:
                before = self._look_at(step, None if step in stale else before)
            if before is not None:
                committed[step] = before
        self._known = committed
        return tuple(before.entry for before in committed.values()), self._problem

    def _look_at(self, step: int, before: _Known | None) -> _Known | None:
        directory = names.step_directory(step)
        path = os.path.join(self._root, directory)
        try:
            marker = os.stat(os.path.join(path, names.COMMIT_MARKER))
            if before is not None and before.marker_ns == marker.st_mtime_ns:
                return before
            entry = self._entry(step, directory, path, marker.st_mtime)
        except FileNotFoundError:
            return None  # not committed, or removed while we look
        return _Known(marker.st_mtime_ns, entry)

    def _entry(self, step: int, directory: str, path: str, written_s: float) -> home.CommittedCheckpoint:
        shown = os.path.join(self._name, directory)
        try:
            decoded = manifest.decode_manifest(commit.read_manifest(path))
        except (FileNotFoundError, manifest.ManifestError):
            # Written by stock DCP, or by a release after this one.
            return home.CommittedCheckpoint(
                step=step, path=shown, size_bytes=catalog.size_bytes(path), completed=rfc3339(written_s)
            )
        return home.CommittedCheckpoint(
            step=step,
            path=shown,
            size_bytes=decoded.size_bytes,
            world_size=decoded.world_size,
            started=rfc3339(decoded.started_ns / 1e9) if decoded.started_ns else "",
            completed=rfc3339(decoded.created_ns / 1e9),
            cause=decoded.cause or home.Cause.PERIODIC.value,
        )
