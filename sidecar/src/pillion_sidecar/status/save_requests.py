"""
The save requests of the controller and of people on this machine, and the outcome of each. Pure: time is an argument.

    new request --> waits until a persisted save begins --> waits for that save --> Done (its step) | Failed (why)
      |                | START_TIMEOUT_S, or no trainer is left: Failed
      +-- no trainer is connected: Failed

Called from: `reporting.reporter` (requests and acknowledgements), `supervisor.dispatcher` (requests of people), `status.status` (outcomes of saves).
Must never: serve a request twice while it is among the last `REMEMBERED`. The controller repeats each request until it has its final
acknowledgement.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pillion.wire import home

REMEMBERED: Final = 64
"""Maximum finished requests whose ids are kept. The controller has at most 16 open at a time."""
START_TIMEOUT_S: Final = 300.0
"""Timeout for the trainers to begin a requested save. They begin it at one of their next steps. A job that evaluates for longer fails the
request. A save that has begun has its own timeouts."""


@dataclass
class _Open:
    """A request without an outcome."""

    until_s: float
    """Monotonic time at which the request fails, if no save has begun for it."""
    step: int | None = None
    """Step of the save that has begun for it. None: none has begun."""


class SaveRequests:
    """The open and the finished requests, by id. See the module."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._finished: dict[str, home.Acknowledgement] = {}
        self._in_answer: set[str] = set()
        """Ids in the controller's last answer. It needs their acknowledgements."""
        self._of_people: set[str] = set()
        """Ids of open requests that came through the control socket. The controller does not know them."""

    def ask(self, request_id: str, now_s: float, *, has_trainers: bool) -> tuple[home.Acknowledgement, bool]:
        """
        Take the request of a person, or look how far it is. Return that, and whether the caller must request a save from the trainers.

        Args:
            now_s: monotonic time, seconds.
            has_trainers: whether rank 0 is connected.
        """
        self.expire(now_s, has_trainers=has_trainers)
        is_new = request_id not in self._open and request_id not in self._finished
        if is_new and len(self._of_people) >= REMEMBERED:
            return home.Acknowledgement(
                id=request_id, progress=home.Progress.FAILED.value, message=f"{REMEMBERED} requests are open already"
            ), False
        if is_new:
            self._begin(request_id, now_s, has_trainers=has_trainers)
            if request_id in self._open:
                self._of_people.add(request_id)
        if request_id in self._finished:
            return self._finished[request_id], False
        step = self._open[request_id].step
        accepted = home.Acknowledgement(
            id=request_id, progress=home.Progress.ACCEPTED.value, step=-1 if step is None else step
        )
        return accepted, is_new

    def take(self, ids: Collection[str], now_s: float, *, has_trainers: bool) -> bool:
        """
        Take the controller's open requests. Return whether the caller must request a save from the trainers.

        Args:
            ids: ids of all open requests, including those taken before.
            now_s: monotonic time, seconds.
            has_trainers: whether rank 0 is connected.
        """
        self._in_answer = set(ids)
        new_ids = [
            request_id for request_id in ids if request_id not in self._open and request_id not in self._finished
        ]
        for request_id in new_ids:
            self._begin(request_id, now_s, has_trainers=has_trainers)
        return bool(new_ids) and has_trainers

    def _begin(self, request_id: str, now_s: float, *, has_trainers: bool) -> None:
        if has_trainers:
            self._open[request_id] = _Open(now_s + START_TIMEOUT_S)
        else:
            self._finish(request_id, home.Progress.FAILED, message="no trainer is connected to the sidecar")

    @property
    def waiting(self) -> bool:
        """Whether a request waits for the next persisted save to begin."""
        return any(request.step is None for request in self._open.values())

    def began(self, step: int) -> None:
        """Note that a persisted save has begun. It serves all waiting requests."""
        for request in self._open.values():
            if request.step is None:
                request.step = step

    def ended(self, step: int, problem: str | None) -> None:
        """Note that a save has ended. `problem` None: it is committed; otherwise why it failed."""
        for request_id in [name for name, request in self._open.items() if request.step == step]:
            if problem is None:
                self._finish(request_id, home.Progress.DONE, step=step)
            else:
                self._finish(request_id, home.Progress.FAILED, step=step, message=problem)

    def expire(self, now_s: float, *, has_trainers: bool) -> None:
        """Fail the requests for which no save has begun, at their timeout or if no trainer is left."""
        for request_id in [name for name, request in self._open.items() if request.step is None]:
            if not has_trainers:
                self._finish(request_id, home.Progress.FAILED, message="the trainers ended before they began a save")
            elif now_s >= self._open[request_id].until_s:
                text = f"the trainers began no save within {START_TIMEOUT_S:.0f} s"
                self._finish(request_id, home.Progress.FAILED, message=text)

    def acknowledgements(self) -> tuple[home.Acknowledgement, ...]:
        """Return the acknowledgements for the next report: all open requests, and finished ones that the controller still repeats."""
        accepted = [
            home.Acknowledgement(id=name, progress=home.Progress.ACCEPTED.value)
            for name in self._open
            if name not in self._of_people
        ]
        return (*accepted, *(answer for name, answer in self._finished.items() if name in self._in_answer))

    def _finish(self, request_id: str, progress: home.Progress, *, step: int = -1, message: str = "") -> None:
        self._open.pop(request_id, None)
        self._of_people.discard(request_id)
        self._finished[request_id] = home.Acknowledgement(
            id=request_id, progress=progress.value, step=step, message=message[: home.TEXT_LIMIT]
        )
        while len(self._finished) > REMEMBERED:
            del self._finished[next(iter(self._finished))]
