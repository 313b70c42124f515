"""
The thread that finishes overlapped saves beside the training: one job at a time.

Called from: `pillion.saving`. The thread stays from save to save. A new one for each save would hold up the training until the scheduler
has run it: some milliseconds where all cores are busy (`threading.Thread.start` waits for that).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

CLOSE_TIMEOUT_S: Final = 5.0
"""Timeout for the thread's end at `close`. It has no job then."""


class Beside:
    """See the module. Owns: the thread, from the first job until `close`."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """At most one job: `begin` is called only after `wait`."""
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._ended.set()

    def begin(self, job: Callable[[], None]) -> None:
        """
        Run `job` in the thread. Here, if no thread can start.

        Args:
            job: raises nothing. The previous job has ended.

        Blocks: for the first job until the thread has started.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="pillion-staging", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # a limit, or the interpreter's exit (Python 3.12)
                job()
                return
            self._thread = thread
        self._ended.clear()
        self._jobs.put(job)

    def wait(self) -> None:
        """Wait until the job has ended. Blocks: as the job."""
        self._ended.wait()

    def close(self) -> None:
        """End the thread. Blocks: for the job, and up to CLOSE_TIMEOUT_S."""
        self.wait()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_TIMEOUT_S)
            self._thread = None

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            finally:
                del job  # before the next `get`, as a job holds tensors
                self._ended.set()
