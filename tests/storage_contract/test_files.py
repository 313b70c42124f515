"""
Tests of what every folder promises of small files.

Called from: pytest.
"""

import threading
from collections.abc import Callable
from concurrent import futures
from typing import Final

import pytest

from pillion_sidecar.storage.folder import Folder

SAME_TIME: Final = 6
"""Threads that do the same at once."""


def at_once(acts: list[Callable[[], bool]]) -> list[bool]:
    """What each returns, of all begun together."""
    barrier = threading.Barrier(len(acts))

    def go(act: Callable[[], bool]) -> bool:
        barrier.wait()
        return act()

    with futures.ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(go, acts))


def test_what_was_put_is_read_and_listed(root: Folder, step: Folder) -> None:
    """A file is read back whole, listed by its length in its own folder alone, and a later put takes its place."""
    step.put(".metadata", b"first")
    step.put(".metadata", b"another")
    step.put("empty", b"")
    assert step.read(".metadata") == b"another"
    assert step.read("empty") == b""
    assert {name: entry.length for name, entry in step.files().items()} == {".metadata": 7, "empty": 0}
    assert root.folders() == ["step-1"]
    assert root.files() == {}


def test_a_name_that_begins_like_another_is_another(root: Folder) -> None:
    """`step-1` has nothing of `step-10`."""
    for name in ("step-1", "step-10"):
        root.below(name).make()
        root.below(name).put("file", name.encode())
    assert root.folders() == ["step-1", "step-10"]
    assert root.below("step-1").files().keys() == {"file"}
    assert root.below("step-1").read("file") == b"step-1"


def test_a_folder_that_nobody_made_has_nothing(root: Folder) -> None:
    """A folder that does not exist is empty, and reading from it says that the file is not there."""
    none = root.below("step-7")
    assert (none.files(), none.folders(), none.entry("file")) == ({}, [], None)
    with pytest.raises(FileNotFoundError):
        none.read("file")
    with pytest.raises(FileNotFoundError):
        none.read_piece("file", 0, 1)


def test_an_entry_is_what_the_listing_says(step: Folder) -> None:
    """One file's entry is the same by itself and in the listing, up to a second, and a file that is not there has none."""
    step.put("file", b"12345")
    entry, listed = step.entry("file"), step.files()["file"]
    assert entry is not None
    assert entry.length == listed.length == 5
    # A header has whole seconds, a listing of some stores has more.
    assert abs(entry.modified_ns - listed.modified_ns) < 1e9
    assert step.entry("other") is None


def test_below_goes_any_number_of_folders_down(root: Folder) -> None:
    """A name with a slash is a folder in a folder, and the folder's own name is the last part."""
    deep = root.below(".pillion/generations")
    deep.make()
    deep.put("7", b"x")
    assert root.below(".pillion").below("generations").read("7") == b"x"
    assert root.below(".pillion").folders() == ["generations"]
    assert deep.name == "generations"
    assert str(deep).endswith("/.pillion/generations")


def test_create_lets_one_through(step: Folder) -> None:
    """Of several that create one name at once exactly one succeeds, and its bytes are there."""
    contents = [b"by %d" % number for number in range(SAME_TIME)]

    def creating(data: bytes) -> Callable[[], bool]:
        return lambda: step.create("7", data)

    won = at_once([creating(data) for data in contents])
    assert won.count(True) == 1
    assert step.read("7") == contents[won.index(True)]
    assert list(step.files()) == ["7"]


def test_create_of_the_same_bytes_again_is_no_other(step: Folder) -> None:
    """Whoever tries again what has arrived is told that it is there; whoever comes with other bytes is told that it is not."""
    assert step.create("7", b"mine")
    assert step.create("7", b"mine")
    assert not step.create("7", b"other")
    assert step.read("7") == b"mine"


def test_overwrite_makes_nothing(step: Folder) -> None:
    """A file of the same length is replaced, and one that is not there stays away."""
    step.put("claim", b"one")
    assert step.overwrite("claim", b"two")
    assert step.read("claim") == b"two"
    assert not step.overwrite("none", b"two")
    assert list(step.files()) == ["claim"]


def test_a_file_is_whole_at_every_moment(step: Folder) -> None:
    """A reader beside a writer sees the one content or the other."""
    contents = (b"a" * 100_000, b"b" * 100_000)
    step.put("file", contents[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def look() -> None:
        while not done.is_set():
            seen.add(step.read("file"))

    with futures.ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for number in range(20):
            step.put("file", contents[number % 2])
        done.set()
        looking.result()
    assert seen <= set(contents)


def test_delete_takes_what_is_there_and_what_is_not(step: Folder) -> None:
    """Many files go at once, those that were never there are no error, and the others stay."""
    for number in range(12):
        step.put(f"file-{number}", b"x")
    step.delete([f"file-{number}" for number in range(20) if number != 3])
    assert list(step.files()) == ["file-3"]
    step.delete(["none"])
    step.delete([])
    assert list(step.files()) == ["file-3"]


def test_a_folder_goes_when_nothing_is_in_it(root: Folder, step: Folder) -> None:
    """A folder with a file stays; an empty one is gone."""
    step.put("file", b"x")
    step.remove_if_empty()
    assert root.folders() == ["step-1"]
    step.delete(["file"])
    step.remove_if_empty()
    assert root.folders() == []


def test_a_good_root_has_no_problem(root: Folder) -> None:
    """The check of a root that works finds nothing, twice, and leaves no file."""
    assert root.check() == []
    assert root.check() == []
    assert root.files() == {}
    assert root.below(".pillion").files() == {}


def test_nothing_speaks_against_a_folder_of_ours(step: Folder) -> None:
    """A folder that was made in the plain way may be written and removed."""
    assert step.obstacle() == ""
