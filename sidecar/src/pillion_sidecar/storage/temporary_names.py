"""
Temporary names of files before their rename, which a file system needs for a write that is whole or absent. Pure.

A killed process leaves such a file behind. Its name has the generation of its save, so that a later commit or retention removes it.

Called from: `storage.local`, `checkpoint`.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

from pillion.wire import names

COMMIT_SUFFIX: Final = ".commit"
"""Suffix of the files that `LocalFolder.publish` lays down. The next commit in the folder removes those of a killed attempt."""
_TEMPORARY: Final = re.compile(r"\..+\.[0-9]+\.[0-9a-f]{8}\.tmp")
"""Pattern of the temporary names of `durable.replace_file`."""
_PUBLISHED: Final = tuple(f".{name}" for name in (names.MANIFEST, names.OLD_MANIFEST, names.COMMIT_MARKER))


def lay_down(name: str, generation: str) -> str:
    """Return a new temporary name for a document before its publication. It has the generation of the document's save."""
    return f".{name}.{generation}.{secrets.token_hex(4)}{COMMIT_SUFFIX}"


def laid_down_by(name: str) -> str | None:
    """Return the generation in a name of `lay_down`; None: the name is not one of them."""
    parts = name.removesuffix(COMMIT_SUFFIX).rsplit(".", 2)
    is_one = name.endswith(COMMIT_SUFFIX) and len(parts) == 3
    return parts[1] if is_one and parts[0] in _PUBLISHED else None


def is_temporary(name: str) -> bool:
    """Whether a name is one of Pillion's temporary names. Pillion gives such names to no other files."""
    return laid_down_by(name) is not None or _TEMPORARY.fullmatch(name) is not None
