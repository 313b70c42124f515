"""
The whole of: a few threads that work side by side on one thing, until all of it is done.

Called from: `staging`. Not a ThreadPoolExecutor: Python closes those before the hooks of the interpreter's end, and the copy of a script's
last save may still run then.
Must never: return while a job runs, whatever interrupts the caller; a slot that is given up may be filled by the next save.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

CLOSE_TIMEOUT_S: Final = 5.0
"""Bound for the threads to end once they are told to: none has a job then."""


class Copiers:
    """
    See the module.

    Args:
        num_threads: at least 1.
        prepare: called first in each thread.

    Owns: its threads, until `close`.

    Raises:
        RuntimeError: there can be no more threads.
    """

    def __init__(self, num_threads: int, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._work: queue.SimpleQueue[tuple[Callable[[], object], _Batch] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            for index in range(num_threads):
                thread = threading.Thread(target=self._run, name=f"pillion-copy_{index}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:
            self.close()
            raise

    def each(self, jobs: Sequence[Callable[[], object]]) -> None:
        """
        Run the jobs, and return when all have ended.

        Raises:
            Exception: the first one that a job raised.
        """
        batch = _Batch(len(jobs))
        for job in jobs:
            self._work.put((job, batch))
        batch.wait()

    def close(self) -> None:
        """End the threads. Blocks: up to CLOSE_TIMEOUT_S each."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)
        self._threads.clear()

    def _run(self) -> None:
        unprepared: BaseException | None = None
        try:
            self._prepare()
        except BaseException as err:  # a boundary: it is the error of every job that comes here
            unprepared = err
        while True:
            taken = self._work.get()
            if taken is None:
                return
            job, batch = taken
            error = unprepared
            try:
                if error is None:
                    job()
            except BaseException as err:  # a boundary: it goes to whoever waits for the batch
                error = err
            batch.ended(error)
            # Not kept until the next job comes: it holds tensors.
            del taken, job, batch, error


class _Batch:
    """How many jobs are left, and the first error."""

    def __init__(self, num_jobs: int) -> None:
        self._left = num_jobs
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not num_jobs:
            self._done.set()

    def ended(self, error: BaseException | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            if not self._left:
                self._done.set()

    def wait(self) -> None:
        interrupt: Any = None
        while not self._done.is_set():
            try:
                self._done.wait()
            except (
                BaseException
            ) as err:  # Ctrl-C, or whatever a signal's handler raises: raised again when the copies have ended
                interrupt = interrupt or err
        if interrupt is not None:
            raise interrupt
        if self._error is not None:
            raise self._error
