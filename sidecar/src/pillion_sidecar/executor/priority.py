"""
How much of the processor the executor takes: it gives way to training while it writes beside it, and not while somebody waits for it.

Called from: `executor.worker`. Owns: the nice values of this process and of its session.

Linux has two nice values (sched(7), "The autogroup feature"). That of a process counts within its group only. Where the kernel groups processes
by session, and no cgroup divides the processor (a laptop, a bare server), trainer and sidecar are two groups, and each gets half of a busy core.
So the executor makes a session of its own, whose nice value it changes. In a pod the cgroups of the containers decide, and this has no effect.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Final

NICE: Final = 10
"""Nice value of the process within its group: below the supervisor, which answers trainers."""
GROUP_NICE: Final = 10
"""Nice value of its session while it writes beside training: a tenth of a core that training wants too. With 15 a save of 1 GiB beside two busy
cores was durable after 2.4 s instead of 0.7, with 19 after 4.7 (docs/decisions/0035); what it took from training was alike."""
AUTOGROUP: Final = Path("/proc/self/autogroup")


def begin() -> None:
    """Lower this process within its group, and make a session of its own. Called once, at the start of the process."""
    with contextlib.suppress(OSError):
        os.nice(NICE)
    # Refused where this process leads a process group already, which a plain child does not.
    with contextlib.suppress(OSError):
        os.setsid()


class _Work(Enum):
    """What this process does that decides its priority."""

    BESIDE = auto()
    AWAITED = auto()


class Priority:
    """
    The nice value of this process' session: `GROUP_NICE` while work beside training is all that it does, 0 otherwise.

    Any thread may call. Nothing blocks or raises: where the kernel has no such value, or refuses a change, the work goes on as it is. A refused
    change is made by the next `settle` (without CAP_SYS_ADMIN the kernel takes ten changes a second from the whole machine).

    Args:
        autogroup: where the kernel takes the value.
    """

    def __init__(self, autogroup: Path = AUTOGROUP) -> None:
        self._autogroup = autogroup
        self._lock = threading.Lock()
        self._running: Counter[_Work] = Counter()
        self._is_urgent = False
        self._is: int | None = 0
        """The value that was written last; None: there is no such value here."""

    def settle(self, *, is_urgent: bool | None = None) -> None:
        """Make the value what it should be. `is_urgent`: from now on no trainer trains beside this process, or one does; None: as before."""
        with self._lock:
            if is_urgent is not None:
                self._is_urgent = is_urgent
            self._settle()

    def beside_training(self) -> contextlib.AbstractContextManager[None]:
        """The block writes a save while the trainers train on."""
        return self._during(_Work.BESIDE)

    def awaited(self) -> contextlib.AbstractContextManager[None]:
        """Trainers wait for the end of the block, whatever else this process does meanwhile."""
        return self._during(_Work.AWAITED)

    @contextlib.contextmanager
    def _during(self, work: _Work) -> Iterator[None]:
        with self._lock:
            self._running[work] += 1
            self._settle()
        try:
            yield
        finally:
            with self._lock:
                self._running[work] -= 1
                self._settle()

    def _settle(self) -> None:
        running = self._running
        should = GROUP_NICE if running[_Work.BESIDE] and not running[_Work.AWAITED] and not self._is_urgent else 0
        if self._is is None or self._is == should:
            return
        try:
            self._autogroup.write_text(str(should))
            self._is = should
        except FileNotFoundError:
            self._is = None
        except OSError:  # EAGAIN: too many changes; or a container that hides the file. The next call tries again.
            pass
