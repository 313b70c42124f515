"""Which parts of a policy a running job takes up, and which wait for the next pod."""

import dataclasses

from pillion.wire import policy
from pillion_sidecar.supervisor import effective_policy

STARTED_WITH = policy.parse(
    {
        "trigger": {"periodSteps": 100},
        "staging": {"sizeLimit": "1Gi"},
        "storage": {"persistentVolumeClaim": {"claimName": "a"}},
    },
    embedded=False,
)


def told(**spec: object) -> policy.Policy:
    return policy.parse({**policy.dump(STARTED_WITH), **spec}, embedded=True)


def test_trigger_retention_restore_drain_and_suspend_are_taken_up_and_nothing_else() -> None:
    """The rest stays as the pod was started."""
    of = effective_policy.EffectivePolicy()
    now = told(
        trigger={"periodSeconds": 9, "onTermination": "Skip"},
        retention={"keepLast": 1},
        restore={"mode": "Step", "step": 400},
        drain={"timeoutSeconds": 5},
        suspend=True,
        staging={"slots": 4},
        storage={"path": "/b"},
        store="Own",
    )
    assert of.over(STARTED_WITH) == STARTED_WITH
    assert of.take(now, 7, STARTED_WITH)
    assert (of.generation, of.changed) == (7, True)
    assert of.over(STARTED_WITH) == dataclasses.replace(
        STARTED_WITH,
        trigger=now.trigger,
        retention=now.retention,
        restore=policy.Restore(mode=policy.RestoreMode.STEP, step=400),
        drain=now.drain,
        suspend=True,
    )
    assert not of.take(now, 8, STARTED_WITH)
    assert of.generation == 8


def test_the_policy_that_the_pod_has_is_no_change() -> None:
    """The first answer mostly says what injection said: only the generation is new."""
    of = effective_policy.EffectivePolicy()
    assert not of.take(told(), 3, STARTED_WITH)
    assert (of.generation, of.changed) == (3, False)


def test_what_waits_for_the_next_pod_is_told_once_by_name() -> None:
    """Each set of fields is told once; resources and arena, which the pod's annotations may set, count from the first answer."""
    of = effective_policy.EffectivePolicy()
    annotated = told(sidecar={"resources": {"requests": {"cpu": 1}}}, staging={"sizeLimit": "2Gi"})
    assert of.later(annotated, STARTED_WITH) == frozenset()
    moved = dataclasses.replace(annotated, store=policy.StoreMode.OWN, storage=policy.Storage(path="/b"))
    assert of.later(moved, STARTED_WITH) == {"store", "storage"}
    assert of.later(moved, STARTED_WITH) == frozenset()
    bigger = dataclasses.replace(annotated, staging=dataclasses.replace(annotated.staging, slots=5))
    assert of.later(bigger, STARTED_WITH) == {"staging"}
    assert of.later(annotated, STARTED_WITH) == frozenset()
    assert of.later(bigger, STARTED_WITH) == {"staging"}


def test_what_goes_to_other_pods_is_read_there_as_the_same() -> None:
    """The parts that are taken up survive the trip through a document."""
    of = told(
        trigger={"periodSteps": 7, "snapshotSteps": 2}, retention={"keepLast": 2, "keepEverySteps": 50}, suspend=True
    )
    there = effective_policy.EffectivePolicy()
    there.take(policy.parse(effective_policy.document(of), embedded=True), 1, STARTED_WITH)
    assert effective_policy.document(there.over(STARTED_WITH)) == effective_policy.document(of)


def test_trainers_get_no_field_that_is_none_of_their_business() -> None:
    """A client of before refuses a field that it does not know: user, variables and Secrets of the sidecar stay in the sidecar."""
    sidecar = {"runAsUser": 0, "runAsGroup": 0, "env": [{"name": "A", "value": "x"}]}
    sidecar["envFrom"] = [{"secretRef": {"name": "s3"}}]
    given = effective_policy.for_trainers(policy.dump(told(sidecar=sidecar)))
    assert given == effective_policy.for_trainers(policy.dump(STARTED_WITH))
