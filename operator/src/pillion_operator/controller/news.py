"""
The whole of: events about a healthy job: commits, saves that its policy drops, and the checkpoint that training resumed from.

Called from: `report_handler`, with each report. Pure: time is an argument.
Must never: post an event for each save. A job that saves each minute gets one event, then one every FOLD_S with the number of saves and
the newest of them. Saves that are not announced yet are announced when the pod drains.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pillion.wire import home
from pillion_operator.controller.commands import NoticeReason
from pillion_operator.home import times
from pillion_operator.home.registry import JobKey

FOLD_S: Final = 600.0
"""Minimum time between two events of one kind on one job: six an hour, which is how long Kubernetes keeps events."""
RECENT_S: Final = 60.0
"""Maximum age of news in the first report of a job. The controller before this one has announced what is older."""
_FROM: Final = {"arena": "memory", "storage": "storage"}
Announcement = tuple[NoticeReason, str]
"""Reason and text of an event."""


@dataclass(slots=True)
class _Announced:
    """The announced state of one job."""

    pod: str
    committed: int
    dropped: int
    loaded: str
    committed_s: float = float("-inf")
    dropped_s: float = float("-inf")


class News:
    """The announced state of each job that reports."""

    def __init__(self) -> None:
        self._announced: dict[JobKey, _Announced] = {}

    def notices(self, key: JobKey, report: home.Report, now_s: float) -> list[Announcement]:
        """
        Return the events to write now.

        Args:
            key: the job.
            report: the job's newest report.
            now_s: time in seconds since 1970.
        """
        committed, dropped = _count(report, "saves_committed"), _count(report, "saves_skipped", "saves_replaced")
        announced = self._announced.get(key)
        if announced is None:
            announced = self._announced[key] = _Announced(report.pod_uid, committed, dropped, report.loaded_time)
            announced.committed -= committed > 0 and _is_recent(report.committed_time, now_s)
            announced.loaded = "" if _is_recent(report.loaded_time, now_s) else report.loaded_time
        if announced.pod != report.pod_uid or committed < announced.committed or dropped < announced.dropped:
            # Another sidecar reports, whose counters begin at 0.
            announced.pod, announced.committed, announced.dropped = report.pod_uid, 0, 0
        news: list[Announcement] = []
        if announced.loaded != report.loaded_time:
            announced.loaded = report.loaded_time
            where = _FROM.get(report.loaded_from, report.loaded_from)
            news.append((NoticeReason.LOADED, f"Training resumed from step {report.loaded_step}, from {where}."))
        if committed > announced.committed and (report.draining or now_s - announced.committed_s >= FOLD_S):
            number, announced.committed, announced.committed_s = committed - announced.committed, committed, now_s
            news.append((NoticeReason.COMMITTED, _commits(number, report.committed_step)))
        if dropped > announced.dropped and (report.draining or now_s - announced.dropped_s >= FOLD_S):
            number, announced.dropped, announced.dropped_s = dropped - announced.dropped, dropped, now_s
            what = "1 save was" if number == 1 else f"{number} saves were"
            news.append((NoticeReason.SKIPPED, f"{what} dropped because no slot was free (staging.overlap)."))
        return news

    def keep(self, jobs: Collection[JobKey]) -> None:
        """Forget the jobs that no longer report."""
        for key in self._announced.keys() - set(jobs):
            del self._announced[key]


def _commits(number: int, newest: int) -> str:
    if number == 1:
        return f"The checkpoint of step {newest} is committed."
    return f"{number} checkpoints are committed, the newest of step {newest}."


def _count(report: home.Report, *names: str) -> int:
    numbers = (report.metrics.get(name) for name in names)
    return sum(each for each in numbers if isinstance(each, int))


def _is_recent(time: str, now_s: float) -> bool:
    at_s = times.parse(time)
    return at_s is not None and now_s - at_s < RECENT_S
