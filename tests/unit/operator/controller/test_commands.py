"""
The whole of: who asks for a save, what the job is told, what the asker is told; and that nothing is asked for twice.

Called from: pytest.
"""

import dataclasses

import pytest

from pillion.wire import home
from pillion_operator.controller import commands
from pillion_operator.controller.checkpoints import Checkpoint, Status
from pillion_operator.controller.commands import LIFETIME_S, Notice, SaveAnnotation, SaveAnnotations
from pillion_operator.home.registry import Job
from support import reports

BEGUN_S = reports.NOW_S - 60


def acknowledged(command: str, progress: home.Progress, *steps: int, step: int = -1, message: str = "") -> Job:
    answer = home.Acknowledgement(id=command, progress=progress.value, step=step, message=message)
    return reports.job(*steps, acknowledgements=(answer,))


def told(request: Checkpoint, job: Job | None, now_s: float = reports.NOW_S) -> Status:
    (operation,) = commands.plan([request], job, now_s)
    assert operation.checkpoint is request
    return operation.status


def outcome(status: Status) -> tuple[str, str]:
    return status.ready, status.reason


def note(value: str = "1", *, uid: str = "pod-uid-0", set_at: float | None = -10) -> SaveAnnotation:
    at = "" if set_at is None else reports.at(set_at)
    return SaveAnnotation(about={"kind": "Pod", "name": "run-0"}, uid=uid, value=value, set_at=at)


def test_a_request_goes_from_asked_to_saving_to_committed() -> None:
    """Each report moves the condition on, and it ends with step, path and size."""
    request = reports.request()
    asked = told(request, reports.job(10))
    assert outcome(asked) == ("Unknown", "Requested")
    command = commands.command_id(request)
    request = dataclasses.replace(request, status=asked)
    saving = told(request, acknowledged(command, home.Progress.ACCEPTED, 10))
    assert outcome(saving) == ("Unknown", "Saving")
    assert saving.changed == asked.changed, "Unknown it was and is"
    request = dataclasses.replace(request, status=saving)
    done = told(request, acknowledged(command, home.Progress.DONE, 10, 25, step=25), reports.NOW_S + 5)
    assert outcome(done) == ("True", "Committed")
    assert (done.step, done.path, done.size, done.policy) == (25, "run/step-25", "1Gi", reports.POLICY)
    assert done.changed == reports.at(5)
    request = dataclasses.replace(request, status=done)
    assert not request.is_open
    assert commands.plan([request], reports.job(10), reports.NOW_S) == []


def test_a_request_that_fails_says_why() -> None:
    """The message of the job is the condition's."""
    request = reports.request()
    job = acknowledged(commands.command_id(request), home.Progress.FAILED, message="disk full")
    status = told(request, job)
    assert (*outcome(status), status.message) == ("False", "SaveFailed", "disk full")


def test_a_request_that_no_job_takes_up_waits_and_then_fails() -> None:
    """For ten minutes the job may come; then the request is given up."""
    request = reports.request()
    waiting = told(request, None)
    assert outcome(waiting) == ("Unknown", "NoJob")
    late_s = reports.NOW_S + LIFETIME_S
    assert outcome(told(request, None, late_s)) == ("False", "NoJob")
    assert outcome(told(request, reports.job(10), late_s)) == ("False", "NotAnswered")


def test_a_save_that_takes_long_is_not_given_up() -> None:
    """Once the job has taken the request up, its own bounds hold."""
    request = reports.request()
    job = acknowledged(commands.command_id(request), home.Progress.ACCEPTED)
    assert outcome(told(request, job, reports.NOW_S + 10 * LIFETIME_S)) == ("Unknown", "Saving")


def test_an_object_that_only_the_operator_makes_is_no_request() -> None:
    """A person's object with the trigger Periodic is told so, once."""
    mistaken = reports.request(trigger="Periodic")
    status = told(mistaken, reports.job(10))
    assert outcome(status) == ("False", "NotARequest")
    mistaken = dataclasses.replace(mistaken, status=status)
    assert commands.plan([mistaken], reports.job(10), reports.NOW_S) == []


def test_a_job_is_told_all_that_is_open_oldest_first_within_a_bound() -> None:
    """Objects before annotations; a job never gets more than it can acknowledge."""
    young, old = reports.request("a", created=reports.at(-1)), reports.request("b", created=reports.at(-2))
    found = commands.commands([young, old], [note()])
    assert [each.id for each in found] == ["checkpoint-uid-b", "checkpoint-uid-a", note().id]
    many = [reports.request(str(number)) for number in range(100)]
    assert len(commands.commands(many, [])) == commands.MAX_COMMANDS


def test_the_id_of_an_annotation_is_its_object_and_its_value() -> None:
    """The same after a restart of ours; another value, or another object, is another request."""
    assert note("1").id == note("1").id
    assert len({note("1").id, note("2").id, note("1", uid="other").id}) == 3


def test_an_annotation_asks_until_the_job_has_answered_and_never_again() -> None:
    """It is told when the job takes it up and when it is done, once each; a new value asks anew."""
    notes = SaveAnnotations(BEGUN_S)
    still, words = notes.open([note()], reports.job(10), reports.NOW_S)
    assert (still, words) == ([note()], [])
    job = acknowledged(note().id, home.Progress.ACCEPTED, 10)
    still, words = notes.open([note()], job, reports.NOW_S)
    assert (still, [each.reason for each in words]) == ([note()], ["SaveAccepted"])
    assert notes.open([note()], job, reports.NOW_S) == ([note()], [])
    job = acknowledged(note().id, home.Progress.DONE, 10, 25, step=25)
    still, words = notes.open([note()], job, reports.NOW_S)
    assert (still, [each.reason for each in words]) == ([], ["SaveCommitted"])
    assert "25" in words[0].message
    for found in (job, reports.job(10), None):
        assert notes.open([note()], found, reports.NOW_S + 10 * LIFETIME_S) == ([], [])
    still, _ = notes.open([note("2", set_at=20)], reports.job(10), reports.NOW_S + 20)
    assert still == [note("2", set_at=20)]


def test_an_annotation_whose_save_failed_is_told_and_not_tried_again() -> None:
    """The event is a warning with the job's words."""
    notes = SaveAnnotations(BEGUN_S)
    job = acknowledged(note().id, home.Progress.FAILED, message="disk full")
    still, words = notes.open([note()], job, reports.NOW_S)
    assert still == []
    assert words == [
        Notice(
            about=note().about,
            reason="SaveFailed",
            message="The requested save failed: disk full",
            warning=True,
        )
    ]
    assert notes.open([note()], reports.job(10), reports.NOW_S) == ([], [])


def test_after_a_restart_of_ours_the_sidecars_memory_answers() -> None:
    """The command has the same id, and the sidecar repeats what became of it instead of saving again."""
    first, second = SaveAnnotations(BEGUN_S), SaveAnnotations(reports.NOW_S + 100)
    job = acknowledged(note().id, home.Progress.DONE, 10, 25, step=25)
    assert first.open([note()], job, reports.NOW_S)[0] == []
    assert second.open([note()], job, reports.NOW_S + 101)[0] == []


@pytest.mark.parametrize(
    ("set_at", "steps", "asked"),
    [
        # The steps' saves begin `step` seconds after an hour ago.
        (-3595.0, (10,), False),  # a save began after the annotation was set: it is what was asked for
        (-3585.0, (10,), False),  # none did, and nobody has taken it up for ten minutes
        (-90.0, (10,), True),  # none did, and it is fresh
        (-90.0, (3520,), False),
    ],
)
def test_after_a_restart_of_everything_storage_answers(set_at: float, steps: tuple[int, ...], asked: bool) -> None:
    """A request from before our time is done when a save that began after it is committed, and is never a surprise later."""
    notes = SaveAnnotations(BEGUN_S)
    still, words = notes.open([note(set_at=set_at)], reports.job(*steps), reports.NOW_S)
    assert (bool(still), words) == (asked, [])


def test_a_save_that_was_due_anyway_does_not_answer_a_request_of_our_own_time() -> None:
    """Clocks differ: only the job's own answer counts while we are there to hear it."""
    notes = SaveAnnotations(BEGUN_S)
    still, _ = notes.open([note(set_at=-10)], reports.job(3595), reports.NOW_S)
    assert still == [note(set_at=-10)]


def test_an_annotation_that_no_job_takes_up_is_given_up_with_a_word() -> None:
    """After ten minutes it is no request any more, also for a job that comes later."""
    notes = SaveAnnotations(BEGUN_S)
    assert notes.open([note()], None, reports.NOW_S) == ([note()], [])
    still, words = notes.open([note()], None, reports.NOW_S + LIFETIME_S)
    assert (still, [each.reason for each in words]) == ([], ["SaveNotTaken"])
    assert notes.open([note()], reports.job(10), reports.NOW_S + LIFETIME_S) == ([], [])


def test_an_annotation_of_an_unknown_time_asks_from_when_it_was_seen() -> None:
    """Without managedFields nothing can be compared with the storage; it is a request all the same, with the same bound."""
    notes = SaveAnnotations(BEGUN_S)
    old = note(set_at=None)
    assert notes.open([old], reports.job(3599), reports.NOW_S) == ([old], [])
    assert notes.open([old], None, reports.NOW_S + LIFETIME_S + 1)[0] == []


def test_what_is_remembered_of_annotations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever annotates for ever does not fill our memory."""
    monkeypatch.setattr(commands, "MAX_FINISHED", 5)
    notes = SaveAnnotations(BEGUN_S)
    for number in range(50):
        found = note(str(number))
        notes.open([found], None, reports.NOW_S)
        notes.open([found], acknowledged(found.id, home.Progress.DONE, step=1), reports.NOW_S)
    assert (len(notes._finished), len(notes._asked_s), len(notes._accepted)) == (5, 0, 0)
