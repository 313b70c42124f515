"""
The type of the mount that a path lies on, and the types that cannot hold a root.

Called from: `storage.local`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

WITHOUT_EXCLUSIVE_CREATE: Final = frozenset({"fuse.s3fs"})
"""Types of mount where two clients can both create one file, so that two attempts could both claim a root. Seen with s3fs 1.90, two mounts of
one bucket; its README says the same: no coordination of clients, no rename in one step, no hard links."""
_MOUNTS: Final = Path("/proc/self/mountinfo")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


def type_at(path: str) -> str:
    """
    Return the type of the mount that a path lies on, such as `ext4`, `nfs4` or `fuse.s3fs`; empty: the kernel does not say. Source: proc(5).
    """
    try:
        return find(os.path.realpath(path), _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    except OSError:
        return ""


def find(path: str, lines: Iterable[str]) -> str:
    """Return the type in the lines of a mountinfo file; the last of the mounts that are nearest above the path. Pure."""
    nearest, kind = "", ""
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        place = _OCTAL.sub(lambda found: chr(int(found[1], 8)), fields[4])
        if f"{path}/".startswith(f"{place.rstrip('/')}/") and len(place) >= len(nearest):
            nearest, kind = place, after.split(" ", 1)[0]
    return kind
