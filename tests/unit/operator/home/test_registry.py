"""
The whole of: which report speaks for a job, when a job is gone, and how often jobs are asked to report.

Called from: pytest.
"""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion.wire import home
from pillion_operator.home import registry
from pillion_operator.home.registry import JobKey, Registry
from support import reports

KEY = JobKey(reports.NAMESPACE, reports.JOB)


def test_a_pods_newer_report_takes_the_place_of_its_older_one() -> None:
    """A sidecar sends one report after the other; the last one counts, and says what changed."""
    jobs = Registry()
    first = jobs.receive(reports.report(10), created="t", now_s=0)
    assert first.changed
    assert first.before is None
    same = jobs.receive(reports.report(10, step=15, metrics={"snapshots": 2}), created="t", now_s=3)
    assert not same.changed, "a step in memory is no news for the cluster"
    assert same.job.report.checkpoints is first.job.report.checkpoints, "a long list is kept once"
    third = jobs.receive(reports.report(10, 20), created="t", now_s=6)
    assert third.changed
    assert third.job.commit_gap_s == 10
    found = jobs.get(KEY)
    assert found is not None
    assert found.report.committed_step == 20


@pytest.mark.parametrize(
    ("created", "attempt", "session", "now_s", "follows"),
    [
        ("2027-01-15T07:00:01Z", 0, "b", 1.0, True),  # a younger pod
        ("2027-01-15T06:59:59Z", 5, "b", 1.0, False),  # an older pod
        ("2027-01-15T07:00:00Z", 1, "b", 1.0, True),  # the same age, a later attempt
        ("2027-01-15T07:00:00Z", 0, "b", 1.0, False),  # neither
        ("2027-01-15T07:00:00Z", 0, "b", 5.0, True),  # neither, and the other is late
        ("2027-01-15T06:59:59Z", 0, "b", 5.0, False),  # an older pod, and the other is only late
        ("2027-01-15T06:59:59Z", 0, "b", 30.5, True),  # an older pod, and the other is gone
        ("2027-01-15T07:00:01Z", 0, "", 1.0, False),  # a younger pod whose trainers have not said hello
    ],
)
def test_another_pod_follows_only_when_it_is_newer_or_the_other_silent(
    created: str, attempt: int, session: str, now_s: float, follows: bool
) -> None:
    """A report of an older attempt never takes the place of a newer one's while that one reports."""
    jobs = Registry()
    jobs.receive(reports.report(10), created="2027-01-15T07:00:00Z", now_s=0)
    other = reports.report(10, 20, pod="run-9", pod_uid="other", session=session, attempt=attempt)
    received = jobs.receive(other, created=created, now_s=now_s)
    assert received.stale is not follows
    found = jobs.get(KEY)
    assert found is not None
    assert (found.report.pod_uid == "other") is follows


def test_a_session_that_was_followed_never_comes_back_while_the_job_reports() -> None:
    """A pod of the attempt before, cut off for a while and older in nothing but its session, stays stale."""
    jobs = Registry()
    old = reports.report(10, pod_uid="old", session="old", attempt=0)
    new = reports.report(10, pod_uid="new", session="new", attempt=1)
    jobs.receive(old, created="t", now_s=0)
    assert not jobs.receive(new, created="t", now_s=1).stale
    zombie = dataclasses.replace(old, attempt=7)
    assert jobs.receive(zombie, created="u", now_s=2).stale
    jobs.receive(new, created="t", now_s=3)
    assert jobs.receive(zombie, created="u", now_s=5).stale
    assert not jobs.receive(zombie, created="u", now_s=34).stale, "nobody else speaks for the job any more"


def test_the_coordinator_follows_whoever_spoke_before_it_was_known() -> None:
    """Before the first hello any pod may speak; the one with the trainers does from then on, however old it is."""
    jobs = Registry()
    jobs.receive(reports.report(pod_uid="young", session=""), created="2", now_s=0)
    assert jobs.receive(reports.report(pod_uid="old", session=""), created="1", now_s=1).stale
    assert not jobs.receive(reports.report(pod_uid="old", session="s"), created="1", now_s=2).stale
    assert jobs.receive(reports.report(pod_uid="young", session=""), created="2", now_s=3).stale


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["1", "2"]), st.integers(0, 2), st.floats(0, 20)),
        min_size=1,
        max_size=12,
    )
)
def test_no_order_of_restarts_shuts_a_job_out(events: list[tuple[str, str, int, float]]) -> None:
    """Whatever came before: when all others are silent, a job's pod is heard within half a minute."""
    jobs = Registry()
    now_s = 0.0
    for pod_uid, created, attempt, pause_s in events:
        now_s += pause_s
        jobs.receive(
            reports.report(pod_uid=pod_uid, session=f"s{pod_uid}{attempt}", attempt=attempt),
            created=created,
            now_s=now_s,
        )
    last = reports.report(pod_uid="a", session="sa0")
    tries = [
        jobs.receive(last, created="1", now_s=now_s + number * home.DEFAULT_INTERVAL_S)
        for number in range(round(registry.MIN_GONE_S / home.DEFAULT_INTERVAL_S) + 2)
    ]
    assert not tries[-1].stale


def test_a_silent_job_is_gone_after_three_of_its_intervals_and_half_a_minute() -> None:
    """Lost reports, and a look at storage that hangs, change nothing; and of a job that is gone nothing is kept."""
    assert reports.job().gone_s == 30
    assert dataclasses.replace(reports.job(), interval_s=20.0).gone_s == 60
    jobs = Registry()
    jobs.receive(reports.report(10), created="t", now_s=0)
    assert jobs.forget_silent(30.0) == []
    (gone,) = jobs.forget_silent(30.1)
    assert gone.key == KEY
    assert (len(jobs), jobs.get(KEY), jobs._past) == (0, None, {})


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 100_000))
def test_jobs_are_asked_for_a_bounded_number_of_reports(num_jobs: int) -> None:
    """The interval grows with the jobs so that reports a second do not, within what an answer may say."""
    interval_s = registry.interval_s(num_jobs)
    assert home.DEFAULT_INTERVAL_S <= interval_s <= home.MAX_INTERVAL_S
    assert num_jobs / interval_s <= registry.REPORTS_PER_S * 1.001 or interval_s == home.MAX_INTERVAL_S
    assert home.decode_answer(home.encode(home.Answer(interval_s=interval_s))).interval_s == interval_s


def test_five_hundred_jobs_report_each_three_seconds() -> None:
    """The goal's number of jobs is served at the shortest interval, so that a save asked for is under way in five seconds."""
    assert registry.interval_s(500) == home.DEFAULT_INTERVAL_S


def test_the_recovery_point_is_the_age_of_what_is_saved() -> None:
    """Of the newest commit, or of the newest snapshot where that counts; never below zero; unknown without either."""
    job = reports.job(10, committed_time=reports.at(-90), snapshot_time=reports.at(-5))
    assert registry.recovery_point_s(job, reports.NOW_S) == 90
    assert registry.recovery_point_s(job, reports.NOW_S, with_snapshot=True) == 5
    assert registry.recovery_point_s(job, reports.NOW_S - 1000) == 0
    assert registry.recovery_point_s(reports.job(), reports.NOW_S) is None


def test_the_gap_between_commits_survives_a_restart_and_a_retention_of_one() -> None:
    """It comes from storage where two checkpoints are there, else from the report before, and stays until the next commit."""
    assert reports.job(10, 25).commit_gap_s == 15
    jobs = Registry()
    assert jobs.receive(reports.report(10), created="t", now_s=0).job.commit_gap_s is None
    assert jobs.receive(reports.report(40), created="t", now_s=3).job.commit_gap_s == 30
    assert jobs.receive(reports.report(40), created="t", now_s=6).job.commit_gap_s == 30


def test_what_a_report_makes_us_keep_is_bounded() -> None:
    """Metrics that are no numbers, long names and long messages are left out or cut."""
    metrics = {f"n{number}": number for number in range(1000)} | {
        "text": "x",
        "flag": True,
        "y" * 100: 1,
        "d": {"a": 1},
    }
    failure = home.Failure(step=1, reason="E" * 1000, message="m" * 10000, time="")
    kept = reports.job(metrics=metrics, failures=(failure,), storage_error="e" * 10000).report
    assert len(kept.metrics) == registry.MAX_NUMBERS
    assert {type(each) for each in kept.metrics.values()} == {int}
    assert (len(kept.failures[0].reason), len(kept.failures[0].message)) == (registry.MAX_NAME, home.TEXT_LIMIT)
    assert len(kept.storage_error) == home.TEXT_LIMIT


@pytest.mark.parametrize(
    ("step", "committed", "lag"),
    [(120, 100, 20.0), (100, 100, 0.0), (60, 100, 0.0), (-1, 100, None), (120, -1, None)],
    ids=["ahead of storage", "on storage", "behind a rollback", "nothing in memory", "nothing on storage"],
)
def test_how_far_storage_is_behind_memory_counts_steps(step: int, committed: int, lag: float | None) -> None:
    """What a loss of the pods costs in steps, as far as memory knows; no number where there is nothing to count between."""
    made = dataclasses.replace(reports.report(), step=step, committed_step=committed)
    assert registry.lag_steps(made) == lag
