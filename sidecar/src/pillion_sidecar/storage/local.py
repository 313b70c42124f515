"""
A directory of a file system, as a `storage.folder.Folder`. Bulk bytes go through `storage.directio`, small files through `storage.durable`.

A commit is a rename. An older attempt never commits over a newer one, although there is no lock. Each attempt takes four steps:

1. It lays down its documents under temporary names with its generation.
2. It looks for documents of a newer attempt, and gives way to it.
3. It removes the documents that older attempts have laid down.
4. It renames its own documents.

An older attempt may look too early to see the newer one's documents. But when the newer attempt renames, it has removed the older one's, so that
the older attempt's rename fails.

Called from: `storage.opening`, and the tests of the code above it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from pillion.errors import CommitError
from pillion.wire import names
from pillion_sidecar.storage import directio, durable, folders, generation, late_names, mount_types, temporary_names
from pillion_sidecar.storage.folder import Document, Entry, Folder, GenerationOf, TakenDown, nothing
from pillion_sidecar.storage.stretches import Piece, Run, TruncatedFile

REMOVED: Final = "removed"
"""Name of the folder below names.INTERNAL_DIR that has the checkpoints whose removal has begun."""


@final
@dataclass(frozen=True, slots=True)
class LocalFolder:
    """
    A folder in a file system. See the module.

    Args:
        directory: path of the folder.
        origin: (a folder that was taken down) the path from which it was taken.
    """

    directory: str
    origin: str = ""

    @property
    def name(self) -> str:
        return os.path.basename(self.directory.rstrip("/"))

    @property
    def path(self) -> str | None:
        return self.directory

    @property
    def object_bytes(self) -> int | None:
        return None

    def __str__(self) -> str:
        return self.directory

    def below(self, name: str) -> LocalFolder:
        return LocalFolder(os.path.join(self.directory, name))

    def _at(self, name: str) -> str:
        return os.path.join(self.directory, name)

    # --- looking ---

    def folders(self) -> list[str]:
        with self._entries() as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def files(self) -> dict[str, Entry]:
        listed = {}
        with self._entries() as entries:
            for entry in entries:
                # A file that is removed during the listing counts as missing.
                with contextlib.suppress(FileNotFoundError):
                    if not entry.is_dir():
                        listed[entry.name] = _entry(entry)
        return listed

    @contextlib.contextmanager
    def _entries(self) -> Iterator[Iterable[os.DirEntry[str]]]:
        try:
            entries = os.scandir(self.directory)
        except FileNotFoundError:
            yield ()
            return
        with entries:
            yield entries

    def entry(self, name: str) -> Entry | None:
        try:
            status = os.stat(self._at(name))
        except FileNotFoundError:
            return None
        return Entry(status.st_size, status.st_mtime_ns)

    def read(self, name: str) -> bytes:
        with open(self._at(name), "rb") as file:
            return file.read()

    def read_piece(self, name: str, offset: int, length: int) -> bytearray:
        path = self._at(name)
        # Check the file's length first: the length in a damaged manifest may not fit into memory.
        with open(path, "rb") as file:
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes < offset + length:
                raise TruncatedFile(path, wanted_bytes=offset + length, found_bytes=found_bytes)
            data = bytearray(length)
            done = 0
            while done < length:
                # One call moves at most 0x7ffff000 bytes, read(2).
                count = os.preadv(file.fileno(), [memoryview(data)[done:]], offset + done)
                if count == 0:
                    raise TruncatedFile(path, wanted_bytes=offset + length, found_bytes=offset + done)
                done += count
            return data

    def read_into(
        self,
        name: str,
        memory: memoryview,
        pieces: Sequence[Piece],
        *,
        on_piece: Callable[[int], None] = nothing,
    ) -> None:
        directio.read_file(self._at(name), memory, pieces, on_piece=on_piece)

    def obstacle(self) -> str:
        return "is a link to somewhere else, and no directory of this root" if os.path.islink(self.directory) else ""

    # --- writing ---

    def make(self) -> None:
        folders.make(self.directory)

    def put(self, name: str, data: bytes) -> None:
        durable.replace_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        path, temporary = self._at(name), self._at(f".{name}-{secrets.token_hex(8)}")
        durable.write_new(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return self._soon_holds(name, data)
        except OSError:
            # The file system has no hard links, so a reader may see the file before it is whole.
            try:
                durable.write_new(path, data)
            except FileExistsError:
                return self._soon_holds(name, data)
        finally:
            os.unlink(temporary)
        durable.fsync_directory(self.directory)
        return True

    def _soon_holds(self, name: str, data: bytes) -> bool:
        """
        Whether a file that exists according to storage has `data`. False also if the file does not appear: then another process has made it.

        Blocks: up to late_names.LATE_S. For that long a client may still use its cached answer that there is no such file.
        """
        for _ in late_names.looks():
            with contextlib.suppress(FileNotFoundError):
                return self.read(name) == data
        return False

    def overwrite(self, name: str, data: bytes) -> bool:
        try:
            fd = os.open(self._at(name), os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            os.pwrite(fd, data, 0)
        except OSError as err:
            durable.put_name(err, self._at(name))
            raise
        finally:
            os.close(fd)
        return True

    def write(
        self,
        files: Mapping[str, Sequence[Run]],
        memory: memoryview,
        *,
        num_threads: int,
        on_progress: Callable[[str, int], None] = nothing,
        listed: Mapping[str, Entry] | None = None,
    ) -> None:
        for name, runs in files.items():

            def progressed(written_bytes: int, name: str = name) -> None:
                on_progress(name, written_bytes)

            directio.write_file(self._at(name), memory, runs, num_threads=num_threads, on_progress=progressed)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._at(name))

    def delete_whole(self, name: str) -> None:
        """Remove a file, or a directory with all its content, which a `StorageWriter` has left. Raises: OSError."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._at(name)) if os.path.isdir(self._at(name)) else os.unlink(self._at(name))

    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)

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
        """Blocks: for two small durable writes and two renames, and a listing."""
        laid_down: list[tuple[str, str]] = []
        try:
            for document in documents:
                temporary = self._at(temporary_names.lay_down(document.name, generation))
                durable.write_new(temporary, document.data)
                laid_down.append((temporary, document.name))
            self._give_way([document.name for document in documents], generation, generation_of)
            before()
            for temporary, name in laid_down:
                if name == documents[-1].name:
                    between()
                try:
                    os.rename(temporary, self._at(name))
                except FileNotFoundError as err:
                    raise CommitError(
                        f"generation {generation} is fenced off: a newer one commits in {self.directory}"
                    ) from err
                durable.fsync_directory(self.directory)
        finally:
            for temporary, _ in laid_down:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        # A dead attempt may have made this folder without a sync of its name. A folder without read permission cannot be synced.
        with contextlib.suppress(OSError):
            durable.fsync_directory(os.path.dirname(self.directory))

    def _give_way(self, published: Sequence[str], own_generation: str, generation_of: GenerationOf) -> None:
        """
        Give way to a newer attempt, and make older attempts give way.

        Raises:
            CommitError: a newer attempt has committed here, or is about to.
        """
        laid_down = [(name, temporary_names.laid_down_by(name)) for name in os.listdir(self.directory)]
        seen = [self._generation(name, generation_of) for name in published]
        seen += [other for _, other in laid_down]
        order = generation.order(own_generation)
        newer = [other for other in seen if other is not None and generation.order(other) > order]
        if newer:
            raise CommitError(
                f"generation {own_generation} is fenced off: generation {newer[0]} commits in {self.directory}"
            )
        for name, other in laid_down:
            if other is not None and generation.order(other) < order:
                self.delete([name])

    def _generation(self, name: str, generation_of: GenerationOf) -> str | None:
        try:
            return generation_of(self.read(name))
        except OSError:
            return None

    def take_down(self, *, by: int, generation_of: GenerationOf, marker: str) -> Folder | None:
        """Take the folder aside by one rename, to below the root's own folder. Put it back if a newer attempt has published here."""
        removed = os.path.join(os.path.dirname(self.directory), names.INTERNAL_DIR, REMOVED)
        folders.make(removed)
        aside = LocalFolder(os.path.join(removed, f"{self.name}.{by}.{secrets.token_hex(4)}"), self.directory)
        os.rename(self.directory, aside.directory)
        durable.fsync_directory(os.path.dirname(self.directory))
        published = aside._generation(marker, generation_of)
        if published is not None and generation.order(published)[0] > by:
            aside.put_up()
            return None
        return aside

    def put_up(self) -> None:
        os.rename(self.directory, self.origin)

    def give_back(self) -> list[str]:
        left = sorted(os.listdir(self.directory))
        if left:
            folders.make(self.origin)
        for name in left:
            if not os.path.lexists(os.path.join(self.origin, name)):
                os.rename(self._at(name), os.path.join(self.origin, name))
        return left

    def taken_down(self) -> list[TakenDown]:
        removed = os.path.join(self.directory, names.INTERNAL_DIR, REMOVED)
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(removed)):
                origin, _, rest = name.partition(".")
                by = rest.partition(".")[0]
                if names.parse_step_directory(origin) is not None and by.isdecimal():
                    aside = LocalFolder(os.path.join(removed, name), self._at(origin))
                    found.append(TakenDown(aside, LocalFolder(aside.origin), int(by)))
        return found

    def check(self) -> list[str]:
        """Return the problems of a root: it is not writable, has no atomic rename, or is of a kind where two clients can create the same file."""
        kind = mount_types.type_at(self.directory)
        if kind in mount_types.WITHOUT_EXCLUSIVE_CREATE:
            why = f"on {kind} two pods can create one file, and both believe that the root is theirs"
            return [
                f"the root {self.directory} cannot be used: {why}; give the URL of the bucket instead, s3://bucket/path"
            ]
        # The name is random: in containers the processes of all pods have the same pid, and all check at once.
        probe = os.path.join(self.directory, names.INTERNAL_DIR, f"probe-{secrets.token_hex(8)}")
        try:
            folders.make(os.path.dirname(probe))
            with open(probe, "wb") as file:
                file.write(b"pillion")
            os.rename(probe, f"{probe}.renamed")
            os.unlink(f"{probe}.renamed")
        except OSError as err:
            return [
                f"the root {self.directory} cannot be used: {err.strerror} ({err.filename}); a writable directory with rename is needed"
            ]
        return []


def _entry(entry: os.DirEntry[str]) -> Entry:
    try:
        status = entry.stat()
    except FileNotFoundError:  # a link without a target
        status = entry.stat(follow_symlinks=False)
    return Entry(status.st_size, status.st_mtime_ns)
