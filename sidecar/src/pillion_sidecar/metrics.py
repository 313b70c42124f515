"""
Every counter of the sidecar, declared once. Called from: the supervisor. Plain numbers; the exporter reads them.

Names after the field's habits: stage, stall, persist, commit seconds; bytes; last committed step.
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
    saves_waited: int = 0
    """Claims that had to wait for a slot (`overlap: Wait`)."""
    snapshots: int = 0
    loads_arena: int = 0
    loads_storage: int = 0
    checkpoints_refused: int = 0
    executor_restarts: int = 0
    persisted_bytes: int = 0
    persist_seconds: float = 0.0
    commit_seconds: float = 0.0
    last_committed_step: int = -1
    failures_by_kind: dict[str, int] = field(default_factory=dict)

    def to_document(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
