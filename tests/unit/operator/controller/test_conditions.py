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


def test_what_an_object_store_needs_is_named_while_nobody_reports() -> None:
    """
    A missing Secret keeps the sidecar from starting, so that no job can report it; the controller may not look. With a job that
    reports, everything was there.
    """
    store = {
        "url": "s3://bucket",
        "credentials": {"secret": "s3-writer"},
        "caBundle": {"configMap": "corp-ca"},
    }
    found = conditions.condition(status(storage={"objectStore": store}), "StorageReachable")
    assert (found["status"], found["reason"]) == ("Unknown", "NoJob")
    assert "the Secret s3-writer and the ConfigMap corp-ca" in found["message"]
    alone = conditions.condition(status(storage={"objectStore": {"url": "s3://bucket"}}), "StorageReachable")
    assert "Secret" not in alone["message"]
    reporting = conditions.condition(status(reports.job(10), storage={"objectStore": store}), "StorageReachable")
    assert (reporting["status"], reporting["reason"]) == ("True", "Writable")
    assert "Secret" not in reporting["message"]


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


def test_disks_of_the_nodes_have_a_condition_where_the_policy_has_them() -> None:
    """Held, late, or left out with the disk's error; a save that has waited for less than five minutes is not late."""
    disks = {"storage": SPEC["storage"] | {"local": {"emptyDir": {}}}}
    held = home.HeldSave(step=20, held=reports.at(-conditions.UPLOAD_LATE_S + 1))
    late = home.HeldSave(step=20, held=reports.at(-conditions.UPLOAD_LATE_S - 1))
    assert "LocalDisks" not in said(status(reports.job(10)))
    assert said(status(**disks))["LocalDisks"] == ("Unknown", "NoJob")
    assert said(status(reports.job(10, held=(held,)), **disks))["LocalDisks"] == ("True", "Held")
    assert said(status(reports.job(10, held=(late,)), **disks))["LocalDisks"] == ("False", "UploadBehind")
    found = status(reports.job(10, held=(late,), local_error="ranks [1]: No space left"), **disks)
    assert said(found)["LocalDisks"] == ("False", "LocalDiskUnusable")
    assert "job run: ranks [1]: No space left" in conditions.condition(found, "LocalDisks")["message"]


def test_a_quota_has_a_condition_where_the_policy_has_one() -> None:
    """Within it, or above it with the sidecar's words."""
    limited: dict[str, Any] = {"retention": {"maxBytes": "1Gi"}}
    assert "QuotaExceeded" not in said(status(reports.job(10, quota_error="old")))
    assert said(status(**limited))["QuotaExceeded"] == ("False", "NoJob")
    assert said(status(reports.job(10), **limited))["QuotaExceeded"] == ("False", "Fits")
    found = status(reports.job(10, quota_error="the newest alone is larger"), reports.job(10, job_id="b"), **limited)
    assert said(found)["QuotaExceeded"] == ("True", "QuotaExceeded")
    assert "job run: the newest alone is larger" in conditions.condition(found, "QuotaExceeded")["message"]


def test_the_status_has_the_automatic_interval_of_each_job_with_its_inputs_and_the_reason() -> None:
    """In the order of the jobs' ids, of sixteen jobs at most; a job without one is not in it, and none leaves no field."""
    numbers = {"period_s": 59.6, "stall_s": 0.5, "persist_s": 20.0, "step_s": 2.0, "mtbf_s": 3600.0, "failures": 1.6}
    chosen: dict[str, Any] = {
        "interval_steps": 30,
        "interval_bound": "Optimum",
        "interval_reason": "every 30 steps",
        "interval_inputs": numbers,
    }
    found = status(reports.job(10, job_id="b", **chosen), reports.job(10, job_id="a", **chosen), reports.job(10))
    assert [each["jobID"] for each in found["intervals"]] == ["a", "b"]
    assert found["intervals"][0] == {
        "jobID": "a",
        "steps": 30,
        "seconds": 60,
        "reason": "Optimum",
        "message": "every 30 steps",
        "stallMilliseconds": 500,
        "persistMilliseconds": 20_000,
        "stepMilliseconds": 2000,
        "meanTimeBetweenFailuresSeconds": 3600,
        "failures": 2,
    }
    many = [reports.job(10, job_id=f"{number:03}", **chosen) for number in range(20)]
    assert len(status(*many)["intervals"]) == 16
    assert "intervals" not in status(reports.job(10))
    absurd = chosen | {"interval_inputs": {"stall_s": 1e300, "persist_s": -1e300, "mtbf_s": 1e18}}
    assert status(reports.job(10, **absurd))["intervals"][0]["persistMilliseconds"] == 0
