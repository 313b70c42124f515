"""
The whole of: counts of pods and requests by annotation, kept up with each change, and the queue of what is due.

Called from: pytest.
"""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pillion_operator.controller import pod_index, work_queue
from pillion_operator.home import injected
from pillion_operator.home.registry import JobKey
from support import reports

KEY = JobKey(reports.NAMESPACE, reports.JOB)


def pod(
    number: int, policy: str = reports.POLICY, job: str = reports.JOB, owner: str = "job-uid", save_now: str = ""
) -> injected.Pod:
    return injected.Pod(
        namespace=reports.NAMESPACE,
        name=f"p-{number}",
        uid=f"uid-{number}",
        created=reports.at(-100),
        policy=policy,
        job_id=job,
        owner=injected.Owner(api_version="batch/v1", kind="Job", name=job, uid=owner) if owner else None,
        save_now=save_now,
        save_now_time=reports.at(0) if save_now else "",
    )


def job_object(value: str, uid: str = "job-uid") -> pod_index.JobObject:
    metadata = {"namespace": reports.NAMESPACE, "name": reports.JOB, "uid": uid}
    found = pod_index.project_job({"metadata": metadata | {"annotations": {"pillion.dev/save-now": value}}})
    assert found is not None
    return found


class Seen:
    def __init__(self) -> None:
        self.policies: list[tuple[str, str]] = []
        self.jobs: list[JobKey] = []
        self.pod_index = pod_index.PodIndex(self.policies.append, self.jobs.append)

    def put(self, new: injected.Pod | None, old: injected.Pod | None = None) -> None:
        self.pod_index.pod_changed(("", ""), old, new)


def test_pods_are_counted_by_policy() -> None:
    """Each pod that comes, goes, or goes over to another policy is told to the policies that it concerns."""
    seen = Seen()
    seen.put(pod(1))
    seen.put(pod(2))
    seen.put(pod(2, policy="other"), old=pod(2))
    assert seen.pod_index.num_pods((reports.NAMESPACE, reports.POLICY)) == 1
    assert seen.pod_index.num_pods((reports.NAMESPACE, "other")) == 1
    seen.policies.clear()
    seen.put(pod(1, save_now="x"), old=pod(1))
    assert seen.policies == [], "the number is the same"
    seen.put(None, old=pod(1, save_now="x"))
    assert seen.policies == [(reports.NAMESPACE, reports.POLICY)]
    assert seen.pod_index.counts() == [((reports.NAMESPACE, "other"), 1)]


def test_an_annotation_on_a_pod_asks_the_pods_job() -> None:
    """From the moment that it is there until the pod is gone or the annotation is."""
    seen = Seen()
    seen.put(pod(1))
    assert seen.pod_index.save_annotations(KEY) == []
    seen.put(pod(1, save_now="a"), old=pod(1))
    (note,) = seen.pod_index.save_annotations(KEY)
    assert (note.uid, note.value, note.about["kind"]) == ("uid-1", "a", "Pod")
    assert seen.jobs == [KEY]
    seen.put(pod(1), old=pod(1, save_now="a"))
    assert seen.pod_index.save_annotations(KEY) == []


def test_an_annotation_on_a_job_asks_the_job_whose_pods_it_owns() -> None:
    """Whichever of the two is seen first."""
    seen = Seen()
    seen.pod_index.job_changed(("", ""), None, job_object("a"))
    assert seen.pod_index.save_annotations(KEY) == []
    seen.put(pod(1))
    (note,) = seen.pod_index.save_annotations(KEY)
    assert (note.uid, note.about["kind"]) == ("job-uid", "Job")
    assert seen.pod_index.jobs_with_save_annotations() == [KEY]
    seen.put(None, old=pod(1))
    assert seen.pod_index.save_annotations(KEY) == []
    seen.put(pod(1))
    seen.pod_index.job_changed(("", ""), job_object("a"), None)
    assert seen.pod_index.save_annotations(KEY) == []


def test_a_job_without_the_annotation_is_not_kept() -> None:
    """A cluster may have many Jobs, and few of them ask for anything."""
    assert pod_index.project_job({"metadata": {"name": "a", "namespace": "b", "uid": "c"}}) is None


pods = st.builds(
    pod,
    st.integers(0, 3),
    policy=st.sampled_from("pq"),
    job=st.sampled_from("jk"),
    owner=st.sampled_from(["", "o", "u"]),
    save_now=st.sampled_from(["", "1"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), pods), max_size=20))
def test_counts_and_indexes_are_what_the_pods_add_up_to(changes: list[tuple[bool, injected.Pod]]) -> None:
    """However pods come, change and go; and when all are gone, nothing is left."""
    seen = Seen()
    seen.pod_index.job_changed(("", ""), None, job_object("a", uid="o"))
    known: dict[str, injected.Pod] = {}
    for is_there, each in changes:
        old = known.pop(each.name, None)
        if is_there:
            known[each.name] = each
        if old is not None or is_there:
            seen.put(each if is_there else None, old=old)
    expected = Counter((each.namespace, each.policy) for each in known.values())
    assert dict(seen.pod_index.counts()) == dict(expected)
    for job in "jk":
        mine = [each for each in known.values() if each.job_id == job]
        asked = {each.uid for each in mine if each.save_now} | {each.owner.uid for each in mine if each.owner} & {"o"}
        assert {note.uid for note in seen.pod_index.save_annotations(JobKey(reports.NAMESPACE, job))} == asked
    for each in list(known.values()):
        seen.put(None, old=each)
    assert (seen.pod_index.counts(), seen.pod_index.jobs_with_save_annotations()) == ([], [])
    assert (seen.pod_index._owners, seen.pod_index._owned, seen.pod_index._on_pods) == ({}, {}, {})


def test_a_key_that_is_marked_twice_is_looked_at_once() -> None:
    """And at the earlier of the two moments."""
    due = work_queue.WorkQueue[str]()
    due.mark("a", 5.0)
    due.mark("a", 3.0)
    due.mark("b", 4.0)
    assert (len(due), due.next_s()) == (2, 3.0)
    assert due.take(2.9) is None
    assert due.take(4.0) == ("a", 0)
    assert due.take(4.0) == ("b", 0)
    assert (due.take(9.0), due.next_s()) == (None, None)


def test_a_key_that_failed_waits_longer_each_time_within_a_bound() -> None:
    """However often it is marked meanwhile."""
    due = work_queue.WorkQueue[str]()
    now_s, failures, pauses = 0.0, 0, []
    for _ in range(10):
        due.failed("a", failures, now_s)
        due.mark("a", now_s)
        at_s = due.next_s()
        assert at_s is not None
        pauses.append(at_s - now_s)
        now_s = at_s
        taken = due.take(now_s)
        assert taken is not None
        failures = taken[1]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    due.mark("a", now_s)
    assert due.take(now_s) == ("a", 0), "a success ends it"


def test_a_key_that_is_held_waits_for_its_moment() -> None:
    """A policy's status is not written more often than each two seconds; what is held is forgotten afterwards."""
    due = work_queue.WorkQueue[str]()
    due.hold("a", 0.0, 2.0)
    due.mark("a", 0.5)
    assert due.take(1.9) is None
    assert due.take(2.0) == ("a", 0)
    due.hold("b", 100.0, 2.0)
    assert due._held == {"b": 102.0}
