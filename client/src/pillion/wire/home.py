"""
Calling home: what a job's sidecar tells the controller every few seconds, and what it is told.

Producer of reports and consumer of answers: the coordinator's sidecar (`pillion_sidecar.reporting`). Consumer of reports and producer of
answers: the controller (`pillion_operator.home`).

    POST <PILLION_HOME_URL>/v1/report        Authorization: Bearer <token of the audience PILLION_TOKEN_AUDIENCE>
    Content-Type: application/json           a Report; 200 with an Answer, or a status of `Refused`

Who the pod is, the token says; whose job it is, its pod's annotation says. A report that claims another is refused with 403.
Times are RFC 3339 in UTC, to the second or finer; sizes are bytes.

Breaking: removing a field, another meaning. Not breaking: a new optional field (both sides ignore what they do not know).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeVar

T = TypeVar("T")

VERSION: Final = 1
REPORT_PATH: Final = "/v1/report"
MAX_REPORT_BYTES: Final = 1024 * 1024
"""Longest report: `MOST_CHECKPOINTS` of some 300 bytes each, and room for as much again."""
MOST_CHECKPOINTS: Final = 1000
"""Checkpoints in a report: the newest. Older ones stay on storage, and their objects stay as they are."""
MOST_FAILURES: Final = 16
"""Failures in a report: the newest."""
TEXT_LIMIT: Final = 2000
"""Longest message in a report, characters."""
DEFAULT_INTERVAL_S: Final = 3.0
"""Between two reports, until an answer says otherwise: a save asked for has to reach its job within five seconds."""
LONGEST_INTERVAL_S: Final = 60.0
"""What an answer may ask for at most; the controller takes a job for gone that was silent for three
intervals, and for 30 s at least."""


class BadReport(ValueError):
    """What came is no report, or no answer, of this protocol; the text names the field and what is allowed."""


class Cause(StrEnum):
    """What made a save due: `spec.trigger` of its Checkpoint object."""

    PERIODIC = "Periodic"
    ON_TERMINATION = "OnTermination"
    ON_DEMAND = "OnDemand"


class CommandKind(StrEnum):
    """What the controller asks of a job."""

    SAVE_NOW = "SaveNow"


class Progress(StrEnum):
    """How far a command has come."""

    ACCEPTED = "Accepted"
    """The trainers were asked; `step` is not known yet."""
    DONE = "Done"
    """The save of `step` is committed."""
    FAILED = "Failed"
    """It did not work; `message` says why. It is not tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedCheckpoint:
    """One committed checkpoint on storage."""

    step: int
    path: str
    """Directory, relative to the root of the job's volume mount."""
    size_bytes: int
    world_size: int = 0
    """0: not known (stock DCP wrote it)."""
    started: str = ""
    completed: str = ""
    cause: str = Cause.PERIODIC.value


LOAD_FAILED: Final = "LoadFailed"
"""Reason of a load that ended with an error; the error's class is in its message."""
CHECKPOINT_REFUSED: Final = "CheckpointRefused"
"""Reason of a checkpoint that is corrupt or lost, and that a load passed over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One save or load that failed, or a checkpoint that a load passed over."""

    step: int
    reason: str
    """Name of the error class, e.g. ``PersistError``; LOAD_FAILED; CHECKPOINT_REFUSED."""
    message: str
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """What became of a command so far. Repeated in every report until the command is in no answer any more."""

    id: str
    progress: str
    step: int = -1
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The state of one job, from the sidecar of its rank 0."""

    version: int = VERSION
    namespace: str
    pod: str
    pod_uid: str
    policy: str
    """Name of the CheckpointPolicy."""
    job_kind: str
    job_name: str
    job_id: str
    session: str = ""
    """Of the trainers; empty before the first hello."""
    attempt: int = 0
    world_size: int = 0
    num_pods: int = 0
    policy_generation: int = 0
    """Generation of the policy that the job runs with now; 0: as injected."""
    step: int = -1
    """Newest step that trainers saved, to memory or storage; -1: none yet."""
    snapshot_time: str = ""
    """When the newest snapshot was sealed on every rank of this pod."""
    committed_step: int = -1
    committed_time: str = ""
    storage_error: str = ""
    """Why the storage cannot be used now; empty: it can."""
    memory_error: str = ""
    """Why the arena is too small for all that the trainers will stage, before a save is lost over it; empty: it is not."""
    drain_s: float = 0.0
    """The slowest of the last saves, from its seal until it was visible: what the end of the pod has to wait for. 0: none yet."""
    loaded_step: int = -1
    """Step of the last load; -1: none since this sidecar started, or there was nothing to load."""
    loaded_from: str = ""
    """``arena`` or ``storage``."""
    loaded_time: str = ""
    draining: bool = False
    checkpoints: tuple[CommittedCheckpoint, ...] = ()
    """On storage now, newest first."""
    listed: bool = False
    """Whether `checkpoints` is what storage holds. False: it could not be listed, and says nothing."""
    failures: tuple[Failure, ...] = ()
    acknowledgements: tuple[Acknowledgement, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """`pillion_sidecar.status.metrics.Metrics` as a document: numbers, and counters by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Something to do, repeated in every answer until its acknowledgement is final."""

    id: str
    kind: str = CommandKind.SAVE_NOW.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the job is to do."""

    version: int = VERSION
    interval_s: float = DEFAULT_INTERVAL_S
    """Until the next report."""
    policy: Mapping[str, Any] | None = None
    """The CheckpointPolicy's spec as it is now. None: it is gone or cannot be used; the job goes on with what it has."""
    policy_generation: int = 0
    commands: tuple[Command, ...] = ()


def encode(message: Report | Answer) -> bytes:
    """UTF-8 JSON."""
    return json.dumps(dataclasses.asdict(message), separators=(",", ":")).encode()


def decode_report(body: bytes) -> Report:
    """
    Raises:
        BadReport: too long, no JSON object, another version, a missing field or one of another type.
    """
    document = _document(body, "report")
    document["checkpoints"] = _list(document, "checkpoints", CommittedCheckpoint, MOST_CHECKPOINTS)
    document["failures"] = _list(document, "failures", Failure, MOST_FAILURES)
    document["acknowledgements"] = _list(document, "acknowledgements", Acknowledgement, MOST_CHECKPOINTS)
    return _build(Report, document, "report")


def decode_answer(body: bytes) -> Answer:
    """
    Raises:
        BadReport: see `decode_report`.
    """
    document = _document(body, "answer")
    document["commands"] = _list(document, "commands", Command, MOST_CHECKPOINTS)
    answer = _build(Answer, document, "answer")
    if not 0 < answer.interval_s <= LONGEST_INTERVAL_S:
        raise BadReport(f"answer: interval_s is {answer.interval_s!r}; allowed: above 0, at most {LONGEST_INTERVAL_S}")
    return answer


def _document(body: bytes, what: str) -> dict[str, Any]:
    if len(body) > MAX_REPORT_BYTES:
        raise BadReport(f"{what}: {len(body)} bytes; allowed: at most {MAX_REPORT_BYTES}")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as err:
        raise BadReport(f"{what}: not JSON: {err}") from err
    if not isinstance(document, dict):
        raise BadReport(f"{what}: an object is expected, not {type(document).__name__}")
    if b"\\ud" in body.lower():
        # Half of a surrogate pair can be written in JSON, and in nothing that is sent, hashed or logged afterwards.
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as err:
            raise BadReport(f"{what}: not text: {type(err).__name__}") from err
    if document.get("version") != VERSION:
        raise BadReport(f"{what}: version is {document.get('version')!r}; allowed: {VERSION}")
    return document


def _list(document: Mapping[str, Any], name: str, kind: type[Any], most: int) -> tuple[Any, ...]:
    entries = document.get(name, [])
    if not isinstance(entries, list) or len(entries) > most:
        raise BadReport(f"{name}: a list of at most {most} entries is expected")
    built = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise BadReport(f"{name}[{index}]: an object is expected, not {type(entry).__name__}")
        built.append(_build(kind, entry, f"{name}[{index}]"))
    return tuple(built)


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "float": (int, float),
    "Mapping[str, Any]": (dict,),
    "Mapping[str, Any] | None": (dict, type(None)),
}


def _build(kind: type[T], document: Mapping[str, Any], where: str) -> T:
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind here is a dataclass
        if spec.name not in document:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise BadReport(f"{where}: {spec.name} is missing")
            continue
        value, allowed = document[spec.name], _TYPES.get(str(spec.type), (tuple,))
        # bool is an int to Python, and no number to anybody else.
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise BadReport(f"{where}: {spec.name} must be of the type {spec.type}, not {type(value).__name__}")
        values[spec.name] = value
    return kind(**values)
