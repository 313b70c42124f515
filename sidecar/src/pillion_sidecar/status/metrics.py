"""
Every counter of the sidecar, declared once.

Called from: `status.status`, `supervisor.staging`, `supervisor.loader`, `supervisor.executor_client` (they count), `reporting.prometheus`,
`reporting.reporter` (they read). The counters are plain numbers. A duration is a sum and a count.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Counters since this sidecar started."""

    saves_committed: int = 0
    saves_failed: int = 0
    saves_skipped: int = 0
    """Saves that `overlap: Skip` dropped."""
    saves_replaced: int = 0
    """Saves that a newer one replaced (`overlap: Latest`)."""
    saves_interrupted: int = 0
    """Saves that were not sealed, because the trainers ended before."""
    saves_waited: int = 0
    """Claims that had to wait for a slot (`overlap: Wait`)."""
    saves_held: int = 0
    """Saves that every pod had on its local disk."""
    saves_passed_over: int = 0
    """Saves on the local disks that did not go to storage, because a newer one did."""
    saves_unheld: int = 0
    """Saves that went on without the local disks, because one was full, broken or hung."""
    last_held_step: int = -1
    uploads_failed: int = 0
    """Uploads from the local disks that failed. Their copies wait on."""
    uploads_waiting: int = 0
    """Saves on the local disks that wait for storage now, the one that is being uploaded included."""
    snapshots: int = 0
    snapshots_verified: int = 0
    """Snapshots that were verified between the death of their trainers and the load of their successors."""
    loads_arena: int = 0
    loads_local: int = 0
    loads_storage: int = 0
    checkpoints_refused: int = 0
    executor_restarts: int = 0
    persisted_bytes: int = 0
    stages: int = 0
    stage_seconds: float = 0.0
    """Time from the first claim of a step in this pod until its last rank has sealed it."""
    stalls: int = 0
    stall_seconds: float = 0.0
    """Time that a save held up the slowest rank of this pod, as the trainer measured it. Without overlapped saves."""
    queue_seconds: float = 0.0
    """Time from the last seal in this pod until the executor began. Committed saves only."""
    persist_seconds: float = 0.0
    """Time from the last seal in this pod until the last byte was durable, with the time in the queue. Committed saves only."""
    commit_seconds: float = 0.0
    last_committed_step: int = -1
    last_committed_timestamp: float = 0.0
    """Time of the last commit, seconds since 1970. 0: none since this sidecar started."""
    storage_stalled_seconds: float = 0.0
    """Time for which storage has not answered now. 0: it answers, or has been silent only briefly."""
    failures_by_kind: dict[str, int] = field(default_factory=dict)

    def to_document(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
