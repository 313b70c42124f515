"""
The whole of: the status of a policy says what is so, in words, and changes only when something happened.

Called from: pytest.
"""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion.wire import home
from pillion_operator.controller import conditions
from pillion_operator.home.registry import Job
from pillion_operator.injection import checkpoint_policy
from support import api_in_memory, reports
from unit.crds import structural

CRD = structural.schema_of(structural.read("checkpointpolicies"))["properties"]["status"]
SPEC: dict[str, Any] = {
    "trigger": {"periodSteps": 10},
    "staging": {"sizeLimit": "1Gi"},
    "storage": {"persistentVolumeClaim": {"claimName": "c"}},
}


def status(
    *jobs: Job, before: Any = None, num_pods: int = 0, now_s: float = reports.NOW_S, **spec: Any
) -> dict[str, Any]:
    document = {
        "apiVersion": "pillion.dev/v1alpha1",
        "kind": "CheckpointPolicy",
        "metadata": {"name": reports.POLICY, "generation": 3},
        "spec": SPEC | spec,
    }
    found = checkpoint_policy.from_object(document)
    made = conditions.status(found, before or {}, jobs, num_pods, lambda job: f"{job.report.job_id}-object", now_s)
    assert structural.problems(CRD, made) == []
    return made


def said(of: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {each["type"]: (each["status"], each["reason"]) for each in of["conditions"]}


def failing(job_id: str = reports.JOB, **changes: Any) -> Job:
    failure = home.Failure(step=30, reason="PersistError", message="No space left", time=reports.at(0))
    return reports.job(10, job_id=job_id, failures=(failure,), **changes)


def test_a_policy_that_nobody_uses_is_ready_and_no_more_is_known() -> None:
    """Ready speaks of the spec alone."""
    found = status()
    assert said(found) == {
        "Ready": ("True", "Valid"),
        "StorageReachable": ("Unknown", "NoJob"),
        "Degraded": ("False", "NoJob"),
        "DrainTooShort": ("False", "NoJob"),
        "ArenaTooSmall": ("False", "NoJob"),
    }
    assert (found["observedGeneration"], found["injectedPods"]) == (3, 0)
    assert {each["observedGeneration"] for each in found["conditions"]} == {3}
    assert "lastCheckpoint" not in found


def test_a_policy_that_cannot_be_used_says_all_that_is_wrong() -> None:
    """The message has every problem, in the words of the policy's reader."""
    found = status(trigger={}, staging={})
    assert said(found)["Ready"] == ("False", "Invalid")
    message = conditions.condition(found, "Ready")["message"]
    assert "periodSteps" in message
    assert "sizeLimit" in message


def test_a_suspended_policy_is_ready_and_says_so() -> None:
    """It can be used; that it is not, is the wish of whoever suspended it."""
    assert said(status(suspend=True))["Ready"] == ("True", "Suspended")


def test_jobs_that_save_make_a_policy_reachable_and_not_degraded() -> None:
    """The newest commit of all jobs is the last checkpoint, and the gap before it the recovery point."""
    found = status(reports.job(10, 25), reports.job(5, job_id="b"), num_pods=4)
    assert said(found)["StorageReachable"] == ("True", "Writable")
    assert said(found)["Degraded"] == ("False", "Saving")
    assert found["injectedPods"] == 4
    assert found["lastCheckpoint"] == {
        "jobID": reports.JOB,
        "step": 25,
        "time": reports.at(-3574),
        "name": f"{reports.JOB}-object",
    }
    assert found["recoveryPointSeconds"] == 15


def test_a_save_that_takes_longer_than_the_drain_is_told_before_a_pod_has_to_end() -> None:
    """What was measured is compared with what injection adds to the grace period; a sidecar of before, which measures nothing, fits."""
    slow, quick, silent = reports.job(10, drain_s=60.5), reports.job(10, drain_s=60.0), reports.job(10)
    drain = {"timeoutSeconds": 60}
    assert said(status(quick, silent, drain=drain))["DrainTooShort"] == ("False", "Fits")
    found = status(quick, slow, drain=drain)
    assert said(found)["DrainTooShort"] == ("True", "DrainTooShort")
    assert conditions.condition(found, "DrainTooShort")["message"].endswith("job run: a save took 61 s")
    assert said(status(slow, drain={"timeoutSeconds": 61}))["DrainTooShort"] == ("False", "Fits")


def test_an_arena_that_is_too_small_is_told_with_the_job() -> None:
    """As the job's sidecar has found it, with what the trainers said of their state."""
    assert said(status(reports.job(10)))["ArenaTooSmall"] == ("False", "Fits")
    found = status(reports.job(10, memory_error="needs 2, has 1"), reports.job(10, job_id="b"))
    assert said(found)["ArenaTooSmall"] == ("True", "ArenaTooSmall")
    assert "job run: needs 2, has 1" in conditions.condition(found, "ArenaTooSmall")["message"]


def test_a_storage_that_cannot_be_used_is_named_with_the_job() -> None:
    """The message says which jobs, a few of them, and what they say."""
    jobs = [reports.job(10, job_id=f"job-{number}", storage_error="ENOSPC: full") for number in range(5)]
    found = status(*jobs, reports.job(10))
    assert said(found)["StorageReachable"] == ("False", "StorageError")
    message = conditions.condition(found, "StorageReachable")["message"]
    assert "job job-0: ENOSPC: full" in message
    assert message.endswith("and 2 more")


def test_a_job_whose_newest_save_failed_degrades_its_policy_until_it_saves_again() -> None:
    """A failure before the newest commit is history."""
    found = status(failing(), reports.job(10, job_id="b"))
    assert said(found)["Degraded"] == ("True", "SaveFailed")
    assert "step 30: PersistError: No space left" in conditions.condition(found, "Degraded")["message"]
    assert said(status(failing(committed_time=reports.at(1))))["Degraded"] == ("False", "Saving")


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    """Another message, or another reason, is no transition."""
    before = status(failing())
    later = status(failing("b"), before=before, now_s=reports.NOW_S + 100)
    degraded = conditions.condition(later, "Degraded")
    assert degraded["message"] != conditions.condition(before, "Degraded")["message"]
    assert degraded["lastTransitionTime"] == reports.at(0)
    recovered = status(reports.job(10), before=later, now_s=reports.NOW_S + 200)
    assert conditions.condition(recovered, "Degraded")["lastTransitionTime"] == reports.at(200)
    assert conditions.condition(recovered, "Ready")["lastTransitionTime"] == reports.at(0)


def test_the_last_checkpoint_of_a_job_that_is_gone_stays() -> None:
    """It is what was committed last, whether the job still runs or not; a newer commit of another job takes its place."""
    before = status(reports.job(10, 25))
    assert status(before=before)["lastCheckpoint"] == before["lastCheckpoint"]
    assert status(before=before)["recoveryPointSeconds"] == 15
    older = status(reports.job(20, job_id="b"), before=before)
    assert older["lastCheckpoint"] == before["lastCheckpoint"]
    newer = status(reports.job(30, job_id="b"), before=before)
    assert newer["lastCheckpoint"]["jobID"] == "b"
    assert "recoveryPointSeconds" not in newer, "the other job has no commit before"


def test_the_recovery_point_stays_when_the_controller_forgot_the_commit_before() -> None:
    """After a restart, with one checkpoint on storage, what was written is not taken back."""
    before = status(reports.job(10, 25))
    after = status(reports.job(25), before=before)
    assert after["recoveryPointSeconds"] == 15


def test_nothing_is_written_while_nothing_happens() -> None:
    """A second look, a day later, at the same jobs finds nothing to write."""
    jobs = (reports.job(10, 25), failing("b"))
    before = status(*jobs, num_pods=2)
    after = status(*jobs, num_pods=2, before=before, now_s=reports.NOW_S + 86400)
    assert conditions.patch(before, after) is None


statuses = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=4,
)
documents = st.dictionaries(st.sampled_from("wxyz"), statuses, max_size=4)


@settings(max_examples=200, deadline=None)
@given(documents, documents)
def test_a_patch_makes_one_status_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    """As a merge patch on the API server; of the objects in a status none is nested, so one level is enough."""
    before, after = flat(before), flat(after)
    patch = conditions.patch(before, after)
    assert (patch is None) is (before == after)
    target = {"status": copy.deepcopy(before)}
    api_in_memory.merge(target, patch or {})
    assert target["status"] == after


def flat(document: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {name: each for name, each in value.items() if not isinstance(each, dict)}
        if isinstance(value, dict)
        else value
        for key, value in document.items()
    }


@pytest.mark.parametrize("reason", list(conditions.Reason))
def test_every_reason_is_one_that_the_api_server_takes(reason: conditions.Reason) -> None:
    """A code in CamelCase."""
    schema = dict(structural.walk(CRD))["conditions[].reason"]
    assert structural.problems(schema, reason.value) == []
