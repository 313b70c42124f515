"""
The whole of: the annotations and labels under ``pillion.dev/``: their names, their allowed values, and parsing them.

Called from: `decide`; the controller, for the names. `docs/reference/annotations.md` is this module in words.
Must never: stop at the first problem, or judge a value by anything but the value; limits of the policy are in `overrides`.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

PREFIX: Final = "pillion.dev/"
POLICY: Final = "pillion.dev/policy"
INJECT: Final = "pillion.dev/inject"
CONTAINERS: Final = "pillion.dev/containers"
JOB_ID: Final = "pillion.dev/job-id"
CLIENT: Final = "pillion.dev/client"
SIDECAR_IMAGE: Final = "pillion.dev/sidecar-image"
STAGING_SIZE_LIMIT: Final = "pillion.dev/staging-size-limit"
RESOURCES: Final = {
    "pillion.dev/sidecar-cpu-request": ("requests", "cpu"),
    "pillion.dev/sidecar-cpu-limit": ("limits", "cpu"),
    "pillion.dev/sidecar-memory-request": ("requests", "memory"),
    "pillion.dev/sidecar-memory-limit": ("limits", "memory"),
}
"""Place of each annotation's value in the resources of the sidecar. The arena is added to the memory afterwards."""
SAVE_NOW: Final = "pillion.dev/save-now"
"""Request for a save, on a running pod or its job. The controller reads it; injection does not."""
STATUS: Final = "pillion.dev/status"
"""Record of the injection, as JSON; `status` has the fields."""
INJECTED: Final = "pillion.dev/injected"
"""Label "true" of injected pods, by which the controller watches them."""

KNOWN: Final = (
    *(POLICY, INJECT, CONTAINERS, JOB_ID, CLIENT, SIDECAR_IMAGE, STAGING_SIZE_LIMIT),
    *RESOURCES,
    *(SAVE_NOW, STATUS),
)

# A DNS subdomain: what the API server takes as the name of an object.
_OBJECT_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_CONTAINER_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# A part of a path: neither empty, nor hidden, nor '..'.
_JOB_ID: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")
JOB_ID_ALLOWED: Final = "at most 253 letters, digits, '-', '_' and '.', a letter or digit first and last"
JOB_ID_FIELD: Final = re.compile(r"\$\((index|job-index)\)")
"""Placeholder in the annotation for a part that differs between the pods of one template."""
_IMAGE: Final = re.compile(r"[^\s@:/][^\s@]{0,511}(@sha256:[0-9a-f]{64})?")
_MAX_NAME: Final = 253
_MAX_UNKNOWN: Final = 20
"""
Maximum number of unknown annotations that are reported one by one. A pod may have ten thousand, and each is compared with all
known ones.
"""


class ClientSource(StrEnum):
    """Source of the trainer's client library."""

    INJECTED = "Injected"
    INSTALLED = "Installed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodAnnotations:
    """The annotations of a pod as values. A value that is not allowed counts as absent."""

    policy: str = ""
    """Name of the policy. Empty: the pod did not opt in."""
    inject: bool = True
    containers: tuple[str, ...] = ()
    """Trainer containers. Empty: injection chooses."""
    job_id: str = ""
    """Empty: from the pod's owner. It may hold `JOB_ID_FIELD`."""
    client: ClientSource = ClientSource.INJECTED
    image: str = ""
    """Empty: the operator's setting."""
    resources: Mapping[str, str]
    """By annotation, not yet judged: the policy's own reader does that."""
    staging_size_limit: str | None = None
    """Not yet validated. None: the policy's value."""


class Parsed(NamedTuple):
    """The annotations of one pod after one look at them."""

    annotations: PodAnnotations
    problems: list[str]
    """Every problem with how they are written."""


def parse(annotations: Mapping[str, str]) -> Parsed:
    """Parse the annotations of a pod."""
    problems: list[str] = []

    def read(name: str, pattern: re.Pattern[str], allowed: str) -> str:
        text = annotations.get(name, "")
        if name in annotations and ((len(text) > _MAX_NAME and name != SIDECAR_IMAGE) or not pattern.fullmatch(text)):
            problems.append(f"{name}: got {_clip(text)}; allowed: {allowed}")
            return ""
        return text

    unknown = [name for name in sorted(annotations) if name.startswith(PREFIX) and name not in KNOWN]
    for name in unknown[:_MAX_UNKNOWN]:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else "the annotations are " + ", ".join(KNOWN)
        problems.append(f"{name}: unknown annotation; {hint}")
    if len(unknown) > _MAX_UNKNOWN:
        problems.append(f"{len(unknown) - _MAX_UNKNOWN} more unknown annotations")
    inject = annotations.get(INJECT, "true")
    if inject not in ("true", "false"):
        problems.append(f'{INJECT}: got {_clip(inject)}; allowed: "true" or "false"')
    client = annotations.get(CLIENT, ClientSource.INJECTED.value)
    if client not in list(ClientSource):
        problems.append(f"{CLIENT}: got {_clip(client)}; allowed: one of {', '.join(ClientSource)}")
    names = tuple(name.strip() for name in annotations[CONTAINERS].split(",")) if CONTAINERS in annotations else ()
    if not all(_CONTAINER_NAME.fullmatch(name) for name in names) or len(set(names)) != len(names):
        allowed = "names of the pod's containers, each once, separated by commas"
        problems.append(f"{CONTAINERS}: got {_clip(annotations[CONTAINERS])}; allowed: {allowed}")
        names = ()
    job_id = annotations.get(JOB_ID, "")
    if JOB_ID in annotations and not is_job_id(JOB_ID_FIELD.sub("0", job_id)):
        problems.append(
            f"{JOB_ID}: got {_clip(job_id)}; allowed: {JOB_ID_ALLOWED}; $(index) and $(job-index) are replaced by the pod's own"
        )
        job_id = ""
    parsed = PodAnnotations(
        # An empty name is what matchConditions takes as not opted in, so it is no mistake here either.
        policy=read(POLICY, _OBJECT_NAME, "the name of a CheckpointPolicy") if annotations.get(POLICY) else "",
        inject=inject != "false",
        containers=names,
        job_id=job_id,
        client=ClientSource(client) if client in list(ClientSource) else ClientSource.INJECTED,
        image=read(SIDECAR_IMAGE, _IMAGE, "an image reference"),
        resources={name: annotations[name] for name in RESOURCES if name in annotations},
        staging_size_limit=annotations.get(STAGING_SIZE_LIMIT),
    )
    return Parsed(parsed, problems)


def is_job_id(text: str) -> bool:
    """Whether a text can name a job's checkpoints: it is one part of a path, and fits into a Checkpoint object."""
    return len(text) <= _MAX_NAME and _JOB_ID.fullmatch(text) is not None


def _clip(text: str) -> str:
    # An annotation may have a quarter of a MiB; a message of the API server should not.
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
