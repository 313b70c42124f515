"""
Every counter of the sidecar, declared once. Called from: `status.status`, `supervisor.staging`, `supervisor.loader`, `supervisor.executor_client` (count), `reporting.prometheus`, `reporting.reporter` (read).

Plain numbers: who exports them reads them. A duration is a sum and a count. Names after the field's habits: stage, stall, persist,
commit seconds; bytes; last committed step.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Metrics:
    """What happened since this sidecar started."""

    saves_committed: int = 0
    saves_failed: int = 0
    saves_skipped: int = 0
    """Dropped by `overlap: Skip`."""
    saves_replaced: int = 0
    """Dropped by `overlap: Latest` for a newer one."""
    saves_interrupted: int = 0
    """Not sealed, as the trainers ended before."""
    saves_waited: int = 0
    """Claims that had to wait for a slot (`overlap: Wait`)."""
    snapshots: int = 0
    loads_arena: int = 0
    loads_storage: int = 0
    checkpoints_refused: int = 0
    executor_restarts: int = 0
    persisted_bytes: int = 0
    stages: int = 0
    stage_seconds: float = 0.0
    """From the first claim of a step in this pod until its last rank has sealed."""
    stalls: int = 0
    stall_seconds: float = 0.0
    """What a save held up its slowest rank of this pod, as the trainer measured it; overlapped saves are not in it."""
    queue_seconds: float = 0.0
    """Of committed saves: from the last seal in this pod until the executor took them up."""
    persist_seconds: float = 0.0
    """Of committed saves: from the last seal in this pod until the last byte was durable; the time in the queue is in it."""
    commit_seconds: float = 0.0
    last_committed_step: int = -1
    last_committed_timestamp: float = 0.0
    """Seconds since 1970; 0: none since this sidecar started."""
    storage_stalled_seconds: float = 0.0
    """How long storage has stood still now; 0: it has not, or not for long."""
    failures_by_kind: dict[str, int] = field(default_factory=dict)

    def to_document(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
