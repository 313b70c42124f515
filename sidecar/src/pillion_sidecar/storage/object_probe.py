"""
The check of a bucket before the first save: a small object is written, read, listed and removed, and the store must refuse a conditional put whose
condition does not hold.

If a store ignores If-None-Match or If-Match, two attempts that commit at the same time both succeed, and the older one may win. There are such
stores: gateways that do not know the headers, and older releases of others.

Called from: `storage.objects`.
"""

from __future__ import annotations

import contextlib
from typing import Final

from pillion_sidecar.storage.object_errors import NO_BUCKET, Conflict
from pillion_sidecar.storage.object_requests import Bucket, Version

NOT_CONDITIONAL: Final = (
    "this store ignores conditional requests ({}): two attempts could overwrite each other's checkpoints; a store that honours If-None-Match"
    " and If-Match is needed"
)


def problems(bucket: Bucket, key: str, where: str) -> list[str]:
    """
    Return why the bucket cannot be used, for people; empty: it can be used.

    Args:
        key: key of an object that does not exist. The object is removed afterwards, if possible.
        where: URL of the root, for people.

    Blocks: for about ten small requests.
    """
    try:
        with contextlib.ExitStack() as stack:
            # The listing comes first: its error names a missing bucket.
            bucket.listing(key.rpartition("/")[0])
            stack.callback(_forget, bucket, key)
            problem = _conditions(bucket, key) or _visible(bucket, key)
            bucket.delete([key])
            if not problem and not bucket.is_absent(key):
                problem = "what is deleted stays (a retention rule or lock of the bucket?): room is never made free"
    except OSError as err:
        what = "the bucket does not exist: make it first" if err.errno == NO_BUCKET else err.strerror
        return [f"the root {where} cannot be used: {what}"]
    return [f"the root {where} cannot be used: {problem}"] if problem else []


def _conditions(bucket: Bucket, key: str) -> str:
    if not bucket.swap(key, b"first", None):
        return "an object of a name that nobody uses exists already"
    there = bucket.get(key)
    if there is None:
        return "an object that was just written is not there: a store that shows a write at once is needed"
    if not _refuses(bucket, key, None):
        return NOT_CONDITIONAL.format("If-None-Match")
    if not bucket.swap(key, b"second", there.version):
        return "an object that nobody else uses was changed meanwhile"
    return "" if _refuses(bucket, key, there.version) else NOT_CONDITIONAL.format("If-Match")


def _refuses(bucket: Bucket, key: str, expected: Version | None) -> bool:
    """Whether the store refuses a put whose condition does not hold."""
    try:
        bucket.put_once(key, b"never", expected)
    except Conflict:
        return True
    return False


def _visible(bucket: Bucket, key: str) -> str:
    there = bucket.get(key)
    if there is None or there.data != b"second":
        return "an object reads otherwise than it was written"
    if bucket.is_absent(key):
        return "an object that was just written is not in the listing: a store that lists a write at once is needed"
    return ""


def _forget(bucket: Bucket, key: str) -> None:
    with contextlib.suppress(OSError):
        bucket.delete([key])
