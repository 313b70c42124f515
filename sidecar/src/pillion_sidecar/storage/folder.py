"""
A folder on storage, as all code above this package sees it: a directory of a file system (`storage.local`), or a prefix of a bucket
(`storage.objects`). `tests/storage_contract` tests what every implementation promises.

Four promises hold for every method:

- A file is whole or absent. A reader during a write sees the file before it, or none.
- The writes of a method survive the loss of the machine once the method has returned, except those of `overwrite`.
- FileNotFoundError means that storage was asked and has no such file. A file that cannot be seen is not reported as missing: a missing bucket
  and a refused credential raise another OSError.
- Every OSError has an errno and, as its filename, the path or URL. Every call ends within the bounds of its implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pillion_sidecar.storage.stretches import Piece, Run


@dataclass(frozen=True, slots=True)
class Entry:
    """The entry of a file in a listing."""

    length: int
    """Length of the file, bytes."""
    modified_ns: int
    """Time of the file's last change, by the clock of the storage."""


class Document(NamedTuple):
    """A small file that makes a checkpoint visible."""

    name: str
    data: bytes


GenerationOf = Callable[[bytes], str | None]
"""Returns the generation of a published document; None: no save of Pillion wrote the document."""


def nothing(*_: object) -> None:
    """Do nothing: the default of each callback of a folder."""


class Folder(Protocol):
    """
    A folder on storage. See the module. Names are relative to the folder. A name with slashes lies in a folder below it.

    A folder need not exist: then it has no files. `make` and the writing methods create it.
    """

    @property
    def name(self) -> str:
        """Last component of the folder's path or URL."""

    @property
    def path(self) -> str | None:
        """Path of the folder in the file system of this process; None: it is not in a file system."""

    @property
    def object_bytes(self) -> int | None:
        """Size at which a rank's share is cut into files, bytes. Items are not cut. None: one file, of whole pages."""

    def __str__(self) -> str:
        """Return the folder's path or URL, for people."""

    def below(self, name: str) -> Folder:
        """Return a folder in this one. No I/O."""

    # --- looking ---

    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one, sorted. Raises: OSError."""

    def files(self) -> dict[str, Entry]:
        """Return the files directly in this folder. A missing folder has none. Raises: OSError."""

    def entry(self, name: str) -> Entry | None:
        """Return the entry of one file, without a listing of the others; None: there is no such file. Raises: OSError."""

    def read(self, name: str) -> bytes:
        """Return the whole content of a small file. Raises: FileNotFoundError; OSError."""

    def read_piece(self, name: str, offset: int, length: int) -> bytearray:
        """Return `length` bytes from `offset` on. Raises: FileNotFoundError; TruncatedFile; OSError."""

    def read_into(
        self,
        name: str,
        memory: memoryview,
        pieces: Sequence[Piece],
        *,
        on_piece: Callable[[int], None] = ...,
    ) -> None:
        """
        Read pieces of a file into memory, and touch no other byte of it.

        `on_piece(index)` is called in this thread, in the order of `pieces`, when that piece and all before it are whole. Other threads may read on
        meanwhile. An error of `on_piece` ends the read. After an error the bytes inside the pieces are undefined.

        Raises: FileNotFoundError; TruncatedFile; OSError; ValueError if a piece is outside the memory.
        """

    def obstacle(self) -> str:
        """Return why nothing may be written or removed here, such as a link to another place; empty: no reason is known."""

    # --- writing ---

    def make(self) -> None:
        """Make the folder and those above it, if the storage has folders. Raises: OSError."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, or replace it. The folder must exist. Raises: OSError."""

    def create(self, name: str, data: bytes) -> bool:
        """
        Write a small file that does not exist yet. Of several calls at once only one returns True.

        Returns:
            True: the file has these bytes, by this call or by an earlier try. False: there is another file, which stays.

        Raises: OSError.
        """

    def overwrite(self, name: str, data: bytes) -> bool:
        """
        Replace a file by `data` of the same length. Return False if there is no such file any more; then none is made.

        Of two calls at the same time either may win. A reader at that time sees the old file or the new one. Raises: OSError.
        """

    def write(
        self,
        files: Mapping[str, Sequence[Run]],
        memory: memoryview,
        *,
        num_threads: int,
        on_progress: Callable[[str, int], None] = ...,
        listed: Mapping[str, Entry] | None = None,
    ) -> None:
        """
        Write files, gathered from stretches of memory without a copy.

        If `object_bytes` is None, each run is written with the whole pages around it, at the place that `storage.placement` gives it. Otherwise a
        file
        is exactly its runs. `on_progress(name, written_bytes)` is called in this thread as files grow, and with the same number again
        while a bandwidth limit lets nothing be written. An error of it ends the write.

        After an error all files that are not whole are removed, if possible. A file that exists in full length may stay, if the implementation can
        know that an earlier try wrote it: no name is ever written with other content.

        Args:
            listed: listing of this folder from after the last earlier try; None: the method lists the folder itself, if it has to.

        Raises: OSError; ValueError if a run is outside the memory.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Remove files. A missing file is no error. Raises: OSError."""

    def remove_if_empty(self) -> None:
        """Remove the folder if it is empty. Never raises if the folder stays."""

    # --- commits ---

    def publish(
        self,
        documents: Sequence[Document],
        *,
        generation: str,
        generation_of: GenerationOf,
        before: Callable[[], None] = ...,
        between: Callable[[], None] = ...,
        is_new: bool = False,
    ) -> None:
        """
        Publish documents, one after the other. Each replaces only a document of the same or an older generation.

        An older attempt never publishes over a newer one, wherever either was stopped, although there is no lock.

        Args:
            generation: generation of the save.
            generation_of: reads the generation from a document.
            before: called once, when the last document is not there yet. An error of it ends the call. Then every document is the one that was
                there before the call. There is one exception, see `is_new`.
            is_new: whether the folder had no document when the caller listed it, before its save. A bucket then writes the first document while
                `before` runs, if it still has none. If `before` fails, that document stays, in a folder where there was none.
            between: called before the last document.

        Raises:
            CommitError: a newer attempt publishes here, or has published.
            OSError: the documents are not published, or it is not known whether they are.
        """

    def take_down(self, *, by: int, generation_of: GenerationOf, marker: str) -> Folder | None:
        """
        Make a checkpoint invisible by one step. So no loader ever sees a part of it while its files are removed.

        Args:
            by: generation of the session that removes the checkpoint.
            marker: name of the document that makes the checkpoint visible.

        Returns:
            The folder that has the files from now on; None: a newer attempt has published here, and the checkpoint stays.

        Raises: FileNotFoundError: there is no checkpoint; OSError.
        """

    def put_up(self) -> None:
        """(a result of `take_down`) Undo the call, except for files that are removed already. Raises: OSError."""

    def give_back(self) -> list[str]:
        """(a result of `take_down`) Move the files that are left back to their origin, and return their names. Raises: OSError."""

    def taken_down(self) -> list[TakenDown]:
        """(a root) Return the checkpoints whose removal was interrupted. Raises: OSError."""

    def check(self) -> list[str]:
        """Return why this folder cannot be used as a root; empty: it can. Called before the first save. Blocks: for some small files."""


class TakenDown(NamedTuple):
    """A checkpoint whose removal has begun."""

    folder: Folder
    """Folder that has the files now."""
    origin: Folder
    """Folder of the checkpoint before."""
    by: int
    """Generation of the session that has begun the removal."""
