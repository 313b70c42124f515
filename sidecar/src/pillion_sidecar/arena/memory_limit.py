"""
Reads how much memory this process's container may still take, from its cgroups. Beyond the limit the kernel kills the container.

Called from: `arena.growth`, before the arena grows. Knows cgroup v2 and v1. If the cgroups cannot be read, no limit is assumed.
Sources: Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat), cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNT: Final = Path("/sys/fs/cgroup")
"""Path where systemd and every container runtime mount the cgroups."""
UNLIMITED_BYTES: Final = 2**60
"""Smallest limit that counts as none. cgroup v1 writes a number near 2**63 for "no limit"."""


@dataclass(frozen=True, slots=True)
class Level:
    """A cgroup with a limit: this process's own, or one above it."""

    path: str
    limit_bytes: int
    used_bytes: int
    """Bytes in use, without caches that the kernel frees when memory is short: file pages and its own caches."""

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class _Kind:
    """File and field names of one version of cgroups."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_V2: Final = _Kind("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_V1: Final = _Kind("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def tightest(membership: str | None = None, mount: Path = MOUNT) -> Level | None:
    """
    Return the cgroup that leaves the least memory for this process. None if no limit is known.

    Args:
        membership: content of /proc/self/cgroup. None: the file is read.
        mount: path where the cgroups are mounted.
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
    """
    Return the limits of the cgroup at `path` and of those above it.

    A container without a cgroup namespace sees its own cgroup at the top.
    """
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
