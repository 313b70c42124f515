"""
Where checkpoints go, as text: a directory, made absolute, or the URL of a bucket.

Called from: `Checkpointer`, `pillion.dcp`. Must never: open either.
"""

from __future__ import annotations

import os
import re
from typing import Final

from pillion.errors import SettingsError

SCHEMES: Final = ("s3", "gs", "az")
"""Schemes of the buckets that a sidecar opens."""
_FILE: Final = "file://"
_COLLAPSED: Final = re.compile(r"([a-z][a-z0-9+.-]*):/(?!/).*")
"""A URL that went through a `pathlib.Path`, which makes one slash of two."""


def absolute(address: str | os.PathLike[str]) -> str:
    """Return a URL without slashes at its end, and a directory as an absolute path. Empty: empty."""
    text = os.fspath(address)
    if is_bucket(text):
        return text.rstrip("/")
    if text.startswith(f"{_FILE}/"):
        text = text.removeprefix(_FILE)
    return os.path.abspath(text) if text and "://" not in text and not _COLLAPSED.fullmatch(text) else text


def is_bucket(text: str) -> bool:
    """Whether an address is the URL of a bucket, by its scheme."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def check(address: str) -> None:
    """
    Args:
        address: what `absolute` has returned.

    Raises:
        SettingsError: the address is neither a directory nor a bucket.
    """
    schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    if _COLLAPSED.fullmatch(address):
        url = address.replace(":/", "://", 1)
        raise SettingsError([f"{address}: a pathlib.Path cannot hold a URL; pass the text {url!r}"])
    if "://" in address and not is_bucket(address):
        raise SettingsError([f"{address}: checkpoints go to a directory, or to a bucket by a URL with {schemes}"])
