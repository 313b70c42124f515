"""
The whole of: how the arena grows: within every limit, never over what a trainer has written, and in turn between two processes.

Called from: pytest.
"""

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from pillion.errors import ArenaExhausted, SidecarError
from pillion.wire import arena, policy, save_messages
from pillion_sidecar.arena import growth, memory_limit, pod_arena, segment
from pillion_sidecar.arena.growth import Growth
from pillion_sidecar.arena.memory_limit import Level
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.supervisor import staging
from support.deadlines import Deadline
from support.identities import identity

MIB = 2**20


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a tmpfs, as an arena is."""
    with tempfile.TemporaryDirectory(prefix="growth-", dir="/dev/shm") as made:
        yield Path(made)


@pytest.fixture
def segments(folder: Path) -> Iterator[dict[int, Segment]]:
    """Of two ranks, with two slots each."""
    made = {
        rank: Segment.create(str(folder / f"segment-{rank}.arena"), num_slots=2, stride_bytes=8 * MIB)
        for rank in (0, 1)
    }
    yield made
    for each in made.values():
        each.close()


def limits(free_bytes: int) -> Level:
    """A container that may take so much more, beside what the sidecar keeps for itself."""
    return Level("/sys/fs/cgroup", 100 * MIB + free_bytes + growth.SPARE_BYTES, 100 * MIB)


def test_a_slot_that_nobody_has_asked_for_says_what_it_has(folder: Path, segments: dict[int, Segment]) -> None:
    """Also who needs no room is told what is there: a trainer maps what an earlier one has left."""
    assert segments[0].capacity_bytes(0, enough_bytes=0) < MIB
    segments[0].grow(0, 2 * MIB)
    again = Segment.attach(str(folder / "segment-0.arena"))
    try:
        assert again.capacity_bytes(0, enough_bytes=0) >= 2 * MIB
    finally:
        again.close()


def test_a_session_does_not_walk_the_pages_that_the_session_before_has_walked(
    folder: Path, segments: dict[int, Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainers of the new session wait for their load meanwhile: 10 ms for each GiB of every snapshot."""
    path = str(folder / "segment-0.arena")
    segments[0].grow(0, 2 * MIB)
    before = Segment.attach(path)
    before.capacity_bytes(0)
    before.close()
    looks: list[int] = []
    plain = os.lseek

    def counted(fd: int, start: int, how: int) -> int:
        looks.append(start)
        return plain(fd, start, how)

    monkeypatch.setattr(os, "lseek", counted)
    with contextlib.closing(Segment.attach(path, before)) as again:
        assert again.capacity_bytes(0, enough_bytes=MIB) >= 2 * MIB
    assert looks == []


def test_what_is_known_of_a_segment_is_not_believed_of_another_file_of_its_name(
    folder: Path, segments: dict[int, Segment]
) -> None:
    """An arena that was made anew at the same path is empty. A touch of its missing pages would end the process."""
    path = str(folder / "segment-0.arena")
    segments[0].grow(0, 2 * MIB)
    with contextlib.closing(Segment.attach(path)) as before:
        before.capacity_bytes(0)
        with (
            contextlib.closing(Segment.create(path, num_slots=2, stride_bytes=8 * MIB)),
            contextlib.closing(Segment.attach(path, before)) as again,
        ):
            assert again.capacity_bytes(0, enough_bytes=MIB) < MIB


def test_ranks_that_grow_at_once_stay_within_the_limit(
    segments: dict[int, Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is refused while the first is still being given its memory; it may have less."""
    began, go_on = threading.Event(), threading.Event()
    plain = Segment.grow

    def slow(self: Segment, slot: int, room_bytes: int) -> int:
        began.set()
        assert go_on.wait(Deadline.REPLY.s)
        return plain(self, slot, room_bytes)

    of = Growth(segments, 5 * MIB, container=lambda: None)
    monkeypatch.setattr(Segment, "grow", slow)
    first = threading.Thread(target=of.grow, args=(0, 0, 3 * MIB))
    first.start()
    assert began.wait(Deadline.REPLY.s)
    with pytest.raises(ArenaExhausted, match="the pod's limit is 5242880 bytes for 4 slots of 2 ranks"):
        of.grow(1, 0, 3 * MIB)
    go_on.set()
    assert of.grow(1, 0, MIB) == MIB
    first.join()
    assert segments[0].capacity_bytes(0) == 3 * MIB
    # The other slot that was never grown has a page.
    room_bytes = MIB - arena.PAGE_BYTES
    with pytest.raises(ArenaExhausted):
        of.grow(1, 1, room_bytes + 1)
    assert of.grow(1, 1, room_bytes) == room_bytes, "nothing but what is allocated counts, once nobody grows"


def test_touching_memory_leaves_what_a_trainer_wrote_there(
    segments: dict[int, Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 5.14 pages are touched one by one, and a trainer that was answered meanwhile may have copied its state."""
    monkeypatch.setattr(segment, "MADV_POPULATE_WRITE", 10**6)
    of, start = segments[0], segments[0].header.slot_offset(1)
    of.grow(1, 64 * arena.PAGE_BYTES)
    written = bytes(range(1, 256)) * 64
    of.map[start + arena.PAGE_BYTES : start + arena.PAGE_BYTES + len(written)] = written
    of._touch(start, 64 * arena.PAGE_BYTES)
    assert of.map[start + arena.PAGE_BYTES : start + arena.PAGE_BYTES + len(written)] == written


def test_two_processes_grow_in_turn_and_the_wait_is_bounded(
    segments: dict[int, Segment], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor grows a slot for a load, and knows nothing of what the supervisor is giving to a save."""
    monkeypatch.setattr(growth, "TURN_TIMEOUT_S", 0.05)
    of = Growth(segments, 8 * MIB, container=lambda: None)
    other = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SidecarError, match=f"growing the arena in {folder} for"):
            of.grow(0, 0, MIB)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert of.grow(0, 0, MIB) == MIB
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(other)


def test_an_arena_larger_than_the_containers_memory_is_refused_with_the_limits_name(
    segments: dict[int, Segment],
) -> None:
    """The kernel would end the container without a word, and the snapshots with it."""
    of = Growth(segments, 16 * MIB, container=lambda: limits(2 * MIB))
    assert of.grow(0, 0, MIB) == MIB
    with pytest.raises(ArenaExhausted, match=r"memory limit of this container \(/sys/fs/cgroup\)") as raised:
        of.grow(0, 1, 4 * MIB)
    assert raised.value.available_bytes < 3 * MIB
    assert "raise the container's memory limit" in str(raised.value)


V2 = {
    "memory.max": "1000\n",
    "memory.current": "900\n",
    "memory.stat": "anon 500\nfile 350\nshmem 100\ninactive_file 200\nactive_file 50\nslab_reclaimable 10\n",
}
V1 = {
    "memory.limit_in_bytes": "1000\n",
    "memory.usage_in_bytes": "900\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 60\n",
}


def lay_out(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_what_a_container_may_still_take_is_read_from_both_versions_of_cgroups(tmp_path: Path) -> None:
    """The page cache of files on disks is given up when memory is short; that of the arena is not, and counts."""
    v2, v1 = lay_out(tmp_path / "v2", V2), lay_out(tmp_path / "v1" / "memory", V1).parent
    assert memory_limit.tightest("0::/\n", v2) == Level(str(v2), 1000, 640)
    # Without a namespace of its own a container sees the host's path, and itself at the top.
    assert memory_limit.tightest("4:memory:/docker/abc\n1:cpu:/\n0::/\n", v1) == Level(str(v1 / "memory"), 1000, 640)


def test_the_tightest_of_the_cgroups_around_a_process_counts(tmp_path: Path) -> None:
    """A pod may have a limit, and its container none; a process without any has none."""
    lay_out(tmp_path / "pod" / "container", V2 | {"memory.max": "max\n"})
    assert memory_limit.tightest("0::/pod/container\n", tmp_path) is None
    lay_out(tmp_path / "pod", V2)
    found = memory_limit.tightest("0::/pod/container\n", tmp_path)
    assert found is not None
    assert found.free_bytes == 360
    lay_out(tmp_path / "pod" / "container", {"memory.max": "700\n"})
    found = memory_limit.tightest("0::/pod/container\n", tmp_path)
    assert found is not None
    assert found.free_bytes == 60
    assert memory_limit.tightest("nonsense\n0::/gone\n", tmp_path / "gone") is None


def test_all_slots_of_a_pod_fit_into_the_addresses_of_a_process() -> None:
    """256 ranks beside a tmpfs of 1 TiB; where there are few, each slot may still have the whole limit."""
    assert pod_arena.stride_bytes(2**39, num_slots=512) * 512 <= 2**46
    assert pod_arena.stride_bytes(2**39, num_slots=16) >= 2**39


def test_an_arena_that_may_not_be_mapped_is_refused_with_the_reason_and_leaves_nothing_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch systems limit the addresses of a process (ulimit -v); a trainer that tried again kept descriptors open each time."""
    left = [1]
    plain = mmap.mmap

    def refuse(fd: int, length: int) -> mmap.mmap:
        if not left:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        left.pop()
        return plain(fd, length)

    monkeypatch.setattr(mmap, "mmap", refuse)
    before = sorted(os.listdir("/proc/self/fd"))
    two = pod_arena.Identity(
        session="a" * 32,
        run_id="test",
        attempt=0,
        world_size=2,
        pods=((0, 1),),
        local_ranks=(0, 1),
        root="",
        store_mode=None,
        store=None,
    )
    with pytest.raises(SidecarError, match=r"cannot map the arena segment .*segment-1.arena: .*Cannot allocate memory"):
        pod_arena.PodArena(str(folder), two, policy.parse({}, embedded=True))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_limit_of_the_length_of_files_is_named_as_what_forbids_the_arena(tmp_path: Path) -> None:
    """`ulimit -f` of the trainer's shell is the sidecar's too: no invariant is broken, and the text says what to look at."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(
            SidecarError, match=r"cannot make the arena segment .*may have 1048576 \(ulimit -f, inherited"
        ):
            Segment.create(str(tmp_path / "segment"), num_slots=2, stride_bytes=1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_slot_that_is_freed_forgets_the_heads_that_it_held(segments: dict[int, Segment]) -> None:
    """A load may fill it with another layout; a save of the one before would otherwise take its heads for written."""
    of = segments[0]
    of.write_header(0, arena.SlotHeader(state=arena.SlotState.SEALED, sequence=7, framed_digest=b"f" * 16))
    of.reset(0)
    header = of.read_header(0)
    assert (header.state, header.sequence, header.framed_digest) == (arena.SlotState.FREE, 7, bytes(16))


class Trainers:
    """As far as a claim needs them."""

    def __init__(self, of: pod_arena.PodArena) -> None:
        self.pod = of

    def require_pod(self) -> pod_arena.PodArena:
        return self.pod


def test_a_step_that_is_saved_again_by_another_session_has_all_of_the_bound(folder: Path) -> None:
    """Trainers that come back from a crash save the step that was torn; the timer of the torn one says nothing of it."""

    class Answers:
        rank = 0

        def answer(self, _message: object, _answer: object) -> None: ...

    async def story() -> None:
        before = pod_arena.PodArena(str(folder), identity("a" * 32, folder, None), policy.parse({}, embedded=True))
        trainers = Trainers(before)
        settings = type("Of", (), {"peer_timeout_s": Deadline.SCRIPT.s})
        nothing: Any = type("Nothing", (), {"began": lambda *_, **__: None, "memory": lambda *_: None})()
        of = staging.StagingCoordinator(
            cast("Any", settings), nothing, cast("Any", trainers), nothing, tasks.BackgroundTasks()
        )
        claim = save_messages.Claim(id=1, step=5, persist=True, room_bytes=MIB)
        await of.claim(cast("Any", Answers()), claim)
        before.close()
        trainers.pod = pod_arena.PodArena(
            str(folder), identity("b" * 32, folder, None), policy.parse({}, embedded=True)
        )
        of._seal_timeout("a" * 32, 5)
        await of.claim(cast("Any", Answers()), claim)
        assert list(of._seal_timers) == [("b" * 32, 5)]
        of._seal_timeout("a" * 32, 5)
        assert trainers.pod.table.saves[5].filling == {0}
        of._forget_timer(5)
        assert of._seal_timers == {}
        trainers.pod.close()

    asyncio.run(story())
