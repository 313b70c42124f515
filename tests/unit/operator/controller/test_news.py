"""
The whole of: what people read of a job that goes well, and how seldom.

Called from: pytest.
"""

from typing import Any

import pytest

from pillion_operator.controller import news
from pillion_operator.home.registry import JobKey
from support import reports

KEY = JobKey(reports.NAMESPACE, reports.JOB)


class Story:
    """A job's reports, one after the other."""

    def __init__(self) -> None:
        self.news = news.News()
        self.now_s = reports.NOW_S

    def report(
        self, after_s: float = 0.0, *, committed: int = 0, dropped: int = 0, step: int = -1, **changes: Any
    ) -> list[str]:
        """What is said of a report that comes so many seconds after the one before."""
        self.now_s += after_s
        counted = {
            "saves_committed": committed,
            "saves_skipped": dropped // 2,
            "saves_replaced": dropped - dropped // 2,
        }
        made = reports.report(committed_step=step, metrics=counted, **changes)
        return [f"{reason}: {text}" for reason, text in self.news.notices(KEY, made, self.now_s)]


@pytest.fixture
def story() -> Story:
    """A job of which nothing was said yet."""
    made = Story()
    assert made.report() == []
    return made


def test_a_save_each_minute_is_an_event_each_ten_minutes(story: Story) -> None:
    """The first commit is told at once; then how many there were and the newest, so that a day of them is no flood."""
    assert story.report(60, committed=1, step=10) == ["SaveCommitted: The checkpoint of step 10 is committed."]
    said = [line for minute in range(2, 25) for line in story.report(60, committed=minute, step=10 * minute)]
    assert said == [
        "SaveCommitted: 10 checkpoints are committed, the newest of step 110.",
        "SaveCommitted: 10 checkpoints are committed, the newest of step 210.",
    ]


def test_a_commit_that_was_not_told_is_told_without_another_one(story: Story) -> None:
    """When its time has come, or when the pod ends."""
    story.report(committed=1, step=10)
    assert story.report(5, committed=2, step=20) == []
    assert story.report(600, committed=2, step=20) == ["SaveCommitted: The checkpoint of step 20 is committed."]
    assert story.report(5, committed=4, step=40, draining=True) == [
        "SaveCommitted: 2 checkpoints are committed, the newest of step 40."
    ]
    assert story.report(5, committed=4, step=40, draining=True) == []


def test_saves_that_the_policy_drops_are_told_as_seldom(story: Story) -> None:
    """Skipped and replaced ones together: both are what `staging.overlap` says."""
    assert story.report(dropped=1) == ["SaveSkipped: 1 save was dropped because no slot was free (staging.overlap)."]
    assert story.report(10, dropped=4) == []
    assert story.report(600, dropped=4) == [
        "SaveSkipped: 3 saves were dropped because no slot was free (staging.overlap)."
    ]


def test_each_load_is_told_once_with_where_from(story: Story) -> None:
    """Memory or storage, in the words of people; a load that found nothing is none."""
    loaded: dict[str, Any] = {"loaded_step": 40, "loaded_from": "arena", "loaded_time": reports.at(1)}
    assert story.report(1, **loaded) == ["Loaded: Training resumed from step 40, from memory."]
    assert story.report(1, **loaded) == []
    again: dict[str, Any] = {"loaded_step": 40, "loaded_from": "storage", "loaded_time": reports.at(9)}
    assert story.report(1, **again) == ["Loaded: Training resumed from step 40, from storage."]


def test_another_sidecar_counts_from_nothing(story: Story) -> None:
    """The counters of a replaced pod, or of a container that was started again, begin at 0: what they have is new."""
    story.report(committed=5, step=50)
    assert story.report(700, committed=1, step=60, pod_uid="pod-uid-1") == [
        "SaveCommitted: The checkpoint of step 60 is committed."
    ]
    assert story.report(700, committed=7, step=70, pod_uid="pod-uid-1") != []
    assert story.report(700, committed=2, step=80, pod_uid="pod-uid-1") == [
        "SaveCommitted: 2 checkpoints are committed, the newest of step 80."
    ]


def test_a_controller_that_begins_tells_what_is_fresh_and_no_more() -> None:
    """What happened an hour ago was told by the one before it; what happened a moment ago may not have been."""
    story: list[dict[str, Any]] = [
        {
            "committed": 7,
            "step": 70,
            "committed_time": at,
            "loaded_step": 10,
            "loaded_from": "storage",
            "loaded_time": at,
        }
        for at in (reports.at(-3600), reports.at(-1))
    ]
    old, fresh = story
    assert Story().report(**old) == []
    assert Story().report(**fresh) == [
        "Loaded: Training resumed from step 10, from storage.",
        "SaveCommitted: The checkpoint of step 70 is committed.",
    ]


def test_what_a_report_claims_to_have_counted_is_taken_for_numbers_only(story: Story) -> None:
    """Anybody's sidecar reports; what is no whole number says nothing."""
    made = reports.report(metrics={"saves_committed": float("nan"), "saves_skipped": float("inf")})
    assert story.news.notices(KEY, made, story.now_s) == []


def test_a_job_that_is_gone_is_forgotten(story: Story) -> None:
    """Nothing is kept of jobs that do not report."""
    story.news.keep([])
    assert story.news._announced == {}
