"""What is written down about each save: its cause, its times, and whose fault a failure is."""

import dataclasses

from pillion.errors import BarrierTimeout, PersistError, RemoteFailure, SaveSkipped, StagingError
from pillion_sidecar import channel
from pillion_sidecar.status import status
from pillion_sidecar.status.status import SidecarStatus

OUTCOME = channel.Persisted(size_bytes=100, persist_s=2.0, commit_s=0.5)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def a_journal() -> tuple[SidecarStatus, Clock, list[int]]:
    clock = Clock()
    of = SidecarStatus(clock, clock)
    news: list[int] = []
    of.listen(lambda: news.append(1))
    return of, clock, news


def test_a_save_has_the_cause_that_made_it_due() -> None:
    """A period, somebody's demand (the first save after it), or the pod's end."""
    of, _, _ = a_journal()
    of.began(1, persist=True)
    of.save_requests.take(["a"], 0.0, has_trainers=True)
    of.began(2, persist=False)
    of.began(3, persist=True)
    of.began(4, persist=True)
    of.terminating = True
    of.began(5, persist=True)
    of.rescued(2)
    of.rescued(99)
    causes = {step: of.about(step).cause for step in (1, 2, 3, 4, 5, 99, 100)}
    assert causes == {
        1: "Periodic",
        2: "OnTermination",
        3: "OnDemand",
        4: "Periodic",
        5: "OnTermination",
        99: "OnTermination",
        100: "Periodic",
    }
    assert of.about(1).started_ns == 1000 * 10**9
    assert of.about(99).started_ns == 0


def test_a_commit_is_counted_and_told_and_clears_what_storage_had() -> None:
    """Sums and counts of a save's parts; the newest commit; no storage problem any more."""
    of, clock, news = a_journal()
    of.failed(1, PersistError("no space", step=1))
    assert "no space" in of.storage_problem
    of.began(2, persist=True)
    clock.now_s += 3.0
    of.sealed(2, 0.5)
    of.sealed(2, 2.5)
    of.complete(2)
    of.committed(2, OUTCOME)
    metrics = of.metrics
    assert (metrics.stages, metrics.stage_seconds, metrics.stalls, metrics.stall_seconds) == (1, 3.0, 1, 2.5)
    assert (metrics.saves_committed, metrics.persisted_bytes, metrics.persist_seconds) == (1, 100, 2.0)
    assert of.commit == status.Commit(2, 1003.0)
    assert of.storage_problem == ""
    assert len(news) == 2


def test_the_time_to_durable_begins_at_the_seal_and_says_how_much_of_it_was_the_queue() -> None:
    """Three seconds behind another save and two of writing are five; an executor's successor counts up to its own begin."""
    of, clock, _ = a_journal()
    of.began(1, persist=True)
    clock.now_s += 10.0
    of.complete(1)
    clock.now_s += 1.0
    of.taken_up(1)
    clock.now_s += 2.0
    of.taken_up(1)
    outcome = of.since_ready(1, OUTCOME)
    of.committed(1, outcome)
    assert outcome == dataclasses.replace(OUTCOME, persist_s=5.0)
    assert (of.metrics.queue_seconds, of.metrics.persist_seconds, of.metrics.commit_seconds) == (3.0, 5.0, 0.5)


def test_a_snapshot_that_a_rescue_calls_for_waits_from_the_call_on() -> None:
    """It lay in memory by the policy's wish until then, which is no time in a queue; an unknown save has no time at all."""
    of, clock, _ = a_journal()
    of.began(1, persist=False)
    of.complete(1)
    clock.now_s += 600.0
    of.rescued(1)
    clock.now_s += 1.0
    of.taken_up(1)
    assert of.since_ready(1, OUTCOME).persist_s == 3.0
    of.taken_up(99)
    assert of.since_ready(99, OUTCOME) == OUTCOME


def test_only_what_storage_did_is_its_problem() -> None:
    """A rank that did not come is a failure of the save, and says nothing about storage."""
    of, _, _ = a_journal()
    of.failed(7, BarrierTimeout(phase="seal", missing=[1], waited_s=1.0, step=7))
    assert of.storage_problem == ""
    assert [(each.step, each.reason, each.time) for each in of.failures] == [
        (7, "BarrierTimeout", "1970-01-01T00:16:40.000Z")
    ]
    assert of.metrics.failures_by_kind == {"BarrierTimeout": 1}


def test_a_dropped_save_answers_whoever_asked_for_it_and_is_no_failure() -> None:
    """`overlap: Skip` refuses a claim before anything begins; the demand that was waiting has its answer."""
    of, _, news = a_journal()
    of.save_requests.take(["a"], 0.0, has_trainers=True)
    of.dropped(3, SaveSkipped("no slot is free", step=3), persist=True)
    (answer,) = of.save_requests.acknowledgements()
    assert (answer.progress, answer.message) == ("Failed", "no slot is free")
    assert of.metrics.saves_failed == 0
    assert list(of.failures) == []
    assert news


def test_the_end_of_trainers_is_no_failure_of_saving() -> None:
    """A save that a killed trainer had not sealed is counted apart and answered; one that failed elsewhere too is a failure."""
    of, _, news = a_journal()
    of.save_requests.take(["a"], 0.0, has_trainers=True)
    died = RemoteFailure("TrainerDied", "the trainer ended before its state was sealed")
    of.began(3, persist=True)
    of.failed(3, StagingError("the trainer died", step=3, failures={1: died}))
    (answer,) = of.save_requests.acknowledgements()
    assert answer.progress == "Failed"
    assert (of.metrics.saves_interrupted, of.metrics.saves_failed, list(of.failures)) == (1, 0, [])
    assert news
    both = {0: RemoteFailure("OSError", "full"), 1: died}
    of.failed(4, PersistError("step 4 was not saved", step=4, failures=both))
    assert (of.metrics.saves_interrupted, of.metrics.saves_failed, len(of.failures)) == (1, 1, 1)
    of.trainers_end = True
    of.failed(5, StagingError("ended", step=5))
    assert (of.metrics.saves_interrupted, of.metrics.saves_failed) == (2, 1)


def test_the_slowest_of_the_last_commits_is_what_a_drain_takes() -> None:
    """From the seal until it was visible; an hour in which storage was busy is forgotten after eight commits."""
    of, _, _ = a_journal()
    assert of.drain_s == 0.0
    for step in range(1 + status.RECENT_COMMITS):
        of.committed(step, channel.Persisted(persist_s=100.0 if step == 0 else 1.0, commit_s=0.5))
        assert of.drain_s == (100.5 if step < status.RECENT_COMMITS else 1.5)


def test_nothing_grows_without_a_bound() -> None:
    """Ten thousand saves and failures leave a few hundred entries."""
    of, _, _ = a_journal()
    for step in range(10_000):
        of.began(step, persist=True)
        of.failed(step, PersistError("x" * 10_000, step=step))
    assert len(of._saves) == status.KEPT_SAVES
    assert len(of.failures) == 16
    assert max(len(each.message) for each in of.failures) == 2000
