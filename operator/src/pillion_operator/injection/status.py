"""
The whole of: the annotation ``pillion.dev/status``: what injection did to a pod, and what was there before.

Producer: the injection. Consumer: the injection, when it sees the pod again or takes the sidecar out; the controller; people.
Breaking changes: removing or renaming a field. A reader ignores fields that it does not know, and takes a version that it does not
know for no status at all.

Must never: be trusted with more than the pod's own fields; everyone who creates a pod can write it.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Final

from pillion_operator.injection import annotations, pods, shape
from pillion_operator.injection.pods import Json

VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """The fields that injection changed, as opposed to added: the value before, and the value that it set."""

    grace_s: int | None = None
    """`terminationGracePeriodSeconds`. None: not said."""
    grace_set_s: int | None = None
    resources: Json | None = None
    """The pod's own `resources`, not those of a container. None: not said."""
    resources_set: Json | None = None
    python_path: dict[str, str] = field(default_factory=dict)
    """By trainer container: the literal PYTHONPATH that it had."""
    declared: Json | None = None
    """The container ``pillion-sidecar`` that the pod declared itself, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A record of the injection of a pod."""

    policy: str
    policy_uid: str
    policy_generation: int
    job_kind: str
    job_name: str
    job_id: str
    image: str
    containers: tuple[str, ...]
    """The trainer containers."""
    before: Before
    warnings: tuple[str, ...] = ()
    """Warnings about the pod, for the Event on its owner."""


_FIELDS: Final = {each.name for each in dataclasses.fields(Status)}
_BEFORE: Final = {each.name for each in dataclasses.fields(Before)}


def dump(status: Status) -> str:
    """The annotation's value: the same text for the same status."""
    document = dataclasses.asdict(status)
    document["before"] = {key: value for key, value in document["before"].items() if value not in (None, {})}
    if not status.warnings:
        del document["warnings"]
    return json.dumps({"version": VERSION} | document, separators=(",", ":"), sort_keys=True)


def read(pod: Json) -> Status | None:
    """The status in a pod's annotation; None where there is none, or one of another version, or no status at all."""
    text = pods.metadata_map(pod, "annotations").get(annotations.STATUS, "")
    try:
        document: dict[str, Any] = json.loads(text)
        if document.pop("version") != VERSION or shape.status_problem(document):
            return None
        # A null is an absent field: one that may be absent has its default then, one that may not is a TypeError.
        fields = {key: value for key, value in document.items() if value is not None and key in _FIELDS}
        before = {key: value for key, value in fields.pop("before").items() if value is not None and key in _BEFORE}
        fields |= {key: tuple(fields[key]) for key in ("containers", "warnings") if key in fields}
        return Status(**fields | {"before": Before(**before)})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
