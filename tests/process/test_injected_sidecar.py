"""
The whole of: a sidecar as injection starts it: who may open its files, and what the kubelet's hooks and probes get from it.

Called from: pytest.
Must never: count on the umask, or on trainer and sidecar being one user.
"""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pillion import checkpointer
from pillion.wire import messages, names
from process.injected import Injected
from process.ranks import Peer, Ranks, committed
from support import deadlines
from support.deadlines import Deadline
from support.processes import Processes

NOBODY = 65534


@pytest.fixture
def strict_umask() -> Iterator[None]:
    """What a hardened image sets: nothing for the others."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def pillion_sidecar(*arguments: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pillion_sidecar", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=Deadline.PROCESS_START.s,
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def say(sidecar: Injected, kind: str) -> messages.Message:
    """The answer to a first message of any kind."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(Deadline.REPLY.s)
        sock.connect(str(sidecar.folder / names.CONTROL_SOCKET))
        sock.sendall(messages.encode({"type": kind, "id": 1}))
        return messages.receive(sock, messages.Decoder())[0]


def test_a_trainer_of_any_user_may_open_what_the_sidecar_makes_for_it(
    strict_umask: None, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Whatever the umask, segment, opaque leaves and socket are open to all in the pod; the lock is the sidecar's own."""
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run")

    def train(_: Peer) -> None:
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000), "name": "a"}, 1).result(Deadline.COMMITTED.s)
        opened.close()

    def load(_: Peer) -> str:
        opened = checkpointer.Checkpointer()
        state = {"w": torch.zeros(1000), "name": ""}
        opened.load(state, 1)
        assert opened.last_load is not None
        tier = opened.last_load.tier
        opened.close()
        return tier

    ranks.start(train, env=sidecar.trainer).finish()
    segment = sidecar.folder / names.segment_file(0)
    assert mode(segment) == mode(sidecar.folder / names.CONTROL_SOCKET) == 0o666
    assert mode(sidecar.folder / names.SIDECAR_LOCK) == 0o600
    # Without the arena a load comes from storage; what it brings lies in the segment, and nothing beside it.
    sidecar.run.signal(signal.SIGTERM)
    assert sidecar.run.wait(Deadline.DRAINED) == 0
    segment.unlink()
    sidecar.start()
    assert ranks.start(load, env=sidecar.trainer).finish() == ["storage"]
    assert [each.name for each in sidecar.folder.iterdir() if each.name.startswith("segment-")] == [segment.name]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_a_trainer_of_another_user_saves_and_loads(processes: Processes, ranks: Ranks, tmp_path: Path) -> None:
    """The trainer runs as nobody: it saves through an arena and a storage that are not its own, and loads from both."""
    tmp_path.chmod(0o711)
    for parent in tmp_path.parents:
        if parent.name.startswith("pytest-"):
            parent.chmod(0o711)
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run")
    sidecar.folder.chmod(0o777)

    def train(_: Peer) -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000), "name": "a"}, 1).result(Deadline.COMMITTED.s)
        state: dict[str, Any] = {"w": torch.zeros(1000), "name": ""}
        assert opened.load(state) == 1
        assert (float(state["w"].sum()), state["name"]) == (1000.0, "a")
        opened.close()

    ranks.start(train, env=sidecar.trainer).finish()
    assert committed(tmp_path / "run") == [1]


def test_a_restarted_sidecar_adopts_the_arena_of_the_one_before(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """SIGKILL to the sidecar: its successor has the same segment, and persists the snapshot that was in memory only."""
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run")

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000)}, 1, persist=False).result(Deadline.COMMITTED.s)
        peer.tell()
        peer.hear()

    def load(_: Peer) -> tuple[int | None, str]:
        opened = checkpointer.Checkpointer()
        step = opened.load({"w": torch.zeros(1000)})
        assert opened.last_load is not None
        tier = opened.last_load.tier
        opened.close()
        return step, tier

    job = ranks.start(train, env=sidecar.trainer)
    job.hear()
    inode = (sidecar.folder / names.segment_file(0)).stat().st_ino
    sidecar.run.signal(signal.SIGKILL)
    sidecar.run.wait(Deadline.PROCESS_EXIT)
    job.kill()
    sidecar.start()
    assert ranks.start(load, env=sidecar.trainer).finish() == [(1, "arena")]
    assert (sidecar.folder / names.segment_file(0)).stat().st_ino == inode
    assert committed(tmp_path / "run") == [1]


def test_ping_tells_a_sidecar_that_answers_from_one_that_hangs_or_is_gone(processes: Processes, tmp_path: Path) -> None:
    """Exit status 0 while the supervisor's loop answers; 69 with the reason when it is stopped, and when nobody is there."""
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run")
    env = {names.ENV_RUNTIME_DIR: str(sidecar.folder)}
    assert pillion_sidecar("ping", env=env).returncode == 0
    sidecar.run.signal(signal.SIGSTOP)
    hanging = pillion_sidecar("ping", env=env)
    sidecar.run.signal(signal.SIGCONT)
    assert (hanging.returncode, "within 5.0 s" in hanging.stderr) == (69, True)
    sidecar.run.signal(signal.SIGTERM)
    assert sidecar.run.wait(Deadline.DRAINED) == 0
    assert pillion_sidecar("ping", env=env).returncode == 69


def test_notify_has_the_trainers_save_while_they_live(processes: Processes, ranks: Ranks, tmp_path: Path) -> None:
    """The preStop hook returns at once; the trainer saves at a step ahead of it, and the sidecar says that it drains."""
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run")

    def train(peer: Peer) -> int:
        opened = checkpointer.Checkpointer()
        stop = threading.Event()
        step = 0
        while not stop.wait(0.01):
            step += 1
            if opened.due(step):
                opened.save({"w": torch.ones(1000)}, step).result(Deadline.COMMITTED.s)
                break
            if step == 5:
                peer.tell()
        opened.close()
        return step

    job = ranks.start(train, env=sidecar.trainer)
    job.hear()
    assert not sidecar.ask("status")["draining"]
    done = pillion_sidecar("notify", env={names.ENV_RUNTIME_DIR: str(sidecar.folder)})
    assert (done.returncode, done.stderr) == (0, "")
    assert sidecar.ask("status")["draining"]
    assert job.finish() == committed(tmp_path / "run")


def test_notify_is_no_error_where_nobody_listens(tmp_path: Path) -> None:
    """A preStop hook that failed would be an event on the pod, and change nothing: status 0, with a line that says why."""
    done = pillion_sidecar("notify", env={names.ENV_RUNTIME_DIR: str(tmp_path)})
    assert done.returncode == 0
    assert "no answer from the sidecar" in done.stderr


def test_the_kubelets_commands_load_nothing_that_they_do_not_need() -> None:
    """An interpreter is started for each: no YAML, no Prometheus, no asyncio, no torch."""
    code = "import sys, pillion_sidecar.__main__ as m; m.main(['notify']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert {"yaml", "prometheus_client", "asyncio", "torch", "numpy"}.isdisjoint(done.stdout.split())


def test_a_connection_that_said_no_hello_is_no_trainer(processes: Processes, tmp_path: Path) -> None:
    """An observer that sends a trainer's message is told so and disconnected; the next one is served."""
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run")
    refused = say(sidecar, "claim")
    assert "the first message must be hello" in refused["error"]["message"]
    assert sidecar.answers()


def test_sigterm_ends_a_sidecar_that_has_nothing_left_to_do_at_once(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """After a clean goodbye a Job's completion waits for nothing here: exit status 0 at once."""
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run")

    def train(_: Peer) -> None:
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000)}, 1)
        opened.close()

    ranks.start(train, env=sidecar.trainer).finish()
    sidecar.run.signal(signal.SIGTERM)
    assert sidecar.run.wait(Deadline.ENDED_AT_ONCE) == 0
    deadlines.eventually(lambda: committed(tmp_path / "run") == [1], Deadline.SETTLE, "the save is there")
