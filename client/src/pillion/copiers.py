"""
A few threads that run a batch of jobs in parallel, until all jobs have ended.

Called from: `host_copies`. Not a ThreadPoolExecutor: Python closes those before atexit hooks run, and the copy of a script's last save may
still run then.
Must never: return while a job runs, even if the caller is interrupted. The next save may fill a slot that was given up.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

CLOSE_TIMEOUT_S: Final = 5.0
"""Timeout for each thread's end at `close`. No thread has a job then."""


class Copiers:
    """
    See the module.

    Args:
        num_threads: number of threads, at least 1.
        prepare: called once in each thread, before its first job.

    Owns: its threads, until `close`.

    Raises:
        RuntimeError: a thread cannot start.
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
            Exception: the first error of a job.
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
        except BaseException as err:  # a boundary: every job of this thread fails with it
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
            except BaseException as err:  # a boundary: the waiter of the batch raises it
                error = err
            batch.ended(error)
            # Released before the next `get`, as a job holds tensors.
            del taken, job, batch, error


class _Batch:
    """The number of jobs that still run, and the first error."""

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
            ) as err:  # Ctrl-C, or an error of a signal handler: raised again after the copies have ended
                interrupt = interrupt or err
        if interrupt is not None:
            raise interrupt
        if self._error is not None:
            raise self._error
