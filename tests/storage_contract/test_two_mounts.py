"""
Tests of what two directories promise that are two mounts of one shared file system, as two pods have a ReadWriteMany claim: MooseFS by way
of FUSE. Its mounts share no locks, so that nothing here can rest on one.

Called from: pytest; `make test-filesystem` installs what it needs.
"""

import fcntl
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from pillion.errors import CommitError
from pillion.wire import names
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.storage import late_names
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.storage.stretches import PAGE_BYTES, Piece, Run
from storage_contract.documents import PUBLISHED, documents, generation_of
from support import deadlines, on_file_systems
from support.deadlines import Deadline
from support.file_systems import Kind
from support.moosefs import MooseFs
from support.parts import write_part

NO_LOCKS: Final = "mfsnobsdlocks,mfsnoposixlocks"
LATE_S: Final = 2
"""How long a mount may go on with what it knows, seconds: below the bound up to which a commit waits for a file."""
LATE: Final = f"{NO_LOCKS},mfsnegentrycacheto={LATE_S},mfsentrycacheto={LATE_S},mfsdirentrycacheto={LATE_S},mfsattrcacheto={LATE_S}"
ATTEMPTS: Final = ("1", "2", "3", "4-1")
ROUNDS: Final = 4
"""Rounds of a race: the interleavings differ by chance."""


class Mounts(NamedTuple):
    """Mounts of one file system."""

    ours: Path
    theirs: Path
    """With what MooseFS has as its defaults."""
    late: Path
    """One that believes for LATE_S what it has looked up, also that a name is not there."""


@pytest.fixture(scope="module")
def mounts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounts]:
    on_file_systems.need(Kind.MOOSEFS, request.config)
    folder = tmp_path_factory.mktemp("moosefs")
    made = Mounts(*(folder / each for each in Mounts._fields))
    file_system = MooseFs(folder, (made.ours, made.theirs), NO_LOCKS)
    try:
        file_system.mount(made.late, LATE)
        yield made
    finally:
        file_system.close()


class Pods(NamedTuple):
    """One folder, as two pods have it."""

    ours: LocalFolder
    theirs: LocalFolder


@pytest.fixture(params=["theirs", "late"])
def pods(request: pytest.FixtureRequest, mounts: Mounts) -> Pods:
    """An empty root by way of two mounts."""
    name = f"{request.node.originalname}-{request.param}"
    made = Pods(LocalFolder(str(mounts.ours / name)), LocalFolder(str(getattr(mounts, request.param) / name)))
    made.ours.make()
    return made


def soon(predicate: Callable[[], object], what: str) -> None:
    """The other pod sees it within the bound up to which a commit waits."""
    assert Deadline.SETTLE.quiet_s > late_names.LATE_S
    deadlines.eventually(predicate, Deadline.SETTLE, what)


def publish(folder: LocalFolder, generation: str) -> None:
    folder.publish(documents(generation), generation=generation, generation_of=generation_of)


def committed(folder: LocalFolder) -> list[str | None]:
    return [generation_of(folder.read(name)) for name in PUBLISHED]


def stands(folder: LocalFolder, generation: str) -> bool:
    return committed(folder) == [generation, generation]


def test_what_one_pod_wrote_the_other_one_reads(pods: Pods) -> None:
    """Small files and bulk, in both directions, byte by byte, by the listing's lengths."""
    content = bytes(range(256)) * (2 * PAGE_BYTES // 256)
    for number, (writer, reader) in enumerate((pods, pods[::-1])):
        writer.put(f"small-{number}", b"12345")
        writer.write({f"bulk-{number}": [Run(0, len(content))]}, memoryview(content), num_threads=2)
        listed = reader.files()
        assert {name: listed[name].length for name in (f"small-{number}", f"bulk-{number}")} == {
            f"small-{number}": 5,
            f"bulk-{number}": len(content),
        }
        assert reader.read(f"small-{number}") == b"12345"
        memory = bytearray(len(content))
        reader.read_into(f"bulk-{number}", memoryview(memory), [Piece(0, 0, len(content))])
        assert memory == content


def test_a_folder_that_the_other_pod_has_made_meanwhile_is_made(pods: Pods) -> None:
    """A pod that has just looked for a step's folder in vain makes it all the same, and writes into it."""
    ours, theirs = pods.ours.below("step-1"), pods.theirs.below("step-1")
    assert theirs.files() == {}
    ours.make()
    theirs.make()
    theirs.put("file", b"12345")
    assert ours.read("file") == b"12345"


def test_the_mounts_share_no_locks_and_create_lets_one_through(pods: Pods) -> None:
    """Of several that create one name at once, through either mount, exactly one succeeds, and both pods read its bytes."""
    for pod in pods:
        pod.put("lock", b"")
    with open(f"{pods.ours}/lock", "rb") as mine, open(f"{pods.theirs}/lock", "rb") as other:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for number in range(ROUNDS):
        barrier = threading.Barrier(len(ATTEMPTS))

        def go(pod: LocalFolder, data: str, name: str = f"{number}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return pod.create(name, data.encode())

        with futures.ThreadPoolExecutor(len(ATTEMPTS)) as pool:
            won = list(pool.map(go, itertools.cycle(pods), ATTEMPTS))
        assert won.count(True) == 1
        for pod in pods:
            assert pod.read(f"{number}").decode() == ATTEMPTS[won.index(True)]


def test_attempts_at_once_end_with_the_newest(pods: Pods) -> None:
    """Attempts commit one step through either mount: the newest always stands, whoever is older is refused, at once and later."""
    for number in range(ROUNDS):
        folders = [pod.below(f"step-{number}") for pod in pods]
        folders[0].make()
        barrier = threading.Barrier(len(ATTEMPTS))

        def go(folder: LocalFolder, generation: str, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                publish(folder, generation)
            except CommitError:
                return False
            return True

        with futures.ThreadPoolExecutor(len(ATTEMPTS)) as pool:
            said = dict(zip(ATTEMPTS, pool.map(go, itertools.cycle(folders), ATTEMPTS), strict=True))
        assert said[ATTEMPTS[-1]], said
        for folder in folders:
            soon(functools.partial(stands, folder, ATTEMPTS[-1]), "the newest stands")
            with pytest.raises(CommitError, match=ATTEMPTS[-1]):
                publish(folder, "3")


def test_a_file_that_the_other_pod_renames_over_is_whole(pods: Pods) -> None:
    """A reader of one mount sees the one content or the other while the other mount's writer replaces the file, and then the last one."""
    contents = (b"a" * 100_000, b"b" * 100_000)
    pods.ours.put("file", contents[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def look() -> None:
        while not done.is_set():
            seen.add(pods.theirs.read("file"))

    with futures.ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for number in range(10):
            pods.ours.put("file", contents[number % 2])
        done.set()
        looking.result()
    assert seen <= set(contents)
    soon(lambda: pods.theirs.read("file") == contents[1], "the last content is there")


def test_a_checkpoint_that_the_other_pod_takes_down_is_gone(pods: Pods) -> None:
    """Whoever has looked at it a moment ago sees soon that it is no checkpoint any more, and commits the step again."""
    ours, theirs = pods.ours.below("step-1"), pods.theirs.below("step-1")
    ours.make()
    publish(ours, "1")
    assert committed(theirs) == ["1", "1"]
    aside = ours.take_down(by=1, generation_of=generation_of, marker=names.COMMIT_MARKER)
    assert aside is not None
    soon(lambda: theirs.entry(names.COMMIT_MARKER) is None, "the marker is gone")
    aside.delete(sorted(aside.files()))
    aside.remove_if_empty()
    soon(lambda: pods.theirs.folders() == [names.INTERNAL_DIR], "the folder is gone")
    theirs.make()
    publish(theirs, "1-2")
    soon(lambda: committed(ours) == ["1-2", "1-2"], "it is committed again")


def test_a_commit_waits_for_files_whose_names_come_late(pods: Pods) -> None:
    """The pod that commits has just looked for the other pod's files, in vain: it finds them within the bound; a missing one is named."""
    ours, theirs = pods.ours.below("step-5"), pods.theirs.below("step-5")
    theirs.make()
    for rank in (0, 1):
        written = (names.part_file(rank, "1"), names.data_file(rank, 0, "1"))
        assert [theirs.entry(name) for name in written] == [None, None]
        write_part(Path(str(ours if rank else theirs)), rank, world_size=2)
    files = {name: entry.length for name, entry in ours.files().items()}
    manifest = commit.finish(ours)
    assert manifest is not None
    metadata = ours.read(names.COMMIT_MARKER)
    commit.publish(theirs, manifest, metadata, files)
    assert commit.committed_as(theirs) == "1"
    lost = names.data_file(1, 0, "2")
    with pytest.raises(commit.FilesMissing, match=lost):
        commit.publish(theirs, manifest, metadata, {**files, lost: 1}, late_s=0.0)
