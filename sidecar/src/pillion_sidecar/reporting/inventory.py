"""
The inventory of the storage for reports: every committed checkpoint with its size, times, number of ranks and cause.

Called from: `reporting.reporter`, in a separate thread, as storage may hang. A look lists the root once, and reads the small manifest of each
new checkpoint. Known checkpoints are remembered.
`pin` carries out the pins that the controller asks for.
Must never: write anything but the probe and pins of the cluster, or judge whether a checkpoint is damaged (a load does that).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pillion.wire import home, manifest, names
from pillion.wire.remarks import Remarks
from pillion_sidecar.checkpoint import catalog, commit, pins
from pillion_sidecar.status.status import rfc3339
from pillion_sidecar.storage.folder import Folder

AGAIN_S: Final = 60.0
"""Interval at which known checkpoints are read again, because another process may have removed or replaced them. Also the interval at which
the root is probed with a small file."""


PIN_REASON: Final = "annotation pillion.dev/pin of the Checkpoint object"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    marker_ns: int
    entry: home.CommittedCheckpoint


def _joined(holders: Iterable[str]) -> str:
    """Return the holders as a report has them: the cluster's first, and as many more as there is room for. Pure."""
    joined = ""
    for holder in sorted(holders, key=lambda each: (each != home.CLUSTER, each)):
        longer = f"{joined},{holder}" if joined else holder
        if len(longer) <= home.MAX_PINNED_BY:
            joined = longer
    return joined


class Inventory:
    """
    See the module.

    Args:
        root: the folder of the job's checkpoints.
    """

    def __init__(self, root: Folder) -> None:
        self._root = root
        self._known: dict[int, _Known] = {}
        self._looked_s: float | None = None
        self._problem = ""
        self._pinned: Mapping[int, tuple[str, ...]] = {}

    def look(self, now_s: float, stale: frozenset[int]) -> tuple[tuple[home.CommittedCheckpoint, ...], str]:
        """
        Return the committed checkpoints, newest first, at most `home.MAX_CHECKPOINTS`; and why the storage is unusable, empty if it works.

        Args:
            now_s: monotonic time, seconds.
            stale: steps that were written again since the last look.

        Raises:
            OSError: the root cannot be listed.
        """
        listed = [names.parse_step_directory(each) for each in self._root.folders()]
        steps = sorted((step for step in listed if step is not None), reverse=True)
        again = self._looked_s is None or now_s - self._looked_s >= AGAIN_S
        if again:
            self._looked_s = now_s
            self._pinned = pins.pinned(self._root)
        if again or self._problem:
            self._problem = "; ".join(self._root.check())
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
        return tuple(self._with_pins(before.entry) for before in committed.values()), self._problem

    def pin(self, pin: Collection[int], unpin: Collection[int]) -> None:
        """
        Set and remove pins of the cluster. The next look has them. A step without a committed checkpoint is passed over.

        Raises:
            OSError: the storage failed. Some may be set or removed.
        """
        self._pinned = pins.pinned(self._root)
        for step in pin:
            if home.CLUSTER not in self._pinned.get(step, ()):
                try:
                    pins.pin(self._root, step, holder=home.CLUSTER, reason=PIN_REASON)
                    _log.info("step %d is pinned for the cluster", step)
                except FileNotFoundError:
                    _log.warning("step %d cannot be pinned for the cluster: it is not on storage any more", step)
        for step in unpin:
            if pins.unpin(self._root, step, holder=home.CLUSTER):
                _log.info("step %d is not pinned for the cluster any more", step)
        self._pinned = pins.pinned(self._root)

    def _with_pins(self, entry: home.CommittedCheckpoint) -> home.CommittedCheckpoint:
        holders = self._pinned.get(entry.step, ())
        return dataclasses.replace(entry, pinned_by=_joined(holders)) if holders else entry

    def _look_at(self, step: int, before: _Known | None) -> _Known | None:
        folder = catalog.step_folder(self._root, step)
        marker = folder.entry(names.COMMIT_MARKER)
        if marker is None:
            return None  # not committed, or removed while we look
        if before is not None and before.marker_ns == marker.modified_ns:
            return before
        return _Known(marker.modified_ns, self._entry(step, folder, marker.modified_ns / 1e9))

    def _entry(self, step: int, folder: Folder, written_s: float) -> home.CommittedCheckpoint:
        # Paths in reports begin with what the root is called in its volume; a URL is whole.
        shown = str(folder) if self._root.path is None else f"{self._root.name}/{folder.name}"
        try:
            decoded = manifest.decode_manifest(commit.read_manifest(folder))
        except (FileNotFoundError, manifest.ManifestError):
            # Written by stock DCP, or by a release after this one.
            return home.CommittedCheckpoint(
                step=step, path=shown, size_bytes=catalog.size_bytes(folder), completed=rfc3339(written_s)
            )
        return home.CommittedCheckpoint(
            step=step,
            path=shown,
            size_bytes=decoded.size_bytes,
            world_size=decoded.world_size,
            started=rfc3339(decoded.started_ns / 1e9) if decoded.started_ns else "",
            completed=rfc3339(decoded.created_ns / 1e9),
            cause=decoded.cause or home.Cause.PERIODIC.value,
            metrics=_reported(decoded.remarks),
        )


def _reported(said: Remarks) -> dict[str, Any]:
    """Return the metrics that a report has room for."""
    short = [
        (name, value)
        for name, value in said.metrics_document.items()
        if len(json.dumps(name)) <= home.MAX_METRIC_NAME_BYTES
    ]
    return dict(short[: home.MAX_METRICS])
