"""
The whole of: the keys that wait for processing, each with the moment from which on it is due.

Called from: `reconcile`. Pure: time is an argument, monotonic seconds.
Must never: hold a key twice: a key that is marked twice is processed once.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

T = TypeVar("T", bound=Hashable)

RETRY_FIRST_S: Final = 1.0
MAX_RETRY_S: Final = 60.0
"""Maximum pause after a write that failed: the API server may be down, or the namespace may be terminating."""


@dataclass(slots=True)
class _Entry:
    due_s: float
    failures: int = 0


class WorkQueue(Generic[T]):
    """Keys that are due, now or later."""

    def __init__(self) -> None:
        self._entries: dict[T, _Entry] = {}
        self._held: dict[T, float] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def mark(self, key: T, at_s: float) -> None:
        """Have a key looked at from a moment on, or earlier where it is to be already. One that failed waits for its pause."""
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry(max(at_s, self._held.get(key, at_s)))
        elif not entry.failures:
            entry.due_s = max(min(entry.due_s, at_s), self._held.get(key, at_s))

    def hold(self, key: T, now_s: float, pause_s: float) -> None:
        """Delay a key for a while, however often it is marked."""
        self._held = {each: until_s for each, until_s in self._held.items() if until_s > now_s}
        self._held[key] = now_s + pause_s

    def failed(self, key: T, failures: int, now_s: float) -> None:
        """Have a key looked at again after a pause that grows with each failure in a row; `failures` is what `take` said."""
        pause_s = min(RETRY_FIRST_S * 2 ** min(failures, 10), MAX_RETRY_S)
        self._entries[key] = _Entry(now_s + pause_s, failures + 1)

    def take(self, now_s: float) -> tuple[T, int] | None:
        """The key that was marked first of those that are due, taken off, and how often in a row it failed. None: nothing is due."""
        for key, entry in self._entries.items():
            if entry.due_s <= now_s:
                del self._entries[key]
                return key, entry.failures
        return None

    def next_s(self) -> float | None:
        """When the next key is due; None: there is none."""
        return min((entry.due_s for entry in self._entries.values()), default=None)
