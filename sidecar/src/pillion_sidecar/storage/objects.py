"""
A prefix of a bucket, as a `storage.folder.Folder`: s3://, gs://, az://.

A bucket has no rename and no folders, and a put is atomic. So the commit is two conditional puts. Each document replaces exactly the version that
was read, if that is of the same or an older generation. An attempt that loses such a put reads again from the first document on. So an older
attempt can never publish over a newer one, wherever it was stopped: the version that it expects does not exist any more.
`tests/property/test_object_commits.py` tries every interleaving of two attempts.

A removal has no rename either. A tombstone of TOMBSTONE's length replaces the document that makes a checkpoint visible. For every reader through
this module the checkpoint is then one that was never committed. Retention removes its files, and the tombstone last.

No name is ever written twice with different bytes. So a data file in full length in a listing was sent by an earlier try of the same save. A
retried save sends only the files that are missing.

Called from: `storage.opening`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Final, final

from pillion.errors import CommitError
from pillion.wire import names
from pillion.wire.object_store import ObjectStore
from pillion_sidecar.storage import generation as generations
from pillion_sidecar.storage import object_client, object_probe, object_transfer
from pillion_sidecar.storage.folder import Document, Entry, GenerationOf, TakenDown, nothing
from pillion_sidecar.storage.object_errors import OutOfRange
from pillion_sidecar.storage.object_requests import Bucket, Versioned, give_up_at
from pillion_sidecar.storage.stretches import Piece, Run

TOMBSTONE: Final = b"pillion: removed\n"
"""Content that replaces a commit marker while its checkpoint is removed. A listing shows it by its length: a `.metadata` is always longer, because
the name of its class alone is longer."""


@final
class ObjectFolder:
    """
    A folder in a bucket. See the module. All folders of a root share their clients and the bandwidth limit.

    Blocks: a call for a document at most CALL_S and one request of 45 s; `write` and `read_into` at most 240 s for each object or range.
    """

    def __init__(self, bucket: Bucket, pace: object_transfer.Pace, prefix: str, removed: bytes | None = None) -> None:
        """
        Args:
                prefix: prefix in the bucket, without a slash at either end.
                removed: (a folder that was taken down) the marker that the tombstone replaced.
        """
        self._bucket = bucket
        self._pace = pace
        self._prefix = prefix
        self._removed = removed

    @classmethod
    def open(cls, url: str, options: ObjectStore | None = None, *, ca_file: str = "") -> ObjectFolder:
        """
        Return the folder that a URL names. Makes no request.

        Args:
            options: options of a policy; None: the defaults. The URL in them does not count.
            ca_file: path of a PEM file with authorities that are trusted besides the system's.

        Raises:
            SettingsError: the URL, an option or the file is wrong, or obstore is not installed.
        """
        place = object_client.parse(url)
        bucket = Bucket(place, dataclasses.replace(options or ObjectStore(), url=None), ca_file)
        return cls(bucket, object_transfer.Pace(bucket.options.bandwidth_limit_bytes), place.prefix)

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    @property
    def path(self) -> str | None:
        return None

    @property
    def object_bytes(self) -> int | None:
        return self._bucket.options.object_size_bytes

    def __str__(self) -> str:
        return self._bucket.url(self._prefix)

    def below(self, name: str) -> ObjectFolder:
        return ObjectFolder(self._bucket, self._pace, self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    # --- looking ---

    def folders(self) -> list[str]:
        return self._bucket.listing(self._prefix).folders

    def files(self) -> dict[str, Entry]:
        listed = self._bucket.listing(self._prefix).files
        return {name: entry for name, entry in listed.items() if not _is_tombstone(name, entry)}

    def entry(self, name: str) -> Entry | None:
        entry = self._bucket.head(self._key(name))
        return None if entry is None or _is_tombstone(name, entry) else entry

    def read(self, name: str) -> bytes:
        there = self._bucket.get(self._key(name))
        if there is None or there.data == TOMBSTONE:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", self._bucket.url(self._key(name)))
        return there.data

    def read_piece(self, name: str, offset: int, length: int) -> bytearray:
        key = self._key(name)
        data = bytearray()
        try:
            for chunk in self._bucket.fetch(key, offset, offset + length) if length else ():
                data += chunk
        except OutOfRange:
            pass
        if len(data) < length:
            raise object_transfer.truncated(self._bucket, key, offset + length)
        return data

    def read_into(
        self,
        name: str,
        memory: memoryview,
        pieces: Sequence[Piece],
        *,
        on_piece: Callable[[int], None] = nothing,
    ) -> None:
        object_transfer.fetch(self._bucket, self._key(name), memory, pieces, on_piece=on_piece)

    def obstacle(self) -> str:
        return ""

    # --- writing ---

    def make(self) -> None:
        """Do nothing: a bucket has no folders to make."""

    def put(self, name: str, data: bytes) -> None:
        self._bucket.put(self._key(name), data)

    def create(self, name: str, data: bytes) -> bool:
        return self._bucket.swap(self._key(name), data, None)

    def overwrite(self, name: str, data: bytes) -> bool:
        until = give_up_at()
        while time.monotonic() < until:
            there = self._bucket.get(self._key(name), until)
            if there is None:
                return False
            if self._bucket.swap(self._key(name), data, there.version, until):
                return True
        raise OSError(errno.EAGAIN, "others write it all the time", self._bucket.url(self._key(name)))

    def write(
        self,
        files: Mapping[str, Sequence[Run]],
        memory: memoryview,
        *,
        num_threads: int,
        on_progress: Callable[[str, int], None] = nothing,
        listed: Mapping[str, Entry] | None = None,
    ) -> None:
        """Write as `Folder.write`. A bucket takes `parallelism` objects at a time, not `num_threads`. After an error those in flight are finished
        first."""
        there = self.files() if listed is None else listed
        lengths = {name: sum(run.length for run in runs) for name, runs in files.items()}
        sent = {name for name, length in lengths.items() if name in there and there[name].length == length}
        for name in sorted(sent):
            on_progress(name, lengths[name])
        keys = {name: self._key(name) for name in files if name not in sent}
        object_transfer.send(self._bucket, keys, files, memory, pace=self._pace, on_progress=on_progress)

    def delete(self, names: Iterable[str]) -> None:
        self._bucket.delete(self._key(name) for name in names)

    def remove_if_empty(self) -> None:
        """
        Remove the tombstone if nothing else is in the folder.

        A bucket deletes unconditionally. Between the listing and the deletion a newer attempt could replace the tombstone. But its data and parts
        would
        have to appear in that moment too, as the listing does not have them.
        """
        with contextlib.suppress(OSError):
            listed = self._bucket.listing(self._prefix)
            if not listed.folders and [_is_tombstone(*each) for each in listed.files.items()] == [True]:
                self.delete(listed.files)

    # --- commits ---

    def publish(
        self,
        documents: Sequence[Document],
        *,
        generation: str,
        generation_of: GenerationOf,
        before: Callable[[], None] = nothing,
        between: Callable[[], None] = nothing,
        is_new: bool = False,
    ) -> None:
        """
        Publish as `Folder.publish`.

        The first round assumes that no document exists yet, as in the folder of a new step, and makes two requests. The first of them runs beside
        `before` if `is_new`. If a document exists, the store refuses the put, and the later rounds read first.

        Blocks: CALL_S and a request beyond `before` and `between`, or beside `before`.
        """
        looks = announced = False
        left = documents
        if is_new:
            looks = not self._put_beside(documents[0], before)
            left = documents if looks else documents[1:]
        else:
            before()
        until = give_up_at()
        while time.monotonic() < until:
            for document in left:
                there = self._older(document, generation, generation_of, until) if looks else None
                if document == documents[-1] and not announced:
                    announced = True
                    between()
                    # The version that was read may be old by now. Then the swap fails, and a new round begins.
                if there is not None and there.data == document.data:
                    continue
                version = None if there is None else there.version
                if not self._bucket.swap(self._key(document.name), document.data, version, until):
                    looks, left = True, documents
                    break  # another attempt is here, or was: begin again with the first document
            else:
                return
        raise OSError(errno.EAGAIN, "another attempt commits here at the same time", str(self))

    def _put_beside(self, document: Document, before: Callable[[], None]) -> bool:
        """
        Put a document that does not exist yet, while `before` runs. Return False if it exists.

        An error of `before` counts first. The request has ended when this method returns or raises.
        """
        with futures.ThreadPoolExecutor(1, "pillion-publish") as pool:
            putting = pool.submit(self._bucket.swap, self._key(document.name), document.data, None)
            before()
            return putting.result()

    def _older(
        self, document: Document, own_generation: str, generation_of: GenerationOf, until: float
    ) -> Versioned | None:
        """
        Return the object that a document would replace; None: there is none.

        Raises:
            CommitError: the object is of a newer generation.
        """
        there = self._bucket.get(self._key(document.name), until)
        if there is None or there.data == TOMBSTONE:
            return there
        other_generation = generation_of(there.data)
        if other_generation is not None and generations.order(other_generation) > generations.order(own_generation):
            raise CommitError(
                f"generation {own_generation} is fenced off: generation {other_generation} commits in {self}"
            )
        return there

    def take_down(self, *, by: int, generation_of: GenerationOf, marker: str) -> ObjectFolder | None:
        """Replace the marker with a tombstone. The files stay where they are, and are not a checkpoint any more."""
        until = give_up_at()
        while time.monotonic() < until:
            there = self._bucket.get(self._key(marker), until)
            if there is None or there.data == TOMBSTONE:
                raise FileNotFoundError(errno.ENOENT, "there is no checkpoint", self._bucket.url(self._key(marker)))
            published = generation_of(there.data)
            if published is not None and generations.order(published)[0] > by:
                return None
            if self._bucket.swap(self._key(marker), TOMBSTONE, there.version, until):
                return ObjectFolder(self._bucket, self._pace, self._prefix, removed=there.data)
        raise OSError(errno.EAGAIN, "others commit here all the time", str(self))

    def put_up(self) -> None:
        """Replace the tombstone with the marker, if the tombstone is still there."""
        key = self._key(names.COMMIT_MARKER)
        there = self._bucket.get(key)
        if self._removed is not None and there is not None and there.data == TOMBSTONE:
            self._bucket.swap(key, self._removed, there.version)

    def give_back(self) -> list[str]:
        """Return the names of all files that are left. They have never been moved."""
        return sorted(self.files())

    def taken_down(self) -> list[TakenDown]:
        """Return nothing: a checkpoint that was taken down stays in its place, and looks like a save without a commit."""
        return []

    def check(self) -> list[str]:
        probe = self._key(f"{names.INTERNAL_DIR}/probe-{secrets.token_hex(8)}")
        return object_probe.problems(self._bucket, probe, str(self))


def _is_tombstone(name: str, entry: Entry) -> bool:
    return name == names.COMMIT_MARKER and entry.length == len(TOMBSTONE)
