"""
Calling home: the report that a job's sidecar sends to the controller every few seconds, and the answer.

Producer of reports and consumer of answers: the coordinator's sidecar (`pillion_sidecar.reporting`). Consumer of reports and producer of
answers: the controller (`pillion_operator.home`).

    POST <PILLION_HOME_URL>/v1/report        Authorization: Bearer <token of the audience PILLION_TOKEN_AUDIENCE>
    Content-Type: application/json           a Report; 200 with an Answer, or a status of `Refused`

The token identifies the pod, and an annotation of the pod identifies the job. A report that claims another one is refused with 403.
Times are RFC 3339 in UTC, to the second or finer; sizes are bytes.

Breaking: removing a field, changing a meaning. Not breaking: a new optional field (both sides ignore unknown fields).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeVar

T = TypeVar("T")

VERSION: Final = 1
REPORT_PATH: Final = "/v1/report"
MAX_REPORT_BYTES: Final = 1024 * 1024
"""Maximum length of a report: `MAX_CHECKPOINTS` of some 300 bytes each, with MAX_METRICS of at most 90 bytes each, and as much again."""
MAX_CHECKPOINTS: Final = 1000
"""Maximum checkpoints in a report, the newest ones. Older ones stay on storage, and their objects stay unchanged."""
MAX_METRICS: Final = 4
"""Maximum metrics of a checkpoint in a report, so that MAX_CHECKPOINTS of them fit."""
MAX_METRIC_NAME_BYTES: Final = 64
"""Maximum length of the name of such a metric as JSON, where a letter outside ASCII takes six bytes. Others stay in the manifest."""
CLUSTER: Final = "cluster"
"""Holder of the pins that people set with the annotation of a Checkpoint object."""
MAX_PINNED_BY: Final = 128
"""Maximum length of the holders of a checkpoint's pins in a report, characters. CLUSTER stands first."""
MAX_FAILURES: Final = 16
"""Maximum failures in a report, the newest ones."""
TEXT_LIMIT: Final = 2000
"""Maximum length of a message in a report, characters."""
DEFAULT_INTERVAL_S: Final = 3.0
"""Interval of the reports, until an answer sets another one. A requested save must reach its job within five seconds."""
MAX_INTERVAL_S: Final = 60.0
"""Maximum interval that an answer may set. The controller considers a job gone after three silent intervals, and at
least 30 s."""


RUN_KINDS: Final = ("trained", "retrained", "stalled", "waited", "restoring", "down")
"""What the time of a run goes to. Together they are its wall time; docs/reference/goodput.md has the definition."""


class BadReport(ValueError):
    """A message is not a report or an answer of this protocol. The text names the field and what is allowed."""


class Cause(StrEnum):
    """What made a save due: `spec.trigger` of its Checkpoint object."""

    PERIODIC = "Periodic"
    ON_TERMINATION = "OnTermination"
    ON_DEMAND = "OnDemand"


class CommandKind(StrEnum):
    """Kind of a command that the controller sends to a job."""

    SAVE_NOW = "SaveNow"
    PIN = "Pin"
    """Pin `step` with the holder CLUSTER. Repeated until a report has the pin."""
    UNPIN = "Unpin"
    """Remove that pin. Repeated until a report does not have it."""


class Progress(StrEnum):
    """How far a command has come."""

    ACCEPTED = "Accepted"
    """The trainers have the request. `step` is not known yet."""
    DONE = "Done"
    """The save of `step` is committed."""
    FAILED = "Failed"
    """The command failed. `message` has the cause. There is no retry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedCheckpoint:
    """One committed checkpoint on storage."""

    step: int
    path: str
    """Directory, relative to the root of the job's volume mount; or the URL, in an object store."""
    size_bytes: int
    world_size: int = 0
    """Number of ranks that saved it. 0: not known (stock DCP wrote it)."""
    started: str = ""
    completed: str = ""
    cause: str = Cause.PERIODIC.value
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Metric -> number, as `wire.remarks` writes it; the first MAX_METRICS of the save, with names of at most MAX_METRIC_NAME_BYTES."""
    pinned_by: str = ""
    """Holders of its pins, separated by commas. Empty: it is not pinned, or nobody has looked yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSave:
    """A save that is on the disks of all nodes, and waits for storage."""

    step: int
    held: str
    """Time since which every node has it."""
    cause: str = Cause.PERIODIC.value


MAX_HELD: Final = 16
"""Maximum held saves in a report, the newest ones. A node keeps two or three."""


LOAD_FAILED: Final = "LoadFailed"
"""Reason of a failed load. The message has the error's class."""
CHECKPOINT_REFUSED: Final = "CheckpointRefused"
"""Reason of a corrupt or lost checkpoint that a load skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failed save or load, or a checkpoint that a load skipped."""

    step: int
    reason: str
    """Name of the error class (``PersistError``), LOAD_FAILED or CHECKPOINT_REFUSED."""
    message: str
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """Progress of a command. Every report repeats it until no answer has the command any more."""

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
    """Session of the trainers. Empty before the first hello."""
    attempt: int = 0
    world_size: int = 0
    num_pods: int = 0
    policy_generation: int = 0
    """Generation of the policy that the job uses now. 0: the injected policy."""
    step: int = -1
    """Newest step that the trainers saved, to memory or storage. -1: none yet."""
    snapshot_time: str = ""
    """Time at which every rank of this pod had sealed the newest snapshot."""
    committed_step: int = -1
    committed_time: str = ""
    storage_error: str = ""
    """Why the storage is unusable now. Empty: it is usable."""
    memory_error: str = ""
    """Why the arena is too small for the state that the trainers will stage, before a save is lost. Empty: it is large enough."""
    quota_error: str = ""
    """Why the checkpoints that must stay have more bytes than `retention.maxBytes`. Empty: they have not, or there is no quota."""
    local_error: str = ""
    """Why the last save went on without the disks of the nodes. Empty: it did not, or the policy has none."""
    held: tuple[HeldSave, ...] = ()
    """Saves that wait for storage on the disks of the nodes, newest first."""
    interval_steps: int = 0
    """Period of the automatic interval, steps. 0: the policy has none, or nothing is measured yet."""
    interval_bound: str = ""
    """What decided it: a `pillion_sidecar.interval.Bound`."""
    interval_reason: str = ""
    """Why, for people."""
    interval_inputs: Mapping[str, Any] = field(default_factory=dict)
    """Its numbers: period_s, stall_s, persist_s, step_s, mtbf_s, failures."""
    run_attempts: int = 0
    """Attempts of the training on this root. 0: the root's journal is not read yet."""
    run_seconds: Mapping[str, Any] = field(default_factory=dict)
    """Seconds of the run until now, by RUN_KINDS. Empty: the root's journal is not read yet."""
    drain_s: float = 0.0
    """Seconds from the seal of the slowest recent save until its commit, which the end of the pod must wait for. 0: none yet."""
    loaded_step: int = -1
    """Step of the last load. -1: none since this sidecar started, or there was nothing to load."""
    loaded_from: str = ""
    """``arena``, ``local`` or ``storage``."""
    loaded_time: str = ""
    draining: bool = False
    checkpoints: tuple[CommittedCheckpoint, ...] = ()
    """Checkpoints on storage now, newest first."""
    listed: bool = False
    """Whether `checkpoints` is a listing of the storage. False: the storage could not be listed, and `checkpoints` has no meaning."""
    failures: tuple[Failure, ...] = ()
    acknowledgements: tuple[Acknowledgement, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """`pillion_sidecar.status.metrics.Metrics` as a document: numbers, and counters by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command to the job. Every answer repeats it until its acknowledgement is final."""

    id: str
    kind: str = CommandKind.SAVE_NOW.value
    step: int = -1
    """(PIN, UNPIN) The step. -1: any other kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The controller's answer to a report."""

    version: int = VERSION
    interval_s: float = DEFAULT_INTERVAL_S
    """Seconds until the next report."""
    policy: Mapping[str, Any] | None = None
    """The current spec of the CheckpointPolicy. None: the policy is gone or invalid, and the job keeps its current one."""
    policy_generation: int = 0
    commands: tuple[Command, ...] = ()


def encode(message: Report | Answer) -> bytes:
    """Return the message as UTF-8 JSON."""
    return json.dumps(dataclasses.asdict(message), separators=(",", ":")).encode()


def decode_report(body: bytes) -> Report:
    """
    Read a report.

    Raises:
        BadReport: too long, not a JSON object, another version, or a missing or mistyped field.
    """
    document = _document(body, "report")
    document["checkpoints"] = _list(document, "checkpoints", CommittedCheckpoint, MAX_CHECKPOINTS)
    document["failures"] = _list(document, "failures", Failure, MAX_FAILURES)
    document["held"] = _list(document, "held", HeldSave, MAX_HELD)
    document["acknowledgements"] = _list(document, "acknowledgements", Acknowledgement, MAX_CHECKPOINTS)
    return _build(Report, document, "report")


def decode_answer(body: bytes) -> Answer:
    """
    Read an answer.

    Raises:
        BadReport: see `decode_report`.
    """
    document = _document(body, "answer")
    document["commands"] = _list(document, "commands", Command, MAX_CHECKPOINTS)
    answer = _build(Answer, document, "answer")
    if not 0 < answer.interval_s <= MAX_INTERVAL_S:
        raise BadReport(f"answer: interval_s is {answer.interval_s!r}; allowed: above 0, at most {MAX_INTERVAL_S}")
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
        # JSON can contain half of a surrogate pair, which cannot be encoded, hashed or logged afterwards.
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
        # In Python a bool is an int. The protocol keeps them apart.
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise BadReport(f"{where}: {spec.name} must be of the type {spec.type}, not {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            # Python's reader takes 1e999 and Infinity.
            raise BadReport(f"{where}: {spec.name} must be a finite number, not {value}")
        values[spec.name] = value
    return kind(**values)
