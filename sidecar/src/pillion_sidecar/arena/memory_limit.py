"""
How much memory the container of this process may still take, by its cgroups: a page too many ends it without a word.

Called from: `arena.growth`, before the arena grows. cgroup v2 and v1; a process without a limit, or whose cgroups cannot be read, has none.
Sources: Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat), cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNT: Final = Path("/sys/fs/cgroup")
"""Where systemd and every container runtime mount the cgroups."""
UNLIMITED_BYTES: Final = 2**60
"""v1 says "no limit" by a number near 2**63."""


@dataclass(frozen=True, slots=True)
class Level:
    """A cgroup with a limit: this process's own, or one above it."""

    path: str
    limit_bytes: int
    used_bytes: int
    """Without what the kernel gives up when memory is short: the page cache of files on disks, and its own caches."""

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one version of cgroups names things."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_V2: Final = _Kind("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_V1: Final = _Kind("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def tightest(membership: str | None = None, mount: Path = MOUNT) -> Level | None:
    """
    The cgroup that has the least memory left for this process. None: no limit is known.

    Args:
        membership: the text of /proc/self/cgroup; None: it is read.
        mount: where the cgroups are mounted.
    """
    if membership is None:
        try:
            membership = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
    levels = []
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            levels += _levels(mount, path, _V2)
            levels += _levels(mount / "unified", path, _V2)
        elif "memory" in controllers.split(","):
            levels += _levels(mount / controllers, path, _V1)
            levels += _levels(mount / "memory", path, _V1)
    return min(levels, key=lambda level: level.free_bytes, default=None)


def _levels(top: Path, path: str, kind: _Kind) -> list[Level]:
    """The cgroup at `path` and those above it. Without a cgroup namespace a container sees its own one at the top."""
    names = [part for part in path.split("/") if part not in ("", "..")]
    levels = []
    for depth in range(len(names), -1, -1):
        level = _read(top.joinpath(*names[:depth]), kind)
        if level is not None:
            levels.append(level)
    return levels


def _read(folder: Path, kind: _Kind) -> Level | None:
    try:
        limit = (folder / kind.limit).read_text(encoding="ascii").strip()
        if limit == "max" or int(limit) >= UNLIMITED_BYTES:
            return None
        usage = int((folder / kind.usage).read_text(encoding="ascii"))
        stat = _fields((folder / "memory.stat").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    reclaimable = sum(stat.get(name, 0) for name in kind.reclaimable)
    return Level(os.fspath(folder), int(limit), max(0, usage - reclaimable))


def _fields(text: str) -> Mapping[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
