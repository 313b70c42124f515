"""
The whole of: wrong settings, wrong calls, full and unwritable storage, a small arena, and garbage on the control socket.

Called from: pytest.
Must never: assert only that an error came; what was there before it still has to be there.
"""

import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pillion import checkpointer, connection
from pillion.errors import (
    ArenaExhausted,
    ErrorDocument,
    InternalError,
    PersistError,
    PillionError,
    ProtocolMismatch,
    SettingsError,
    SidecarError,
    UsageError,
)
from pillion.wire import control, messages, names
from pillion.wire.message import Request
from pillion_sidecar.arena.segment import Segment
from process import ranks as processes
from process.ranks import Peer, Ranks
from support.deadlines import Deadline


def state_of(step: int, num: int = 4096) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((num,), float(step))}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let us mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_every_wrong_field_of_a_policy_is_told_at_once_and_nothing_is_started(ranks: Ranks, tmp_path: Path) -> None:
    """An unknown field and two nonsense values are three problems of one error, raised by the constructor."""
    with pytest.raises(SettingsError) as caught:
        ranks.open(
            tmp_path / "root", trigger={"periodStep": 5}, staging={"slots": -1}, drain={"timeoutSeconds": "soon"}
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert all(name in text for name in ("trigger.periodStep", "staging.slots", "drain.timeoutSeconds"))
    ranks.alone()
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("kind", ["a file", "below a file", "read only"])
def test_a_root_that_cannot_be_written_is_told_by_the_constructor(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """SettingsError names the root, before any step was trained."""
    root = tmp_path / "root"
    if kind == "a file":
        root.write_text("")
    elif kind == "below a file":
        (tmp_path / "file").write_text("")
        root = tmp_path / "file" / "root"
    else:
        root = Path("/proc/pillion")  # root may write anywhere else
    with pytest.raises(SettingsError, match="root"):
        ranks.open(root)


def test_a_full_disk_fails_the_save_and_nothing_else(ranks: Ranks, small_disk: Path) -> None:
    """ENOSPC is on the handle with its rank; the checkpoint before is intact, and the next save works once there is room."""
    opened = ranks.open(small_disk, staging={"sizeLimit": "64Mi"})
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 * 1024**2))
    error = opened.save(state_of(2, 500_000), 2).committed.exception(Deadline.COMMITTED.s)
    assert isinstance(error, PersistError)
    assert "No space left" in error.failures[0].message
    assert processes.committed(small_disk) == [1]
    state = state_of(0)
    ballast.unlink()
    opened.save(state_of(3), 3).result(Deadline.COMMITTED.s)
    assert opened.load(state, step=1) == 1
    assert float(state["weight"][0]) == 1.0
    assert processes.committed(small_disk) == [1, 3]
    assert not list((small_disk / "step-2").glob("*.distcp")) if (small_disk / "step-2").exists() else True


def test_a_full_disk_is_pruned_of_what_the_policy_removes_anyway(ranks: Ranks, small_disk: Path) -> None:
    """The third of three checkpoints of which two fit is committed with `keepLast: 2`: the first goes before it, and not after."""
    opened = ranks.open(small_disk, retention={"keepLast": 2})
    for step in (1, 2, 3):
        checkpoint = opened.save(state_of(step, 400_000), step).result(Deadline.COMMITTED.s)
        assert checkpoint.size_bytes > small_disk_bytes(small_disk) / 3
    assert processes.committed(small_disk) == [2, 3]
    state = state_of(0, 400_000)
    assert opened.load(state, step=2) == 2
    assert float(state["weight"][-1]) == 2.0


def small_disk_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize


def test_an_arena_whose_file_system_is_full_says_so_and_not_to_raise_the_limit(small_disk: Path) -> None:
    """/dev/shm of a container is 64 MB by default: the policy's limit is no remedy there, and the trainer is told what is."""
    segment = Segment.create(str(small_disk / "segment-0.arena"), num_slots=2, stride_bytes=16 * 1024**2)
    try:
        with pytest.raises(ArenaExhausted) as caught:
            segment.grow(0, 8 * 1024**2)
    finally:
        segment.close()
    told = ErrorDocument.from_exception(caught.value).to_exception()
    assert str(told) == str(caught.value)
    assert f"the file system of {small_disk}/segment-0.arena is full, with {4 * 1024**2} bytes in all" in str(told)
    assert "--shm-size" in str(told)
    assert "raise staging.sizeLimit" not in str(told)


def test_an_arena_smaller_than_a_snapshot_says_how_much_is_missing(ranks: Ranks, tmp_path: Path) -> None:
    """ArenaExhausted has needed and available bytes; a snapshot that fits is saved before and after."""
    opened = ranks.open(tmp_path, staging={"sizeLimit": "1Mi"})
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    error = opened.save(state_of(2, 1_000_000), 2).committed.exception(Deadline.COMMITTED.s)
    assert isinstance(error, ArenaExhausted)
    assert error.needed_bytes >= 4_000_000
    assert 0 < error.available_bytes <= 1024**2
    assert "raise staging.sizeLimit" in str(error)
    assert "the pod's limit is 1048576 bytes" in str(error)
    opened.save(state_of(3), 3).result(Deadline.COMMITTED.s)
    assert processes.committed(tmp_path) == [1, 3]


def test_steps_that_do_not_grow_and_calls_that_make_no_sense_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """A smaller step, a negative one, a bool, a state that is no mapping and a closed Checkpointer are UsageErrors on the handle;
    nothing is raised into the training and nothing is saved."""
    opened = ranks.open(tmp_path)
    opened.save(state_of(5), 5).result(Deadline.COMMITTED.s)
    bad_steps: list[object] = [4, -1, True, 2.5, "6"]
    for step in bad_steps:
        error = opened.save(state_of(1), step).committed.exception(0)  # type: ignore[arg-type]
        assert isinstance(error, UsageError), step
    error = opened.save([1, 2], 6).committed.exception(Deadline.REPLY.s)  # type: ignore[arg-type]
    assert isinstance(error, UsageError)
    with pytest.raises(UsageError):
        opened.load((1, 2))  # type: ignore[arg-type]
    opened.close()
    opened.close()
    assert isinstance(opened.save(state_of(7), 7).committed.exception(0), UsageError)
    with pytest.raises(UsageError):
        opened.load(state_of(0))
    assert processes.committed(tmp_path) == [5]


GARBAGE = {
    "no frame": b"GET / HTTP/1.1\r\n\r\n",
    "huge length": struct.pack(">I", 2**32 - 1),
    "no JSON": struct.pack(">I", 3) + b"\xff{}",
    "no object": struct.pack(">I", 2) + b"[]",
    "no type": struct.pack(">I", 2) + b"{}",
    "another first message": messages.encode({"type": "claim", "step": 1}),
    "a hello without fields": messages.encode({"type": "hello", "version": 1}),
    "a hello with nonsense": messages.encode({"type": "hello", "version": 1, "session": 5, "rank": "x", "pods": 3}),
    "deep nesting": struct.pack(">I", 200_000) + b"[" * 200_000,
    "half a frame": struct.pack(">I", 100) + b"half",
    "nothing": b"",
}


def test_garbage_on_the_control_socket_ends_that_connection_and_no_other(ranks: Ranks, tmp_path: Path) -> None:
    """Whatever a stranger sends, the trainer that is connected goes on saving through the same sidecar."""
    opened = ranks.open(tmp_path)
    sidecar = processes.status(opened)["pid"]
    path = os.path.join(opened._session.runtime_dir, names.CONTROL_SOCKET)
    for step, (name, data) in enumerate(GARBAGE.items(), start=1):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.settimeout(Deadline.REPLY.s)
            stranger.connect(path)
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(65536):
                pass
        assert opened.save(state_of(step), step).result(Deadline.COMMITTED.s).step == step, name
    assert processes.status(opened)["pid"] == sidecar


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw(Request[control.Pong]):
    """A request as a stranger writes it."""

    type: ClassVar[str] = "raw"
    body: Mapping[str, object]

    def to_document(self) -> dict[str, object]:
        return dict(self.body)


def test_messages_with_wrong_fields_are_refused_and_the_connection_lives(ranks: Ranks, tmp_path: Path) -> None:
    """A request with a missing or mistyped field is answered with an error; the next save over the same connection works."""
    opened = ranks.open(tmp_path)
    for request in (
        {"type": "claim"},
        {"type": "claim", "step": "1", "room_bytes": 1, "persist": True},
        {"type": "claim", "step": True, "room_bytes": 1, "persist": True},
        {"type": "reserve", "room_bytes": None},
        {"type": "load", "step": None},
        {"type": "load", "step": None, "layout": "no layout"},
    ):
        with pytest.raises(PillionError) as caught:
            opened._session.request(Raw(body=request), Deadline.REPLY.s)
        assert "gave no answer" not in str(caught.value), request
        assert not isinstance(caught.value, InternalError), "what a client sends is no fault of the sidecar's"
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)


def test_another_protocol_version_is_refused_with_both_numbers(ranks: Ranks, tmp_path: Path) -> None:
    """A client of another release gets ProtocolMismatch and is told to install the same release."""
    opened = ranks.open(tmp_path)
    link = connection.Connection(
        os.path.join(opened._session.runtime_dir, names.CONTROL_SOCKET),
        connect_timeout_s=Deadline.REPLY.s,
        on_event=lambda message: None,
        on_lost=lambda reason: None,
    )
    try:
        with pytest.raises((ProtocolMismatch, SidecarError), match="999") as caught:
            link.request(Raw(body={"type": "hello", "version": 999}), Deadline.REPLY.s)
        assert isinstance(caught.value, ProtocolMismatch)
        assert {caught.value.own_version, caught.value.peer_version} == {1, 999}
    finally:
        link.close()


def test_ranks_without_a_process_group_are_told_what_they_lack(ranks: Ranks, tmp_path: Path) -> None:
    """Each takes itself for a job of its own. The second one is told which process has the root, and what ranks of one job do first."""
    ranks.open(tmp_path)

    def second(peer: Peer) -> str:
        with pytest.raises(UsageError) as caught:
            checkpointer.Checkpointer(tmp_path)
        return str(caught.value)

    [told] = ranks.start(second).finish(Deadline.PROCESS_START)
    assert f"rank 0 in process {os.getpid()}" in told
    assert "init_process_group" in told


def test_a_second_job_on_the_root_of_a_living_one_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """Two Checkpointers of one root at a time are an error of the second; the first goes on."""
    opened = ranks.open(tmp_path)
    with pytest.raises(UsageError, match=r"open with another Checkpointer: close\(\) that one first"):
        checkpointer.Checkpointer(tmp_path)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)


def test_a_sidecar_that_is_killed_is_replaced_and_the_snapshot_in_its_arena_is_persisted(
    ranks: Ranks, tmp_path: Path
) -> None:
    """SIGKILL of the sidecar fails the handles in flight; the client starts another, which adopts the arena and goes on."""
    import signal

    from support import deadlines

    opened = ranks.open(tmp_path)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    found = processes.status(opened)
    processes.stop(found["executor_pid"])
    handle = opened.save(state_of(2), 2)
    os.kill(found["pid"], signal.SIGKILL)
    assert handle.committed.exception(Deadline.REPLY.s) is not None
    os.kill(found["executor_pid"], signal.SIGKILL)
    deadlines.eventually(lambda: processes.committed(tmp_path) == [1, 2], Deadline.DRAINED, "step 2 is persisted")

    def saved() -> bool:
        step = opened._last_step + 1
        return opened.save(state_of(step), step).committed.exception(Deadline.COMMITTED.s) is None

    deadlines.eventually(saved, Deadline.DRAINED, "a save works again")
