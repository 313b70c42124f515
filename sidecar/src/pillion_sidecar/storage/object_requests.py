"""
The requests to a bucket, with their special cases: a lost answer, a false conflict, a 404 without a meaning, a batch that fails for one key.

Three facts about obstore and the stores determine the requests. Source: obstore 0.12.1, object_store 0.14.

- A conditional put is refused with 409 (another request at the same time) or 412, and obstore has one class for both. It is also refused if a
  first try was applied and answered with 5xx. If its answer is lost, obstore does not repeat it. So after each of these cases the object is
  read. If it has the same bytes, the put arrived. If it has the version from before, the put did not arrive.
- 404 means "no such object" or "no such bucket". Only a listing separates the two, because it fails without a bucket.
- On Azure and GCS the deletion of a missing object is an error. In a batch this error hides the results of the other objects.

Called from: `storage.object_transfer`, `storage.objects`.
"""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple, final

from pillion.wire.object_store import ObjectStore
from pillion_sidecar.storage import object_client
from pillion_sidecar.storage.folder import Entry
from pillion_sidecar.storage.object_client import Place
from pillion_sidecar.storage.object_errors import NotThere, translated

CALL_S: Final = 120.0
"""Time after which a call begins no further request. With the last request, of at most 45 s, it stays below PILLION_STORAGE_TIMEOUT_S."""
PAUSE_FIRST_S: Final = 0.05
"""Pause after the first conflict, random between half of it and all. Each further pause is twice as long."""
MAX_PAUSE_S: Final = 5.0
"""Maximum of the pause between two tries of a conditional put."""
MAX_LOOKS: Final = 5
"""Maximum of reads of an object that is listed and cannot be read, because other processes write and delete it at the same time."""
BATCH_KEYS: Final = 1000
"""Maximum of keys in one delete request, as S3 has it."""
PART_BYTES: Final = 64 << 20
"""Size of a part of an object that is too large for one request. 10,000 parts, the maximum of S3, are 625 GiB."""
PARTS_AT_ONCE: Final = 4
"""Number of parts of one object in flight. A part is not copied: it lies in the arena."""
CHUNK_BYTES: Final = 1 << 20
"""Size of the chunks in which an answer is read. Besides them only a socket's buffer is in flight."""

Version = Mapping[str, str]
"""Version that a conditional put compares: `e_tag` on S3 and Azure, `version` on GCS. It has only names that the store has sent: obstore refuses
a None."""


class Versioned(NamedTuple):
    """The bytes of an object, and the version with which a conditional put replaces exactly them."""

    data: bytes
    version: Version


class Listing(NamedTuple):
    """The files and folders directly below a prefix, by the last component of the key."""

    files: dict[str, Entry]
    folders: list[str]


def _entry(meta: Mapping[str, Any]) -> Entry:
    return Entry(meta["size"], int(meta["last_modified"].timestamp() * 1e9))


def give_up_at() -> float:
    """Return the time, by time.monotonic(), after which a call that begins now begins no further request."""
    return time.monotonic() + CALL_S


@final
class Bucket:
    """
    One bucket and its two clients. A key is relative to the bucket. Threads may share a bucket.

    Every method blocks for its requests, of at most 45 s each (documents) or 240 s (`send`, `fetch`). It raises an OSError of
    `object_errors.translated`.

    Raises: SettingsError from the constructor: an option is wrong, or obstore is not installed.
    """

    def __init__(self, place: Place, options: ObjectStore, ca_file: str = "") -> None:
        self.options = object_client.resolved(place, options)
        self._root = Place(place.scheme, place.bucket, "")
        self._documents = object_client.documents(self._root, self.options, ca_file)
        self._bulk = object_client.bulk(self._root, self.options, ca_file)

    def url(self, key: str) -> str:
        return str(Place(self._root.scheme, self._root.bucket, key))

    # --- looking ---

    def listing(self, prefix: str) -> Listing:
        """Return the files and folders directly below a prefix. A missing bucket is an error, not an empty listing."""
        with translated(self.url(prefix)):
            listed = self._documents.list_with_delimiter(prefix or None)
        start = f"{prefix}/" if prefix else ""
        files = {}
        for each in listed["objects"]:
            name = each["path"].removeprefix(start)
            # Consoles represent a folder by an object whose key is the prefix itself.
            if each["path"].startswith(start) and name and "/" not in name:
                files[name] = _entry(each)
        return Listing(files, sorted(each.rstrip("/").rpartition("/")[2] for each in listed["common_prefixes"]))

    def get(self, key: str, until: float | None = None) -> Versioned | None:
        """Return a small object; None: a listing shows that it is not there."""
        until = give_up_at() if until is None else until
        for _ in range(MAX_LOOKS):
            try:
                with translated(self.url(key)):
                    answer = self._documents.get(key)
                    data = bytes(answer.bytes())
            except NotThere:
                if self.is_absent(key):
                    return None
                if time.monotonic() > until:
                    break
                continue  # the object appeared between the two requests
            meta: Mapping[str, Any] = answer.meta
            return Versioned(data, {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None})
        raise OSError(errno.EIO, "the object is listed, and cannot be read", self.url(key))

    def is_absent(self, key: str) -> bool:
        """Whether a successful listing does not have the object."""
        folder, _, name = key.rpartition("/")
        return name not in self.listing(folder).files

    def head(self, key: str) -> Entry | None:
        """Return the store's entry of an object, without its bytes; None: a listing shows that it is not there."""
        try:
            with translated(self.url(key)):
                return _entry(self._documents.head(key))
        except NotThere:
            pass  # the object may appear before the listing, which then has it
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            # An answer to HEAD has no body, so an expired token shows only as "bad request". The listing names the cause.
        folder, _, name = key.rpartition("/")
        return self.listing(folder).files.get(name)

    def missing(self, key: str, err: NotThere) -> OSError:
        """Return the error that a 404 means: FileNotFoundError if a listing shows no object, otherwise `err`. Raises: OSError of the listing."""
        return FileNotFoundError(errno.ENOENT, "there is no such object", self.url(key)) if self.is_absent(key) else err

    # --- documents ---

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, or replace it. obstore may repeat the request: a second put of the same bytes changes nothing."""
        with translated(self.url(key)):
            self._documents.put(key, data, use_multipart=False)

    def put_once(self, key: str, data: bytes, expected: Version | None) -> None:
        """Make one conditional put, without a retry. Raises: Conflict, whose cause is not known (see the module)."""
        mode: Any = "create" if expected is None else dict(expected)
        with translated(self.url(key)):
            self._documents.put(key, data, mode=mode, use_multipart=False)

    def swap(self, key: str, data: bytes, expected: Version | None, until: float | None = None) -> bool:
        """
        Put an object in the place of the expected version. If that is None, put it only if there is no object.

        Returns:
            True: the object has these bytes, by this call or by an earlier try. False: the object has or had another version.
        """
        until = give_up_at() if until is None else until
        pause_s = PAUSE_FIRST_S
        while True:
            try:
                self.put_once(key, data, expected)
                return True
            except (NotThere, PermissionError):
                raise
            except OSError as err:  # also a Conflict
                failure = err
            there = self.get(key, until)
            if there is not None and there.data == data:
                return True
            if (None if there is None else there.version) != expected:
                return False
            if time.monotonic() + pause_s > until:
                raise failure
            time.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects. A missing object is no error."""
        wanted = list(keys)
        for start in range(0, len(wanted), BATCH_KEYS):
            batch = wanted[start : start + BATCH_KEYS]
            try:
                self._delete(batch)
            except NotThere:
                # The listing fails without a bucket. Then remove the objects one by one, as it is not known which of them are removed.
                for key in self._still_there(batch):
                    with contextlib.suppress(NotThere):
                        self._delete([key])

    def _still_there(self, keys: Iterable[str]) -> list[str]:
        listings: dict[str, Listing] = {}
        left = []
        for key in keys:
            folder, _, name = key.rpartition("/")
            if folder not in listings:
                listings[folder] = self.listing(folder)
            if name in listings[folder].files:
                left.append(key)
        return left

    def _delete(self, keys: list[str]) -> None:
        with translated(self.url(keys[0])):
            self._documents.delete(keys if len(keys) > 1 else keys[0])

    # --- bulk bytes ---

    def send(self, key: str, views: Iterable[memoryview], length: int) -> None:
        """
        Write one object, gathered from stretches of memory without a copy.

        This is one request, so that a killed process leaves the object or none. An object that is too large for one request is written in parts. If
        it is never finished, its parts stay, invisible and billed, until a lifecycle rule of the bucket removes them.

        Args:
            views: contiguous views of bytes. The caller must not change or unmap the memory before the return.
            length: length of all views together, bytes.
        """
        attributes = {"Storage-Class": self.options.storage_class} if self.options.storage_class else None
        in_parts = length > object_client.MAX_OBJECT_BYTES
        with translated(self.url(key)):
            self._bulk.put(
                key,
                iter(views),
                attributes=attributes,
                use_multipart=in_parts,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )

    def fetch(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """
        Return the bytes of an object from `start` to `end`, in chunks of about CHUNK_BYTES. A shorter object gives fewer bytes.

        Raises:
            FileNotFoundError: there is no such object.
            OutOfRange: the object ends before `start`.
        """
        try:
            with translated(self.url(key)):
                answer = self._bulk.get(key, options={"range": (start, end)})
                yield from answer.stream(min_chunk_size=CHUNK_BYTES)
        except NotThere as err:
            raise self.missing(key, err) from None
