"""
The whole of: the kept part of a Checkpoint object, its status as a value, and the objects of each job.

Called from: the controller.
Must never: set `is_ours` for an object that the controller did not create: `is_ours` allows its deletion.
"""

import hashlib
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from pillion.wire import policy
from pillion_operator.home.registry import JobKey

Json = dict[str, Any]

API_VERSION: Final = policy.API_VERSION
KIND: Final = "Checkpoint"
ON_DEMAND: Final = "OnDemand"
MIRROR_LABEL: Final = "pillion.dev/mirror"
"""
Label of objects that the controller created; its value is `mark`. `kubectl get checkpoints -l pillion.dev/mirror` lists them.
"""
PIN: Final = "pillion.dev/pin"
"""Annotation of a Checkpoint object: "true" pins its step on storage; "false", or its removal, lets it go."""
READY: Final = "Ready"
TRUE: Final = "True"
FALSE: Final = "False"
UNKNOWN: Final = "Unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The status of a Checkpoint object. Empty, None or 0: not said."""

    policy: str = ""
    step: int | None = None
    path: str = ""
    size: str = ""
    world_size: int = 0
    started: str = ""
    completed: str = ""
    metrics: tuple[tuple[str, str], ...] = ()
    """Name and value of each metric that the script gave with the save."""
    pinned_by: str = ""
    """Holders of its pins on storage, separated by commas."""
    ready: str = ""
    """Status of the condition Ready."""
    reason: str = ""
    message: str = ""
    changed: str = ""
    """When `ready` last changed."""

    def to_json(self) -> Json:
        """As the API server stores it. An empty field is None, which removes it in a merge patch."""
        condition = {
            "type": READY,
            "status": self.ready,
            "lastTransitionTime": self.changed,
            "reason": self.reason,
            "message": self.message,
        }
        return {
            "policy": self.policy or None,
            "step": self.step,
            "path": self.path or None,
            "size": self.size or None,
            "worldSize": self.world_size or None,
            "startTime": self.started or None,
            "completionTime": self.completed or None,
            "metrics": [{"name": name, "value": value} for name, value in self.metrics] or None,
            "pinnedBy": self.pinned_by or None,
            "conditions": [condition] if self.ready else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A Checkpoint object."""

    namespace: str
    name: str
    uid: str
    created: str
    job_id: str
    trigger: str
    is_ours: bool
    status: Status
    pin: bool | None = False
    """Whether somebody wants its step pinned. None: the annotation has a value that says neither."""

    @property
    def key(self) -> JobKey:
        return JobKey(self.namespace, self.job_id)

    @property
    def is_request(self) -> bool:
        """Whether somebody made it to have a save."""
        return not self.is_ours and self.trigger == ON_DEMAND

    @property
    def is_open(self) -> bool:
        """Whether it is a request that has neither failed nor been fulfilled."""
        return self.is_request and self.status.ready not in (TRUE, FALSE)

    @property
    def about(self) -> Json:
        """The reference to it in an event."""
        named = {"namespace": self.namespace, "name": self.name, "uid": self.uid}
        return {"apiVersion": API_VERSION, "kind": KIND} | named


def mark(namespace: str, name: str, job_id: str) -> str:
    """
    The label's value of an object that we make.

    It is valid for this object alone: a copy under another name belongs to the user who applied it.
    """
    return hashlib.sha256(f"{namespace}/{name}/{job_id}".encode()).hexdigest()[:16]


def project(document: Json) -> Checkpoint:
    """A Checkpoint object as the API server gives it."""
    metadata, spec = document["metadata"], document.get("spec") or {}
    namespace, name = sys.intern(str(metadata.get("namespace") or "")), str(metadata.get("name") or "")
    job_id = sys.intern(str(spec.get("jobID") or ""))
    marked = (metadata.get("labels") or {}).get(MIRROR_LABEL)
    return Checkpoint(
        namespace=namespace,
        name=name,
        uid=str(metadata.get("uid") or ""),
        created=str(metadata.get("creationTimestamp") or ""),
        job_id=job_id,
        trigger=sys.intern(str(spec.get("trigger") or ON_DEMAND)),
        is_ours=marked == mark(namespace, name, job_id),
        status=_status(document.get("status") or {}),
        pin=_PINS.get((metadata.get("annotations") or {}).get(PIN, "false")),
    )


_PINS: Final = {"true": True, "false": False}


def _status(document: Json) -> Status:
    conditions = document.get("conditions") or []
    ready: Json = next((each for each in conditions if each.get("type") == READY), {})
    return Status(
        policy=sys.intern(str(document.get("policy") or "")),
        step=document.get("step"),
        path=str(document.get("path") or ""),
        size=sys.intern(str(document.get("size") or "")),
        world_size=document.get("worldSize") or 0,
        started=str(document.get("startTime") or ""),
        completed=str(document.get("completionTime") or ""),
        metrics=tuple((str(each.get("name")), str(each.get("value"))) for each in document.get("metrics") or []),
        pinned_by=sys.intern(str(document.get("pinnedBy") or "")),
        ready=sys.intern(str(ready.get("status") or "")),
        reason=sys.intern(str(ready.get("reason") or "")),
        message=sys.intern(str(ready.get("message") or "")),
        changed=str(ready.get("lastTransitionTime") or ""),
    )


class Checkpoints:
    """The Checkpoint objects by job: fed by a Reflector, and by what we write, which the Reflector brings again a little later."""

    def __init__(self, on_change: Callable[[JobKey], None]) -> None:
        """
        Args:
            on_change: called with the job of each object that is new, gone or another.
        """
        self._on_change = on_change
        self._by_job: dict[JobKey, dict[str, Checkpoint]] = {}
        self._open: dict[JobKey, dict[str, Checkpoint]] = {}

    def changed(self, _: tuple[str, str], old: Checkpoint | None, new: Checkpoint | None) -> None:
        """Take a change in; called by a Reflector."""
        if new is not None:
            self.put(new)
        elif old is not None:
            self.remove(old)

    def put(self, checkpoint: Checkpoint) -> None:
        """Store an object."""
        key = checkpoint.key
        objects = self._by_job.setdefault(key, {})
        before = objects.get(checkpoint.name)
        objects[checkpoint.name] = checkpoint
        if checkpoint.is_open:
            self._open.setdefault(key, {})[checkpoint.name] = checkpoint
        else:
            self._close(checkpoint)
        if before != checkpoint:
            self._on_change(key)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Forget an object."""
        objects = self._by_job.get(checkpoint.key, {})
        current = objects.get(checkpoint.name)
        # Its successor of the same name may have come before the news of its end.
        if current is None or current.uid != checkpoint.uid:
            return
        del objects[checkpoint.name]
        if not objects:
            del self._by_job[checkpoint.key]
        self._close(checkpoint)
        self._on_change(checkpoint.key)

    def for_job(self, key: JobKey) -> Collection[Checkpoint]:
        """The objects of a job."""
        return self._by_job.get(key, {}).values()

    def open_requests(self, key: JobKey) -> Collection[Checkpoint]:
        """The objects of a job that request a save and wait for it."""
        return self._open.get(key, {}).values()

    def keys_with_requests(self) -> list[JobKey]:
        """The jobs with open requests."""
        return list(self._open)

    def __len__(self) -> int:
        return sum(map(len, self._by_job.values()))

    def _close(self, checkpoint: Checkpoint) -> None:
        waiting = self._open.get(checkpoint.key)
        if waiting is not None and waiting.pop(checkpoint.name, None) is not None and not waiting:
            del self._open[checkpoint.key]
