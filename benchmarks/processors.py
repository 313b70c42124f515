"""
Who had the processors during a part of a benchmark, and who waited for one: by group of processes, from /proc.

Called from: bench_crowd.py, around the rounds that it measures. Source: proc(5) and the kernel's Documentation/scheduler/sched-stats.rst.
Must never: take the time of a thread that ended meanwhile for none of its group's; the programs here keep their threads.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from measures import Line

_NS: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What a group of processes had."""

    ran_s: float = 0.0
    """Seconds on a processor."""
    waited_s: float = 0.0
    """Seconds in which its threads could run and had no processor."""
    accepted: int = 0
    """TCP connections that were accepted in the network of its processes."""

    def __add__(self, other: "Used") -> "Used":
        return self._with(other, 1)

    def __sub__(self, other: "Used") -> "Used":
        return self._with(other, -1)

    def _with(self, other: "Used", sign: int) -> "Used":
        return Used(
            ran_s=self.ran_s + sign * other.ran_s,
            waited_s=self.waited_s + sign * other.waited_s,
            accepted=self.accepted + sign * other.accepted,
        )


class Meter:
    """Counts while `counting`, as often as that is."""

    def __init__(self, groups: Mapping[str, Sequence[int]]) -> None:
        """
        Args:
            groups: process ids by the name of their group. What belongs to no group is the rest.
        """
        self.used = dict.fromkeys(groups, Used())
        self.passed_s = 0.0
        """Seconds that were counted."""
        self.busy_s = 0.0
        """Return the seconds in which processors were busy, of all processes together."""
        self._groups = groups

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the block runs."""
        before, busy_s, begun_s = self._look(), _busy_s(), time.monotonic()
        yield
        self.passed_s += time.monotonic() - begun_s
        self.busy_s += _busy_s() - busy_s
        for name, now in self._look().items():
            self.used[name] += now - before[name]

    def share(self, seconds: float) -> float:
        """Percent of all processors that so many seconds are."""
        return 100 * seconds / (self.passed_s * (os.cpu_count() or 1))

    def lines(self) -> list[Line]:
        """A row for each group: its share of the processors, and how long it waited for one."""
        rest_s = self.busy_s - sum(each.ran_s for each in self.used.values())
        return [
            Line(what="processors that were busy", measured=self.share(self.busy_s), unit="%"),
            *(
                Line(
                    what=f"of them {name}",
                    measured=self.share(each.ran_s),
                    unit="%",
                    note=f"waited {each.waited_s / max(each.ran_s, 1e-9):.1f} s for a processor a second that it ran",
                )
                for name, each in self.used.items()
            ),
            Line(what="of them the rest", measured=self.share(rest_s), unit="%"),
        ]

    def _look(self) -> dict[str, Used]:
        return {name: sum((_of_process(each) for each in pids), Used()) for name, pids in self._groups.items()}


def pids_of(program: str) -> list[int]:
    """Processes of this machine whose executable has that name, in containers too."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and os.path.basename(os.readlink(folder / "exe")) == program:
                found.append(int(folder.name))
    return found


def _of_process(pid: int) -> Used:
    total = Used()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            ran_ns, waited_ns, _ = (thread / "schedstat").read_text().split()
            total += Used(ran_s=int(ran_ns) / _NS, waited_s=int(waited_ns) / _NS)
    names, values = [
        line.split() for line in Path(f"/proc/{pid}/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    ]
    return total + Used(accepted=int(values[names.index("PassiveOpens")]))


def _busy_s() -> float:
    # user nice system idle iowait irq softirq steal
    fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
