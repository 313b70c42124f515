"""
The whole of: which steps a job's sidecar is told to pin and to let go, and what becomes of the objects of pinned steps.

Called from: pytest.
"""

import dataclasses
from typing import Any

import pytest

from pillion.wire import home
from pillion_operator.controller import checkpoints, mirror, pinning
from pillion_operator.controller.checkpoints import Checkpoint
from support import reports
from unit.crds import structural
from unit.operator.controller.test_mirror import mirrored

CRD = structural.schema_of(structural.read("checkpoints"))


def annotated(made: Checkpoint, value: str | None) -> Checkpoint:
    """The object after `kubectl annotate`."""
    annotations = {} if value is None else {checkpoints.PIN: value}
    metadata: dict[str, Any] = {"namespace": made.namespace, "name": made.name, "annotations": annotations}
    document = {"metadata": metadata, "spec": {"jobID": made.job_id, "trigger": made.trigger}}
    return dataclasses.replace(made, pin=checkpoints.project(document).pin)


def told(report: home.Report, objects: list[Checkpoint]) -> list[tuple[str, int]]:
    return [(each.kind, each.step) for each in pinning.commands(report, objects)]


def pinned_at(step: int, *more: int, by: str = "cluster") -> home.Report:
    stored = (reports.stored(step, pinned_by=by), *(reports.stored(each) for each in more))
    return reports.report(checkpoints=stored)


@pytest.mark.parametrize(
    ("value", "before", "after"),
    [
        ("true", [("Pin", 10)], []),
        ("false", [], [("Unpin", 10)]),
        (None, [], [("Unpin", 10)]),
        ("yes", [], []),
    ],
)
def test_an_annotation_is_told_until_the_report_has_it(
    value: str | None, before: list[tuple[str, int]], after: list[tuple[str, int]]
) -> None:
    """A value that says neither changes nothing, whatever is on storage."""
    [made] = mirrored(reports.report(10))
    assert told(reports.report(10), [annotated(made, value)]) == before
    assert told(pinned_at(10), [annotated(made, value)]) == after


def test_a_pin_of_people_is_not_the_clusters() -> None:
    """Both may hold a step; the annotation removes its own only."""
    [made] = mirrored(reports.report(10))
    assert told(pinned_at(10, by="people"), [annotated(made, "true")]) == [("Pin", 10)]
    assert told(pinned_at(10, by="people"), [annotated(made, None)]) == []
    assert told(pinned_at(10, by="cluster,people"), [annotated(made, None)]) == [("Unpin", 10)]


def test_nothing_is_told_without_a_listing_or_for_what_is_not_on_storage() -> None:
    """And a step without an object keeps its pin: nobody has said that it may go."""
    [made] = mirrored(reports.report(10))
    wanted = annotated(made, "true")
    assert told(reports.report(10, listed=False), [wanted]) == []
    assert told(reports.report(20), [wanted]) == []
    assert told(pinned_at(10), []) == []


def test_of_two_objects_of_one_step_the_one_that_pins_counts() -> None:
    """One that a user made may stand for the same step."""
    [made] = mirrored(reports.report(10))
    objects = [annotated(made, None), dataclasses.replace(annotated(made, "true"), name="mine", is_ours=False)]
    assert told(reports.report(10), objects) == [("Pin", 10)]
    assert told(pinned_at(10), objects) == []


def test_an_answer_has_a_bounded_number_of_pins() -> None:
    """The others follow when the report has the first ones."""
    report = reports.report(*range(200))
    objects = [annotated(each, "true") for each in mirrored(report)]
    assert len(pinning.commands(report, objects)) == pinning.MAX_PINS


def test_the_object_says_who_has_pinned_its_checkpoint() -> None:
    """In its status, as the CRD takes it; text that no holder has is left out."""
    [made] = mirrored(pinned_at(10, by="cluster,people"))
    assert made.status.pinned_by == "cluster,people"
    status = {key: each for key, each in made.status.to_json().items() if each is not None}
    assert structural.problems(CRD["properties"]["status"], status) == []
    [again] = mirrored(reports.report(10), [made])
    assert again.status.pinned_by == ""
    [odd] = mirrored(pinned_at(10, by="Not a holder"))
    assert odd.status.pinned_by == ""


def test_the_object_of_a_pinned_step_is_made_again_with_its_annotation() -> None:
    """So that a deleted object does not let the checkpoint go."""
    [made] = mirrored(pinned_at(10))
    assert made.pin is True
    assert told(pinned_at(10), [made]) == []


def test_an_annotated_object_outlives_its_checkpoint_and_says_that_it_is_gone() -> None:
    """It is deleted once nobody wants the step pinned any more, as any other."""
    [made] = mirrored(reports.report(10))
    empty = reports.report()
    [gone] = mirrored(empty, [annotated(made, "true")])
    assert (gone.status.ready, gone.status.reason) == ("False", mirror.REMOVED)
    assert mirror.plan(empty, [gone], reports.NOW_S + 100) == []
    assert mirrored(empty, [annotated(gone, None)]) == []
