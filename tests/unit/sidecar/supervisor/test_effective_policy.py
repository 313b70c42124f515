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
    assert of.current(STARTED_WITH) == STARTED_WITH
    assert of.apply(now, 7, STARTED_WITH)
    assert (of.policy_generation, of.changed) == (7, True)
    assert of.current(STARTED_WITH) == dataclasses.replace(
        STARTED_WITH,
        trigger=now.trigger,
        retention=now.retention,
        restore=policy.Restore(mode=policy.RestoreMode.STEP, step=400),
        drain=now.drain,
        suspend=True,
    )
    assert not of.apply(now, 8, STARTED_WITH)
    assert of.policy_generation == 8


def test_the_policy_that_the_pod_has_is_no_change() -> None:
    """The first answer mostly says what injection said: only the generation is new."""
    of = effective_policy.EffectivePolicy()
    assert not of.apply(told(), 3, STARTED_WITH)
    assert (of.policy_generation, of.changed) == (3, False)


def test_what_waits_for_the_next_pod_is_told_once_by_name() -> None:
    """Each set of fields is told once; resources and arena, which the pod's annotations may set, count from the first answer."""
    of = effective_policy.EffectivePolicy()
    annotated = told(sidecar={"resources": {"requests": {"cpu": 1}}}, staging={"sizeLimit": "2Gi"})
    assert of.deferred_fields(annotated, STARTED_WITH) == frozenset()
    moved = dataclasses.replace(annotated, store=policy.StoreMode.OWN, storage=policy.Storage(path="/b"))
    assert of.deferred_fields(moved, STARTED_WITH) == {"store", "storage"}
    assert of.deferred_fields(moved, STARTED_WITH) == frozenset()
    bigger = dataclasses.replace(annotated, staging=dataclasses.replace(annotated.staging, slots=5))
    assert of.deferred_fields(bigger, STARTED_WITH) == {"staging"}
    assert of.deferred_fields(annotated, STARTED_WITH) == frozenset()
    assert of.deferred_fields(bigger, STARTED_WITH) == {"staging"}


def test_what_goes_to_other_pods_is_read_there_as_the_same() -> None:
    """The parts that are taken up survive the trip through a document."""
    of = told(
        trigger={"periodSteps": 7, "snapshotSteps": 2}, retention={"keepLast": 2, "keepEverySteps": 50}, suspend=True
    )
    there = effective_policy.EffectivePolicy()
    there.apply(policy.parse(effective_policy.document(of), embedded=True), 1, STARTED_WITH)
    assert effective_policy.document(there.current(STARTED_WITH)) == effective_policy.document(of)


def test_trainers_get_no_field_that_is_none_of_their_business() -> None:
    """A client of before refuses a field that it does not know: user, variables and Secrets of the sidecar stay in the sidecar."""
    sidecar = {"runAsUser": 0, "runAsGroup": 0, "env": [{"name": "A", "value": "x"}]}
    sidecar["envFrom"] = [{"secretRef": {"name": "s3"}}]
    given = effective_policy.for_trainers(policy.dump(told(sidecar=sidecar)))
    assert given == effective_policy.for_trainers(policy.dump(STARTED_WITH))


def test_trainers_get_a_period_in_steps_in_place_of_the_automatic_one() -> None:
    """A client of before refuses a field that it does not know. Until something is measured there is no period."""
    automatic = policy.dump(told(trigger={"auto": {"overheadPercent": 2}, "snapshotSteps": 3}))
    before, after = effective_policy.for_trainers(automatic), effective_policy.for_trainers(automatic, 40)
    assert before["trigger"] == {"snapshotSteps": 3, "onTermination": "Save"}
    assert after["trigger"] == before["trigger"] | {"periodSteps": 40}
    fixed = policy.dump(told(trigger={"periodSteps": 7}))
    assert effective_policy.for_trainers(fixed, 40) == effective_policy.for_trainers(fixed), "a fixed period stays"
