"""
The whole of: that the guide has a page for each code that the product can say, in the product's own words.

Called from: pytest.
Must never: list the codes by hand; they come from the code, so that a new one without a page fails here.
"""

import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pillion import errors
from pillion.wire import home
from pillion_operator.controller import commands, conditions, mirror, news
from pillion_operator.home.refusal import Result
from pillion_operator.home.registry import Job, JobKey
from pillion_operator.injection import checkpoint_policy, reasons
from pillion_sidecar.checkpoint import quota
from pillion_sidecar.copies.disk import LocalCopyLost
from pillion_sidecar.supervisor import preflight
from support import reports

ROOT: Final = Path(__file__).parents[3]
GUIDE: Final = ROOT / "docs" / "guide"
PAGES: Final = GUIDE / "troubleshooting"
INDEX: Final = (PAGES / "README.md").read_text()
SECTIONS: Final = ["What you see", "What it means", "What to do", "What Pillion does meanwhile"]
LOST: Final = "storage:400: was committed as the newest, and is not there any more"
CORRUPT: Final = "/pillion/storage/charlm/step-400/__0_0.1.distcp: 'model.weight' at offset 0 does not match its digest"
LIMITS: Final[dict[str, Any]] = {
    "trigger": {"periodSteps": 50},
    "staging": {"sizeLimit": "256Mi"},
    "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
}


def family(kind: type[BaseException]) -> set[str]:
    """The names of a class and of all that are made of it."""
    return {kind.__name__}.union(
        *(family(each) for each in kind.__subclasses__() if each.__module__ == kind.__module__)
    )


def remote_failures() -> set[str]:
    """What the sidecar says of a rank in brackets, and is no exception of Python's own."""
    sources = (path.read_text() for path in (ROOT / "sidecar" / "src").rglob("*.py"))
    said = {name for source in sources for name in re.findall(r'RemoteFailure\("(\w+)"', source)}
    return {name for name in said if not hasattr(builtins, name)}


def codes() -> set[str]:
    """Every code: of decisions, conditions and events, and every class of a save or load that fails."""
    enums = (reasons.Reason, conditions.Reason, commands.Reason, commands.NoticeReason)
    said = {each.value for enum in enums for each in enum} | {mirror.COMMITTED, mirror.REMOVED}
    failed = family(errors.SaveError) | family(errors.LoadError) | {errors.InternalError.__name__}
    return said | failed | remote_failures() | {LocalCopyLost.__name__}


def page(code: str) -> str:
    return (PAGES / f"{code}.md").read_text()


def status(*jobs: Job, **spec: Any) -> dict[str, str]:
    """What a policy's conditions say, by reason."""
    document = {
        "apiVersion": "pillion.dev/v1alpha1",
        "kind": "CheckpointPolicy",
        "metadata": {"name": "llm", "generation": 1},
        "spec": LIMITS | spec,
    }
    found = checkpoint_policy.from_object(document)
    made = conditions.status(found, {}, jobs, 1, lambda _: "object", reports.NOW_S)
    return {each["reason"]: each["message"] for each in made["conditions"]}


def answer(job: Job | None, *, late: bool = False, **changes: Any) -> tuple[str, str]:
    """What a request for a save is told: reason and message."""
    request = reports.request(job_id="charlm", **changes)
    now_s = reports.NOW_S + (commands.LIFETIME_S if late else 0.0)
    (told,) = commands.plan([request], job, now_s)
    return told.status.reason, told.status.message


def job(**changes: Any) -> Job:
    return reports.job(400, job_id="charlm", **changes)


def sentences() -> Iterator[tuple[str, str]]:
    """Codes with what the controller says of them, for a job and a policy as the pages have them."""
    disk = "step 400 was not saved [rank 0: OSError: [Errno 28] No space left on device]"
    failure = home.Failure(step=400, reason="PersistError", message=disk, time=reports.at(0))
    root = "/pillion/storage/charlm"
    denied = f"the root {root} cannot be used: Permission denied ({root}/.pillion); a writable directory with rename is needed"
    yield from status().items()
    yield from status(job()).items()
    yield from status(job(storage_error=denied, failures=(failure,))).items()
    small = preflight.too_small({0: 200 * 2**20}, num_ranks=1, slots=2, bounds={"staging.sizeLimit": 256 * 2**20})
    yield from status(job(memory_error=small, drain_s=411.2)).items()
    large = quota.problem(
        {400, 200}, {400: 3 * 2**40, 200: 2**40}, {400: "the newest", 200: "pinned or verified by a load"}, 2**41
    )
    yield from status(job(quota_error=large), retention={"maxBytes": "2Ti"}).items()
    yield from status(suspend=True).items()
    disks = {"storage": {"persistentVolumeClaim": {"claimName": "c"}, "local": {"emptyDir": {}}}}
    full = "ranks [8, 9]: No space left on device (/pillion/local/...)"
    late = home.HeldSave(step=400, held=reports.at(-600))
    for changes in ({}, {"local_error": full}, {"held": (late,)}):
        yield from status(job(**changes), **disks).items()
    yield mirror.HELD, mirror.HELD_TEXT
    yield from status(trigger={"periodSteps": 50, "snapshotSteps": 60}).items()
    yield from (answer(None), answer(None, late=True), answer(job()), answer(job(), late=True))
    yield answer(job(), trigger="Periodic")
    for progress in (home.Progress.ACCEPTED, home.Progress.FAILED):
        text = "no trainer is connected to the sidecar"
        said = home.Acknowledgement(id="checkpoint-uid-now", progress=progress.value, message=text)
        yield answer(job(acknowledgements=(said,)))
    yield mirror.COMMITTED, mirror.COMMITTED_TEXT
    yield mirror.REMOVED, mirror.REMOVED_TEXT


def words() -> Iterator[tuple[str, str]]:
    """What somebody is told who asked by annotation."""
    note = commands.SaveAnnotation(about={}, uid="uid", value="1", set_at=reports.at(-10))
    for progress in home.Progress:
        text = "no trainer is connected to the sidecar"
        said = home.Acknowledgement(id=note.id, progress=progress.value, step=425, message=text)
        _, told = commands.SaveAnnotations(reports.NOW_S - 60).open(
            [note], job(acknowledgements=(said,)), reports.NOW_S
        )
        yield from ((each.reason, each.message) for each in told)
    _, told = commands.SaveAnnotations(reports.NOW_S - 60).open([note], None, reports.NOW_S + commands.LIFETIME_S)
    yield from ((each.reason, each.message) for each in told)
    of, key = news.News(), JobKey("team", "charlm")
    for number, step, time_s in ((0, -1, 0.0), (1, 400, 1.0), (13, 4800, 1000.0)):
        metrics = {"saves_committed": number, "saves_skipped": number % 12}
        loaded = {"loaded_step": 400, "loaded_from": "storage", "loaded_time": reports.at(0)} if number else {}
        report = reports.report(committed_step=step, metrics=metrics, **loaded)
        yield from ((reason.value, text) for reason, text in of.notices(key, report, reports.NOW_S + time_s))
    for reason, step, message in (
        (
            home.LOAD_FAILED,
            -1,
            "CorruptCheckpoint: every checkpoint of /pillion/storage/charlm that could be used is corrupt or lost: "
            + LOST,
        ),
        (
            home.CHECKPOINT_REFUSED,
            400,
            f"storage:400: {CORRUPT}",
        ),
    ):
        failure = home.Failure(step=step, reason=reason, message=message, time=reports.at(0))
        yield reason, conditions.describe(failure)


def test_each_code_has_a_page_and_each_page_a_code() -> None:
    """What an event, a condition, a metric or a log can say is in the guide, and the guide has nothing that is never said."""
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == codes()


def test_the_index_has_each_page_once() -> None:
    """Each code stands in one row of the index, which links its page."""
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \|", INDEX, flags=re.MULTILINE)
    assert all(shown == linked for shown, linked in rows)
    assert sorted(shown for shown, _ in rows) == sorted(codes())


def test_the_index_names_each_result_of_a_report() -> None:
    """The label `result` of pillion_reports_total has a row for each of its values."""
    table = INDEX.split("## Reports that are refused")[1]
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == {each.value for each in Result}


@pytest.mark.parametrize("code", sorted(codes()))
def test_each_page_has_the_same_four_sections(code: str) -> None:
    """A page says what one sees, what it means, what to do, and what Pillion does, in this order."""
    text = page(code)
    assert text.startswith(f"# {code}\n\n> ")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("reason", list(reasons.Reason))
def test_the_page_of_a_decision_quotes_its_sentence(reason: reasons.Reason) -> None:
    """The quotation at the top is the sentence of the code, to the letter."""
    assert re.findall(r"^> (.+)$", page(reason.value), flags=re.MULTILINE) == [reason.sentence]


def test_the_pages_of_conditions_and_events_quote_what_the_controller_says() -> None:
    """The examples are what the controller makes of such a job, policy or request."""
    said = [*sentences(), *words()]
    assert {code for code, _ in said} >= {
        *(each.value for enum in (conditions.Reason, commands.Reason, commands.NoticeReason) for each in enum),
        *(mirror.COMMITTED, mirror.REMOVED, mirror.HELD),
    }
    assert [(code, text) for code, text in said if text not in page(code)] == []
