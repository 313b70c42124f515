"""
The whole of: trainers as forked children of the test, what they and the test tell each other, and the sidecars they start.

Called from: tests of the levels `process` and `distributed`, through the fixture `ranks` (each folder's conftest.py).
Must never: start an interpreter (a fork of this process has torch already; starting one costs seconds), or run a backward
pass in this process (autograd's threads do not survive a fork).

A trainer's body is a closure; it runs in the child, with real shared memory, a real sidecar and, for several ranks, gloo.
"""

import contextlib
import faulthandler
import os
import pickle
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, final

import psutil
import pytest
import torch
import torch.distributed as dist

from pillion import checkpointer
from pillion.wire import control
from support import deadlines, leaks, network
from support.deadlines import Deadline
from support.store_host import StoreHost

_TAIL_CHARS: Final = 6000
State = dict[str, Any]


@final
class Peer:
    """
    The child's end: which rank it is, and its channel to the test.
    """

    def __init__(self, rank: int, world_size: int, pipe: "Connection[Any, Any]") -> None:
        self.rank = rank
        self.world_size = world_size
        self._pipe = pipe

    def tell(self, value: object = None) -> None:
        """
        Sends a value to the test.
        """
        _send(self._pipe, ("told", value))

    def hear(self) -> Any:
        """
        Blocks: until the test says something; for ever when it kills this rank instead.
        """
        return self._pipe.recv()


Body = Callable[[Peer], object]

JOIN_TRIES: Final = 3
"""How often the ranks of a job are forked until all are in their process group."""
TURN_VARIABLE: Final = "PILLION_TEST_TURN"


@final
class Trainer:
    """
    The test's end of one forked rank.
    """

    def __init__(self, pid: int, rank: int, pipe: "Connection[Any, Any]", output: Path) -> None:
        self.pid = pid
        self.rank = rank
        self.status: int | None = None
        self._pipe = pipe
        self._output = output

    def hear(self, deadline: Deadline = Deadline.COMMITTED) -> Any:
        """
        The next value that the rank tells, or at the end what its body returned.

        Blocks: up to deadline.s.

        Raises:
          AssertionError: the body raised, or the rank died; with its output.
          DeadlinePassed: it said nothing.
        """
        if not self._pipe.poll(deadline.s):
            raise deadlines.DeadlinePassed(f"rank {self.rank} said nothing for {deadline.s:.0f} s: {self.tail()}")
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise AssertionError(f"rank {self.rank} ended with {self.wait()}: {self.tail()}") from None
        if kind == "error":
            raise AssertionError(f"rank {self.rank}: {value}\n{self.tail()}")
        return value

    def joined(self) -> bool:
        """
        Whether the rank is in its process group. Blocks: up to Deadline.STAGED.
        """
        if not self._pipe.poll(Deadline.STAGED.s):
            return False
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            return False
        if kind == "error":
            raise AssertionError(f"rank {self.rank}: {value}\n{self.tail()}")
        return bool(kind == "joined")

    def say(self, value: object = None) -> None:
        """
        Sends a value to the rank.
        """
        self._pipe.send(value)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """
        Ends the rank by a signal, and reaps it.
        """
        os.kill(self.pid, number)
        self.wait()

    def wait(self, deadline: Deadline = Deadline.PROCESS_EXIT) -> int:
        """
        The exit status, as in subprocess. Blocks: up to deadline.s.
        """
        if self.status is None:
            found = deadlines.eventually(
                lambda: os.waitpid(self.pid, os.WNOHANG)[1:] if self._ended() else None,
                deadline,
                f"rank {self.rank} ended",
            )
            assert found is not None
            self.status = os.waitstatus_to_exitcode(found[0])
            self._pipe.close()
        return self.status

    def _ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def tail(self) -> str:
        """
        The end of its output, for a message.
        """
        return self._output.read_text(errors="replace")[-_TAIL_CHARS:]


@final
class Job:
    """
    The ranks that were started together.
    """

    def __init__(self, trainers: list[Trainer], store: "dist.TCPStore | None") -> None:
        self.trainers = trainers
        self.store = store

    def __getitem__(self, rank: int) -> Trainer:
        return self.trainers[rank]

    def hear(self, deadline: Deadline = Deadline.COMMITTED) -> list[Any]:
        """
        One value from every rank.
        """
        return [trainer.hear(deadline) for trainer in self.trainers]

    def say(self, value: object = None) -> None:
        """
        The same value to every rank.
        """
        for trainer in self.trainers:
            trainer.say(value)

    def kill(self) -> None:
        """
        SIGKILL to every rank, as torchrun or the kernel do it.
        """
        for trainer in self.trainers:
            trainer.kill()

    def finish(self, deadline: Deadline = Deadline.COMMITTED) -> list[Any]:
        """
        What the bodies returned. Every rank has then ended with status 0.
        """
        values = self.hear(deadline)
        assert [trainer.wait() for trainer in self.trainers] == [0] * len(self.trainers)
        return values


@final
class Ranks:
    """
    Starts trainers for one test; ends them and their sidecars at teardown.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self._folder = folder
        self._mark = mark
        self._started: list[Trainer] = []
        self._stores: list[dist.TCPStore] = []
        self._open: list[checkpointer.Checkpointer] = []
        self._folders: set[str] = set()

    def start(
        self,
        body: Body,
        *,
        num_ranks: int = 1,
        pods: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        store: "dist.TCPStore | StoreHost | None" = None,
        attempt: int = 0,
        namespaces: Mapping[str, str] | None = None,
    ) -> Job:
        """
        Forks `num_ranks` trainers that run `body`. Several join a gloo group over a store that this process hosts, as
        torchrun's agent does.

        Args:
          pods: name of each rank's pod; ranks of one name share a sidecar. None: all share one.
          env: laid over this process's environment.
          store: one that lives elsewhere, or that of an earlier job, as after an elastic restart.
          attempt: torchrun's restart count.
          namespaces: of the network of each pod (`support.network`). None: all live in this process's.
        """
        if num_ranks > 1 and store is None:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self._stores.append(store)
        for turn in range(JOIN_TRIES):
            trainers = self._fork_all(body, num_ranks, pods, env, store, attempt, turn, namespaces or {})
            if num_ranks == 1 or all(trainer.joined() for trainer in trainers):
                break
            # Seen in some 1 of 500 forks on a loaded machine: torch's gloo never finishes in a child that was forked
            # while threads of the store ran here. Nothing of ours has run in it yet.
            for trainer in trainers:
                trainer.kill()
        else:
            raise deadlines.DeadlinePassed(
                f"{num_ranks} ranks did not join in {JOIN_TRIES} tries: {trainers[0].tail()}"
            )
        return Job(trainers, store if isinstance(store, dist.TCPStore) else None)

    def _fork_all(
        self,
        body: Body,
        num_ranks: int,
        pods: Sequence[str] | None,
        env: Mapping[str, str] | None,
        store: "dist.TCPStore | StoreHost | None",
        attempt: int,
        turn: int,
        namespaces: Mapping[str, str],
    ) -> list[Trainer]:
        trainers = []
        for rank in range(num_ranks):
            variables = dict(env or {}) | {TURN_VARIABLE: str(turn)}
            if store is not None:
                variables |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(num_ranks),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": store.host,
                    "MASTER_PORT": str(store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": str(attempt),
                }
            if pods is not None:
                variables["PILLION_POD"] = pods[rank]
            namespace = namespaces.get(variables.get("PILLION_POD", ""), "")
            trainers.append(self._fork(body, rank, num_ranks, variables, namespace))
        return trainers

    def _fork(self, body: Body, rank: int, world_size: int, variables: Mapping[str, str], namespace: str) -> Trainer:
        output = self._folder / f"{len(self._started)}.rank{rank}"
        ours, theirs = Pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads at a fork; those that torch started hold no lock that the child needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                ours.close()
                if namespace:
                    network.enter(namespace)
                _become(output, variables)
                status = _run(body, Peer(rank, world_size, theirs), theirs)
            finally:
                os._exit(status)
        theirs.close()
        trainer = Trainer(pid, rank, ours, output)
        self._started.append(trainer)
        return trainer

    def open(self, root: Path, **policy: Any) -> checkpointer.Checkpointer:
        """
        A Checkpointer in this process, a job of one rank; closed at teardown.
        """
        opened = checkpointer.Checkpointer(root, policy=policy)
        self._open.append(opened)
        self._folders.add(opened._session.runtime_dir)
        return opened

    def alone(self) -> None:
        """
        Waits until the last sidecar has ended, and its arena with it. Blocks: up to Deadline.DRAINED.
        """
        deadlines.eventually(lambda: not self._named("pillion_sidecar"), Deadline.DRAINED, "no sidecar runs")

    def executor(self) -> int:
        """
        Process id of the one executor that runs. Blocks: up to Deadline.PROCESS_START.
        """
        return self._one("pillion_sidecar.executor.worker")

    def sidecar(self) -> int:
        """
        Process id of the one sidecar that runs. Blocks: up to Deadline.PROCESS_START.
        """
        return self._one("pillion_sidecar")

    def _one(self, module: str) -> int:
        found = deadlines.eventually(
            lambda: self._named(module), Deadline.PROCESS_START, f"one process of {module} runs"
        )
        assert len(found) == 1, found
        return found[0].pid

    def _named(self, module: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if leaks.carries(process, self._mark) and process.cmdline()[1:3] == ["-m", module]:
                    found.append(process)
        return found

    def keeps(self, runtime_dir: str) -> None:
        """The arena in this folder stays by design, as its newest snapshot is not on storage: the end removes it, whether its sidecar lives or not."""
        self._folders.add(runtime_dir)

    def end(self) -> None:
        """Ends everything: trainers by SIGKILL, sidecars by SIGTERM (they drain and remove their arena), then the folders of killed sidecars."""
        for process in self._named("pillion_sidecar.executor.worker"):
            # A test may have stopped it; a stopped one would hold up the drain.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        for opened in self._open:
            opened.close(timeout_s=Deadline.DRAINED.s)
        for trainer in self._started:
            if trainer.status is None:
                trainer.kill()
        sidecars = self._named("pillion_sidecar")
        for sidecar in sidecars:
            with contextlib.suppress(psutil.Error):
                arguments = sidecar.cmdline()
                # Between its fork and its exec a process has its parent's command line.
                if "--runtime-dir" in arguments:
                    self._folders.add(arguments[arguments.index("--runtime-dir") + 1])
                sidecar.terminate()
        psutil.wait_procs(sidecars, timeout=Deadline.DRAINED.s)
        leaks.end([process for process in psutil.process_iter() if leaks.carries(process, self._mark)])
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._stores.clear()


def _send(pipe: "Connection[Any, Any]", value: object) -> None:
    # A plain pickle: the pipe's own would hand tensors over as descriptors, which end with this process.
    pipe.send_bytes(pickle.dumps(value))


def _become(output: Path, variables: Mapping[str, str]) -> None:
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # A rank that hangs says where, well before the test gives it up.
    faulthandler.enable(file=sys.stderr)
    faulthandler.dump_traceback_later(Deadline.COMMITTED.s / 2, file=sys.stderr)
    os.environ.update(variables)
    torch.set_num_threads(1)


def _run(body: Body, peer: Peer, pipe: "Connection[Any, Any]") -> int:
    try:
        if peer.world_size > 1:
            store, rank, world_size = next(dist.rendezvous("env://"))
            # As examples/charlm/training.py join(): the store outlives a restart, gloo's addresses in it do not.
            turn = f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}.{os.environ[TURN_VARIABLE]}"
            dist.init_process_group("gloo", store=dist.PrefixStore(turn, store), rank=rank, world_size=world_size)
            _send(pipe, ("joined", None))
        value = body(peer)
        _send(pipe, ("returned", value))
    except BaseException:
        _send(pipe, ("error", traceback.format_exc()))
        return 1
    return 0


@pytest.fixture(scope="session")
def warm() -> None:
    """
    What torch makes once a process, made before any test looks at descriptors or forks: libuv's signal pipe, and the
    modules that torch imports late (seconds in each child, and importing them all is not safe behind a fork).
    """
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

    torch.set_num_threads(1)
    dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def ranks(warm: None, tmp_path_factory: pytest.TempPathFactory, nothing_left: str) -> Iterator[Ranks]:
    """
    Trainers and their sidecars for one test.
    """
    group = Ranks(tmp_path_factory.mktemp("ranks"), nothing_left)
    try:
        yield group
    finally:
        group.end()


# --- what tests do to what they started --------------------------------------------------------------------------------


def stop(pid: int) -> None:
    """
    SIGSTOP, and wait until the process has stopped: what it was to do next does not happen.
    """
    os.kill(pid, signal.SIGSTOP)
    deadlines.eventually(
        lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, Deadline.SETTLE, f"process {pid} has stopped"
    )


def go_on(pid: int) -> None:
    """
    SIGCONT.
    """
    os.kill(pid, signal.SIGCONT)


def status(of: checkpointer.Checkpointer) -> dict[str, Any]:
    """
    What the sidecar says of itself: metrics, executor_pid, saves.
    """
    return of._session.request(control.ReadStatus(), Deadline.REPLY.s).to_document()


def state_of(of: checkpointer.Checkpointer, step: int) -> str | None:
    """
    Return the state of the save of `step` in the sidecar. None if there is none.
    """
    return next((save["state"] for save in status(of)["saves"] if save["step"] == step), None)


def executor_of(of: checkpointer.Checkpointer) -> int:
    """
    Process id of the sidecar's executor, once it has one and is not at work on retention.
    """
    deadlines.eventually(lambda: not status(of)["retaining"], Deadline.SETTLE, "retention is done")
    pid = deadlines.eventually(
        lambda: status(of)["executor_pid"], Deadline.PROCESS_START, "the sidecar has an executor"
    )
    assert isinstance(pid, int)
    return pid


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """
    Flips one bit of a file in place.
    """
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def committed(root: Path) -> list[int]:
    """
    The steps that have a commit marker, ascending.
    """
    return sorted(int(path.parent.name.removeprefix("step-")) for path in root.glob("step-*/.metadata"))
