"""
The whole of: requests for a save: the commands that a job gets, and the answers that the author of each request gets.

    request                                           id of the command                    answer
    a Checkpoint object that a user created           its UID                              its condition Ready
    pillion.dev/save-now on an injected pod or a Job  digest of the object's UID and the value   events on the object

Called from: the controller. Pure: time is an argument, and nothing is written.

Each request makes one save, for these reasons:

- A command is repeated in every answer until the job has reported its final outcome, so no command is lost.
- The id of a command is the same after a restart of the controller. A sidecar remembers the last 64 commands that it finished, and repeats
  their outcome. So a restart of the controller alone never makes a second save.
- A Checkpoint object that was answered records the answer itself.
- An annotation stays, as the controller writes to no pod and no job. After a restart of the controller the sidecar that did the save may be gone, too. Then
  the storage decides: a checkpoint whose save began after the annotation was set fulfils it. Without one, the request is still open,
  or it failed and is tried once more, within `LIFETIME_S`.

Must never: repeat a command that a job has answered finally, or withhold an answer from the author of a request.
"""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

from pillion.wire import home
from pillion_operator.controller import mirror
from pillion_operator.controller.checkpoints import FALSE, TRUE, UNKNOWN, Checkpoint, Json, Status
from pillion_operator.home import times
from pillion_operator.home.registry import Job

T = TypeVar("T")

LIFETIME_S: Final = 600.0
"""
Maximum time that a request waits for a job. Jobs report every few seconds; a save ten minutes later would be a surprise, perhaps
in another run of the same name.
"""
MAX_COMMANDS: Final = 16
"""Maximum number of commands in one answer, oldest first. All commands that a job receives at one time become one save."""
MAX_FINISHED: Final = 4096
"""Maximum number of finished annotation requests that are remembered; one takes some hundred bytes."""


class Reason(StrEnum):
    """Reasons of the condition Ready of a request, and of the events on it."""

    REQUESTED = "Requested"
    SAVING = "Saving"
    SAVE_FAILED = "SaveFailed"
    NO_JOB = "NoJob"
    NOT_ANSWERED = "NotAnswered"
    NOT_A_REQUEST = "NotARequest"


class NoticeReason(StrEnum):
    """Reasons of the events on an annotated pod or Job."""

    ACCEPTED = "SaveAccepted"
    COMMITTED = "SaveCommitted"
    FAILED = "SaveFailed"
    LOAD_FAILED = home.LOAD_FAILED
    REFUSED = home.CHECKPOINT_REFUSED
    SKIPPED = "SaveSkipped"
    LOADED = "Loaded"
    NOT_TAKEN = "SaveNotTaken"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveAnnotation:
    """The annotation ``pillion.dev/save-now`` on an object."""

    about: Json
    """The object, as an event refers to it."""
    uid: str
    value: str
    set_at: str
    """When it was set; empty: nobody knows."""

    @property
    def id(self) -> str:
        return "note-" + hashlib.sha256(f"{self.uid}\0{self.value}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """An event for the author of an annotation request."""

    about: Json
    reason: str
    message: str
    warning: bool = False


def command_id(checkpoint: Checkpoint) -> str:
    """The id of the command of a Checkpoint object."""
    return f"checkpoint-{checkpoint.uid}"


def plan(objects: Iterable[Checkpoint], job: Job | None, now_s: float) -> list[mirror.SetStatus]:
    """
    The status of the Checkpoint objects of a job that request a save.

    Args:
        objects: all that name the job.
        job: None: it does not report.
        now_s: seconds since 1970.
    """
    writes = []
    for each in objects:
        status = None
        if each.is_open:
            status = _answer(each, job, now_s)
        elif not each.is_ours and not each.is_request and not each.status.ready:
            text = f"Only the operator creates Checkpoint objects with the trigger {each.trigger}. To ask for a save, leave the trigger out."
            status = _ready(each.status, FALSE, Reason.NOT_A_REQUEST, text, now_s)
        if status is not None and status != each.status:
            writes.append(mirror.SetStatus(checkpoint=each, status=status))
    return writes


def _answer(checkpoint: Checkpoint, job: Job | None, now_s: float) -> Status:
    """The status of a request that is open."""
    before = checkpoint.status
    made_s = times.parse(checkpoint.created)
    is_late = made_s is not None and now_s - made_s > LIFETIME_S
    if job is None:
        text = f"No job {checkpoint.job_id} in this namespace reports"
        if is_late:
            return _ready(before, FALSE, Reason.NO_JOB, f"{text}; the request expired.", now_s)
        return _ready(before, UNKNOWN, Reason.NO_JOB, f"{text}; the request is waiting for it.", now_s)
    if not before.policy:
        before = dataclasses.replace(before, policy=job.report.policy)
    answer = _acknowledgement(job, command_id(checkpoint))
    if answer is None:
        if is_late:
            text = "The job reports but did not answer the request in time; see the log of its sidecar."
            return _ready(before, FALSE, Reason.NOT_ANSWERED, text, now_s)
        return _ready(before, UNKNOWN, Reason.REQUESTED, "The request was sent to the job.", now_s)
    if answer.progress == home.Progress.FAILED:
        text = answer.message[: home.TEXT_LIMIT] or "The save failed."
        return _ready(before, FALSE, Reason.SAVE_FAILED, text, now_s)
    if answer.progress == home.Progress.DONE:
        stored = next((each for each in job.report.checkpoints if each.step == answer.step), None)
        if stored is not None:
            return mirror.committed(stored, job.report, before, now_s)
        done = dataclasses.replace(before, step=answer.step) if answer.step >= 0 else before
        return _ready(done, TRUE, mirror.COMMITTED, mirror.COMMITTED_TEXT, now_s)
    return _ready(before, UNKNOWN, Reason.SAVING, "The job is saving.", now_s)


def _ready(before: Status, ready: str, reason: str, message: str, now_s: float) -> Status:
    changed = before.changed if before.ready == ready and before.changed else times.text(now_s)
    return dataclasses.replace(before, ready=ready, reason=str(reason), message=message, changed=changed)


def _acknowledgement(job: Job, command: str) -> home.Acknowledgement | None:
    return next((each for each in job.report.acknowledgements if each.id == command), None)


class SaveAnnotations:
    """The open annotation requests, and the events about them that are due."""

    def __init__(self, begun_s: float) -> None:
        """
        Args:
            begun_s: start of this controller; seconds since 1970. Earlier requests are compared with the storage.
        """
        self._begun_s = begun_s
        self._asked_s: OrderedDict[str, float] = OrderedDict()
        """When each open request was made, as far as is known."""
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._accepted: OrderedDict[str, None] = OrderedDict()

    def open(
        self, save_annotations: Iterable[SaveAnnotation], job: Job | None, now_s: float
    ) -> tuple[list[SaveAnnotation], list[Notice]]:
        """
        The open requests of a job, oldest first, and the events that are due.

        Args:
            save_annotations: the annotations of its pods and its Job object.
            job: None: it does not report.
            now_s: seconds since 1970.
        """
        waiting: list[tuple[float, SaveAnnotation]] = []
        notices: list[Notice] = []
        for annotation in save_annotations:
            if annotation.id in self._finished:
                continue
            asked_s = self._asked_s.get(annotation.id)
            if asked_s is None:
                asked_s = times.parse(annotation.set_at) or now_s
                _remember(self._asked_s, annotation.id, asked_s)
            if notice := self._judge(annotation, job, asked_s, now_s):
                notices.append(notice)
            if annotation.id not in self._finished:
                waiting.append((asked_s, annotation))
        return [annotation for _, annotation in sorted(waiting, key=lambda each: (each[0], each[1].id))], notices

    def _judge(self, annotation: SaveAnnotation, job: Job | None, asked_s: float, now_s: float) -> Notice | None:
        was_before = asked_s < self._begun_s
        answer = _acknowledgement(job, annotation.id) if job else None
        if answer is not None and answer.progress == home.Progress.DONE:
            self._finish(annotation)
            text = f"The save of step {answer.step} is committed."
            return Notice(about=annotation.about, reason=NoticeReason.COMMITTED, message=text)
        if answer is not None and answer.progress == home.Progress.FAILED:
            self._finish(annotation)
            text = f"The requested save failed: {answer.message[: home.TEXT_LIMIT]}"
            return Notice(about=annotation.about, reason=NoticeReason.FAILED, message=text, warning=True)
        if answer is not None:
            if annotation.id in self._accepted:
                return None
            _remember(self._accepted, annotation.id, None)
            return Notice(
                about=annotation.about,
                reason=NoticeReason.ACCEPTED,
                message="The job received the request and is saving.",
            )
        if was_before and job is not None and _has_since(job.report.checkpoints, asked_s):
            self._finish(annotation)
        elif now_s - asked_s > LIFETIME_S:
            self._finish(annotation)
            if not was_before:
                text = f"No job answered the request within {LIFETIME_S:.0f} s; the request expired."
                return Notice(about=annotation.about, reason=NoticeReason.NOT_TAKEN, message=text, warning=True)
        return None

    def _finish(self, annotation: SaveAnnotation) -> None:
        self._asked_s.pop(annotation.id, None)
        self._accepted.pop(annotation.id, None)
        _remember(self._finished, annotation.id, None)


def commands(requests: Collection[Checkpoint], save_annotations: Sequence[SaveAnnotation]) -> tuple[home.Command, ...]:
    """The commands for a job: all open requests, within `MAX_COMMANDS`."""
    oldest_first = sorted(requests, key=lambda each: (each.created, each.name))
    ids = [*map(command_id, oldest_first), *(annotation.id for annotation in save_annotations)]
    return tuple(home.Command(id=each) for each in ids[:MAX_COMMANDS])


def _has_since(stored: Iterable[home.CommittedCheckpoint], asked_s: float) -> bool:
    """Whether a save that began after a moment is committed."""
    begun = (times.parse(each.started) for each in stored)
    return any(each is not None and each > asked_s for each in begun)


def _remember(entries: OrderedDict[str, T], command: str, value: T) -> None:
    entries[command] = value
    entries.move_to_end(command)
    while len(entries) > MAX_FINISHED:
        entries.popitem(last=False)
