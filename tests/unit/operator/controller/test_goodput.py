"""What of a job's time stands in the status of its policy, and what in its series."""

from typing import Any

import pytest

from pillion.wire import home
from pillion_operator.controller import goodput
from support import reports

SPENT = {"trained": 900.4, "retrained": 50.0, "stalled": 4.6, "waited": 5.0, "restoring": 10.0, "down": 30.0}


def entries(*jobs: Any, before: Any = None) -> list[Any]:
    return goodput.entries(before or {}, jobs)


def test_the_status_says_what_the_time_of_each_job_went_to() -> None:
    """In the order of the jobs' ids, of sixteen jobs at most, in whole seconds and percent."""
    made = entries(
        reports.job(10, job_id="b", run_seconds=SPENT), reports.job(10, job_id="a", run_seconds=SPENT, run_attempts=3)
    )
    assert [each["jobID"] for each in made] == ["a", "b"]
    assert made[0] == {
        "jobID": "a",
        "time": reports.job(10).report.committed_time,
        "percent": 90,
        "attempts": 3,
        "trainedSeconds": 900,
        "retrainedSeconds": 50,
        "stalledSeconds": 5,
        "waitedSeconds": 5,
        "restoringSeconds": 10,
        "downSeconds": 30,
    }
    assert len(entries(*(reports.job(10, job_id=f"{number:03}", run_seconds=SPENT) for number in range(20)))) == 16


def test_an_entry_changes_with_a_commit_and_not_with_the_time() -> None:
    """Every report has other seconds: a status that followed them would be written every three seconds."""
    first = entries(reports.job(10, run_seconds=SPENT))
    later = SPENT | {"trained": 1000.0}
    assert entries(reports.job(10, run_seconds=later), before={"goodput": first}) == first
    [changed] = entries(reports.job(20, run_seconds=later), before={"goodput": first})
    assert changed["trainedSeconds"] == 1000


@pytest.mark.parametrize(
    "spent",
    [{}, {"trained": 1.0}, dict.fromkeys(home.RUN_KINDS, 0.0)],
    ids=["an-older-sidecar", "a-part", "no-time-yet"],
)
def test_a_job_of_which_the_time_is_not_known_has_no_entry(spent: dict[str, float]) -> None:
    """Nothing is made up: neither a share of nothing, nor a kind that a sidecar did not send."""
    assert entries(reports.job(10, run_seconds=spent)) == []


def test_a_job_without_a_commit_has_no_entry() -> None:
    assert entries(reports.job(run_seconds=SPENT)) == []


def test_absurd_numbers_of_one_sidecar_stay_within_what_the_api_server_takes() -> None:
    """A job's wrong report must not keep the others' status from being written."""
    absurd = dict.fromkeys(home.RUN_KINDS, -1.0) | {"trained": 1e300}
    [made] = entries(reports.job(10, run_seconds=absurd, run_attempts=-5))
    assert made["percent"] == 100
    assert made["attempts"] == 1
    assert made["trainedSeconds"] == 10**12
    assert made["downSeconds"] == 0
