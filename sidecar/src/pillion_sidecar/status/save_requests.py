"""
The whole of: saves that somebody outside the job asked for, and what has become of each.

    taken --> waits for a persisted save to begin --> waits for that save --> Done (its step) | Failed (why)
      |            | START_TIMEOUT_S, or no trainer is left: Failed
      +-- no trainer is connected: Failed

Called from: `reporting.reporter` (what the controller asks, what it is told), `status.status` (what becomes of saves). Pure: time is an argument.
Must never: do one demand twice, as long as it is among the last `REMEMBERED`; the controller repeats each until it has heard its
final acknowledgement.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pillion.wire import home

REMEMBERED: Final = 64
"""Finished demands whose ids are known: the controller has at most 16 open at a time."""
START_TIMEOUT_S: Final = 300.0
"""Bound for the trainers to begin a save that was asked for. They do at one of their next steps; a job that evaluates for longer
than this takes no save by request. From its begin on, a save has bounds of its own."""


@dataclass
class _Demand:
    until_s: float
    step: int | None = None


class SaveRequests:
    """See the module."""

    def __init__(self) -> None:
        self._open: dict[str, _Demand] = {}
        self._finished: dict[str, home.Acknowledgement] = {}
        self._asked: set[str] = set()
        """Ids of the last answer: their acknowledgements are wanted."""

    def take(self, ids: Collection[str], now_s: float, *, has_trainers: bool) -> bool:
        """
        What the controller asks for now; whether the trainers are to be asked for a save.

        Args:
            ids: of all its open demands, those taken before among them.
            now_s: monotonic.
            has_trainers: whether rank 0 is connected.
        """
        self._asked = set(ids)
        new = [each for each in ids if each not in self._open and each not in self._finished]
        for each in new:
            if has_trainers:
                self._open[each] = _Demand(now_s + START_TIMEOUT_S)
            else:
                self._finish(each, home.Progress.FAILED, message="no trainer is connected to the sidecar")
        return bool(new) and has_trainers

    @property
    def waiting(self) -> bool:
        """Whether the next persisted save to begin is one that was asked for."""
        return any(demand.step is None for demand in self._open.values())

    def began(self, step: int) -> None:
        """A persisted save has begun: it is what everybody who waits has asked for."""
        for demand in self._open.values():
            if demand.step is None:
                demand.step = step

    def ended(self, step: int, problem: str | None) -> None:
        """A save is committed, or lost (`problem`)."""
        for each in [name for name, demand in self._open.items() if demand.step == step]:
            if problem is None:
                self._finish(each, home.Progress.DONE, step=step)
            else:
                self._finish(each, home.Progress.FAILED, step=step, message=problem)

    def expire(self, now_s: float, *, has_trainers: bool) -> None:
        """Give up what no save has begun for, at its bound or when no trainer is left."""
        for each in [name for name, demand in self._open.items() if demand.step is None]:
            if not has_trainers:
                self._finish(each, home.Progress.FAILED, message="the trainers ended before they began a save")
            elif now_s >= self._open[each].until_s:
                text = f"the trainers began no save within {START_TIMEOUT_S:.0f} s"
                self._finish(each, home.Progress.FAILED, message=text)

    def acknowledgements(self) -> tuple[home.Acknowledgement, ...]:
        """What to tell: of open demands that they are accepted, of finished ones how they ended as long as they are asked for."""
        accepted = [home.Acknowledgement(id=each, progress=home.Progress.ACCEPTED.value) for each in self._open]
        return (*accepted, *(answer for each, answer in self._finished.items() if each in self._asked))

    def _finish(self, each: str, progress: home.Progress, *, step: int = -1, message: str = "") -> None:
        self._open.pop(each, None)
        self._finished[each] = home.Acknowledgement(
            id=each, progress=progress.value, step=step, message=message[: home.TEXT_LIMIT]
        )
        while len(self._finished) > REMEMBERED:
            del self._finished[next(iter(self._finished))]
