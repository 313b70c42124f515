"""
The whole of: Checkpoint objects say what storage holds, whatever was there before, and nothing of a user's is deleted.

Called from: pytest.
"""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion.wire import home
from pillion_operator.controller import checkpoints, mirror, reconcile
from pillion_operator.controller.checkpoints import Checkpoint, Status
from pillion_operator.home.registry import Job
from support import reports
from unit.crds import structural

CRD = structural.schema_of(structural.read("checkpoints"))
LATER_S = reports.NOW_S + 1000


def apply(objects: list[Checkpoint], operations: list[mirror.Operation]) -> list[Checkpoint]:
    """What the API server has afterwards; each object is as the controller sees it again."""
    by_name = {each.name: each for each in objects}
    for operation in operations:
        if isinstance(operation, mirror.Create):
            assert operation.name not in by_name
            document = operation.body | {"status": none_left_out(operation.status.to_json())}
            document["metadata"] = document["metadata"] | {"uid": f"uid-{operation.name}"}
            assert structural.problems(CRD, document) == []
            by_name[operation.name] = checkpoints.project(document)
        elif isinstance(operation, mirror.SetStatus):
            assert by_name[operation.checkpoint.name] == operation.checkpoint
            status = none_left_out(operation.status.to_json())
            assert structural.problems(CRD["properties"]["status"], status) == []
            by_name[operation.checkpoint.name] = dataclasses.replace(operation.checkpoint, status=operation.status)
        else:
            assert operation.checkpoint.is_ours, "only what we made is deleted"
            del by_name[operation.checkpoint.name]
    return list(by_name.values())


def none_left_out(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if value is not None}


def mirrored(report: home.Report, objects: list[Checkpoint] | None = None) -> list[Checkpoint]:
    before = objects or []
    return apply(before, mirror.plan(report, before, reports.NOW_S))


def test_each_checkpoint_has_an_object() -> None:
    """One is made for each, with step, path, size and times, and Ready."""
    made = sorted(mirrored(reports.report(10, 20)), key=lambda each: each.name)
    assert [each.name for each in made] == ["run-000000010", "run-000000020"]
    assert made[0].status == Status(
        policy=reports.POLICY,
        step=10,
        path="run/step-10",
        size="1Gi",
        world_size=8,
        started=reports.at(-3590),
        completed=reports.at(-3589),
        ready="True",
        reason="Committed",
        message=mirror.COMMITTED_TEXT,
        changed=reports.at(0),
    )
    assert all(each.is_ours and not each.is_request for each in made)


def test_an_object_has_the_metrics_of_its_checkpoint_and_no_wrong_one_blocks_it() -> None:
    """Numbers are texts; what is no number, has no name or is one too many is left out. Others replace them all."""
    report = reports.report(10)
    said = {"loss": 0.25, "bad": "much", "": 1, "nan": "nan", "x" * 129: 1, "steps": 3, "third": -1e-9, "fifth": 5}
    (stored,) = report.checkpoints
    (made,) = mirrored(dataclasses.replace(report, checkpoints=(dataclasses.replace(stored, metrics=said),)))
    assert made.status.metrics == (("loss", "0.25"), ("nan", "nan"), ("steps", "3"), ("third", "-1e-09"))
    again = dataclasses.replace(report, checkpoints=(dataclasses.replace(stored, metrics={"other": 1.5}),))
    (changed,) = mirrored(again, [made])
    assert changed.status.to_json()["metrics"] == [{"name": "other", "value": "1.5"}]


def test_an_object_goes_with_its_checkpoint() -> None:
    """What retention removed from storage is removed from the cluster, and nothing else is touched."""
    before = mirrored(reports.report(10, 20))
    after = mirror.plan(reports.report(20, 30), before, LATER_S)
    assert [(type(each).__name__) for each in after] == ["Create", "Delete"]
    assert {each.name for each in apply(before, after)} == {"run-000000020", "run-000000030"}


def test_storage_that_could_not_be_listed_says_nothing() -> None:
    """An empty list that is none deletes nothing."""
    before = mirrored(reports.report(10, 20))
    assert mirror.plan(reports.report(listed=False), before, LATER_S) == []


def test_a_full_list_says_nothing_about_what_is_older() -> None:
    """A job with more checkpoints than a report holds keeps the objects of the older ones."""
    most = home.MAX_CHECKPOINTS
    before = mirrored(reports.report(*range(1, 11)))
    after = mirror.plan(reports.report(*range(5, 5 + most)), before, LATER_S)
    assert not [each for each in after if isinstance(each, mirror.Delete)]
    after = mirror.plan(reports.report(*range(5, 4 + most)), before, LATER_S)
    assert sorted(each.checkpoint.status.step or 0 for each in after if isinstance(each, mirror.Delete)) == [1, 2, 3, 4]


def test_a_users_object_stands_for_the_checkpoint_that_it_asked_for() -> None:
    """No second object is made for it, and one that was made before the news came is removed."""
    mine = reports.request(status=Status(step=20, ready="True", reason="Committed", changed=reports.at(-1)))
    before = [*mirrored(reports.report(10, 20)), mine]
    after = mirrored(reports.report(10, 20), before)
    assert {each.name for each in after} == {"now", "run-000000010"}
    (standing,) = [each for each in after if each.name == "now"]
    assert standing.status.path == "run/step-20"
    assert standing.status.changed == reports.at(-1), "it was Ready before, and is"


def test_a_users_object_is_told_that_its_checkpoint_is_gone_and_is_never_deleted() -> None:
    """Ready becomes False with the reason Removed; should the checkpoint come back, it is True again."""
    mine = reports.request(status=Status(step=20, ready="True", reason="Committed", changed=reports.at(-1)))
    after = mirrored(reports.report(10, 20), [mine])
    after = mirrored(reports.report(10), after)
    (standing,) = [each for each in after if each.name == "now"]
    assert (standing.status.ready, standing.status.reason) == ("False", "Removed")
    assert standing.status.step == 20
    again = mirrored(reports.report(10, 20), after)
    (standing,) = [each for each in again if each.name == "now"]
    assert standing.status.ready == "True"
    assert {each.name for each in again} == {"now", "run-000000010"}


def test_a_request_that_was_done_before_the_list_knew_is_not_removed() -> None:
    """The news that a save is done may be younger than the list of what is there."""
    mine = reports.request(status=Status(step=20, ready="True", reason="Committed", changed=reports.at(-1)))
    assert mirrored(reports.report(), [mine]) == [mine]


def test_a_copy_of_one_of_our_objects_is_its_users() -> None:
    """The label alone, on an object of another name, makes it none of ours."""
    (ours,) = mirrored(reports.report(10))
    document = {
        "metadata": {
            "namespace": reports.NAMESPACE,
            "name": "copy",
            "uid": "c",
            "labels": {checkpoints.MIRROR_LABEL: checkpoints.mark(reports.NAMESPACE, ours.name, reports.JOB)},
        },
        "spec": {"jobID": reports.JOB, "trigger": "Periodic"},
    }
    copy = checkpoints.project(document)
    assert not copy.is_ours
    assert copy in mirrored(reports.report(), [ours, copy])


def test_a_name_that_a_user_took_is_not_fought_over() -> None:
    """The object for the step gets another name, and keeps it."""
    taken = reports.request("run-000000010", trigger="Periodic")
    after = mirrored(reports.report(10), [taken])
    (ours,) = [each for each in after if each.is_ours]
    assert ours.name != taken.name
    assert ours.name.endswith("-000000010")
    assert mirror.plan(reports.report(10), after, LATER_S) == []


@settings(max_examples=150, deadline=None)
@given(
    st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?", fullmatch=True),
    st.integers(0, 2**63 - 1),
)
def test_every_job_and_step_has_a_name_of_its_own(job_id: str, other: str, step: int) -> None:
    """The API server takes the name, it ends with the step, and no two jobs share it."""
    name = mirror.object_name(job_id, step)
    assert len(name) <= 253
    assert all(
        part and part[0] != "-" != part[-1] and part.replace("-", "a").isalnum() and part == part.lower()
        for part in name.split(".")
    )
    assert name.endswith(f"-{step:09d}")
    assert name.isascii()
    assert (name == mirror.object_name(other, step)) is (job_id == other)


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0"),
        (1, "1"),
        (1023, "1023"),
        (1024, "1Ki"),
        (2**30, "1Gi"),
        (12 * 2**30, "12Gi"),
        (12 * 2**30 + 1, "12288Mi"),
        (123_456_789, "118Mi"),
        (5 * 2**40 + 7, "5120Gi"),
        (10**30, "888Pi"),
        (-5, "0"),
    ],
)
def test_sizes_are_read_at_a_glance(num_bytes: int, shown: str) -> None:
    """Exact where a unit divides them, else within half a percent."""
    assert mirror.size(num_bytes) == shown
    if 0 <= num_bytes < 10**18:
        assert structural.quantity(shown) == pytest.approx(num_bytes, rel=0.005, abs=0)


def test_what_a_report_gets_wrong_is_left_out() -> None:
    """Nothing is written that the API server would refuse, and the rest of the job's checkpoints have their objects."""
    good = reports.stored(10)
    bad = (
        dataclasses.replace(good, step=-1),
        dataclasses.replace(good, step=2**63),
        dataclasses.replace(good, step=11, path=""),
        dataclasses.replace(good, step=12, path="x" * 5000),
        dataclasses.replace(good, step=13, started="yesterday", completed="", world_size=-1, cause="x", size_bytes=-9),
    )
    after = mirrored(reports.report(checkpoints=(good, *bad)))
    assert {each.status.step for each in after} == {10, 13}


# --- whatever the state, one pass is enough, and it takes nothing of anybody

STEPS = st.integers(1, 6)
STATUSES = st.builds(
    Status,
    step=st.none() | STEPS,
    path=st.sampled_from(["", "run/step"]),
    ready=st.sampled_from(["", "True", "False", "Unknown"]),
    reason=st.sampled_from(["", "Committed", "Removed", "Saving"]),
    changed=st.just("2027-01-01T00:00:00Z"),
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Checkpoint], Job | None]:
    objects = []
    for number in range(draw(st.integers(0, 3))):
        trigger = draw(st.sampled_from(["OnDemand", "OnDemand", "Periodic"]))
        created = reports.at(draw(st.sampled_from([-1.0, -1000.0])))
        objects.append(reports.request(f"user-{number}", trigger=trigger, created=created, status=draw(STATUSES)))
    for step in draw(st.sets(STEPS)):
        # Some are ours, some have our names and are not, some lost their status.
        name = mirror.object_name(reports.JOB, step)
        is_ours = draw(st.booleans())
        status = draw(STATUSES)
        objects.append(reports.request(name, trigger="Periodic", is_ours=is_ours, status=status))
    acknowledged = draw(st.lists(st.sampled_from(objects), max_size=2)) if objects else []
    acknowledgements = tuple(
        home.Acknowledgement(
            id=f"checkpoint-{each.uid}",
            progress=draw(st.sampled_from(list(home.Progress))).value,
            step=draw(st.integers(-1, 6)),
        )
        for each in acknowledged
    )
    job = reports.job(
        *draw(st.sets(STEPS)), listed=draw(st.booleans()), acknowledgements=acknowledgements, policy=reports.POLICY
    )
    return objects, draw(st.none() | st.just(job))


@settings(max_examples=200, deadline=None)
@given(worlds())
def test_one_pass_is_enough_and_takes_nothing_that_is_not_ours(world: tuple[list[Checkpoint], Job | None]) -> None:
    """
    After the operations are applied there are none left, though time has passed; no object of a user's is deleted; and what
    storage holds is what the objects that are ready say.
    """
    objects, job = world
    operations = reconcile.operations(objects, job, reports.NOW_S)
    names = [each.name if isinstance(each, mirror.Create) else each.checkpoint.name for each in operations]
    assert len(names) == len(set(names)), "each object is written once"
    after = apply(objects, operations)
    assert reconcile.operations(after, job, reports.NOW_S + 1) == []
    assert {each.name for each in objects if not each.is_ours} <= {each.name for each in after}
    if job is not None and job.report.listed:
        standing = [each.status.step for each in after if each.status.ready == "True" and each.status.path]
        ours = [each for each in after if each.is_ours]
        stored = {each.step for each in job.report.checkpoints}
        assert {each.status.step for each in ours} <= stored
        assert stored <= {*standing}


def test_a_save_on_the_disks_of_the_nodes_has_an_object_until_it_is_committed_or_passed_over() -> None:
    """It is Held, becomes the committed one's object, and goes where a newer one was uploaded instead."""
    both = tuple(home.HeldSave(step=step, held=reports.at(-5)) for step in (30, 20))
    made = {each.name: each for each in mirrored(reports.report(10, held=both))}
    assert sorted(made) == ["run-000000010", "run-000000020", "run-000000030"]
    held = made["run-000000030"].status
    assert (held.step, held.ready, held.reason, held.changed) == (30, "Unknown", "Held", reports.at(-5))
    assert mirrored(reports.report(10, held=both), list(made.values())) == list(made.values())
    after = {each.name: each.status for each in mirrored(reports.report(10, 30), list(made.values()))}
    assert sorted(after) == ["run-000000010", "run-000000030"]
    assert (after["run-000000030"].ready, after["run-000000030"].reason) == ("True", "Committed")


def test_held_saves_are_shown_while_storage_cannot_be_listed() -> None:
    """That is when they matter. Those that are passed over go, and nothing that may be committed is touched."""
    first = mirrored(reports.report(10, held=(home.HeldSave(step=20, held=reports.at(-5)),)))
    later = reports.report(listed=False, committed_step=20, held=(home.HeldSave(step=40, held=reports.at(-1)),))
    shown = mirrored(later, first)
    assert [(each.status.step, each.status.reason) for each in sorted(shown, key=lambda each: each.name)] == [
        (10, "Committed"),
        (20, "Held"),
        (40, "Held"),
    ]
    assert mirrored(later, shown) == shown
    newer = reports.report(listed=False, committed_step=20, held=(home.HeldSave(step=60, held=reports.at(-1)),))
    assert sorted(each.status.step or 0 for each in mirrored(newer, shown)) == [10, 20, 60]
