"""
The whole of: two pods of one rank each that do what a test says: their trainers, what they hold at a step, and what has to hold at the end.

Called from: test_matrix.py, test_stories.py.
Must never: break anything by itself.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch.distributed import checkpoint as stock

from pillion import checkpointer
from pillion.errors import LoadError, SaveError
from pillion.testing import faults
from pillion.wire import names
from process import ranks as processes
from process.ranks import Job, Peer, Ranks
from support import deadlines
from support.deadlines import Deadline
from support.matrix import Cell, Outcome
from support.network import Network
from support.store_host import StoreHost

PODS: Final = ("a", "b")
BOUNDS: Final = {
    "PILLION_PEER_TIMEOUT_S": "16",
    "PILLION_PERSIST_TIMEOUT_S": "24",
    "PILLION_PING_TIMEOUT_S": "2",
    "PILLION_STORAGE_TIMEOUT_S": "2",
    "PILLION_STORE_TIMEOUT_S": "2",
    "PILLION_LINGER_S": "60",
}
"""The product's own bounds, shortened: what is tested is that they hold, not how long they are."""
NUMEL: Final = 300_000
AGAIN: Final = 500
"""What a step that is saved again holds is that of a step so much later."""
CALLBACK_S: Final = 8.0


def values(step: int, rank: int) -> torch.Tensor:
    return torch.arange(NUMEL, dtype=torch.float32) + step * 3 + rank * 7


def state_of(step: int, rank: int, *, named: int | None = None) -> dict[str, Any]:
    """
    What a rank has at a step: weights, an optimizer's state under int keys, a random state of its own, a history that has grown.

    Args:
        named: the step that it says it is of; None: `step`.
    """
    return {
        f"weights{rank}": values(step, rank),
        f"optimizer{rank}": {
            "state": {0: {"exp_avg": values(step, rank)[:1000] / 2, "step": torch.tensor(float(step))}},
            "param_groups": [{"lr": 1.0 / (1 + step), "betas": (0.9, 0.999), "params": [0]}],
        },
        f"random{rank}": torch.Generator().manual_seed(step * 2 + rank).get_state(),
        f"log{rank}": "a row\n" * step,
        "step": step if named is None else named,
    }


def check_state(state: dict[str, Any], step: int, rank: int) -> None:
    wanted = state_of(step, rank)
    found = {name: state[name] for name in wanted}
    assert _flat(found) == _flat(wanted), f"rank {rank}: what was loaded is not step {step}"


def _flat(state: Any) -> Any:
    """With tensors as their bytes, so that two can be compared."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.numpy().tobytes()
    if isinstance(state, dict):
        return {key: _flat(value) for key, value in state.items()}
    return [_flat(each) for each in state] if isinstance(state, list) else state


def _fail(_: object) -> None:
    raise RuntimeError("the user's callback")


def train(peer: Peer) -> None:
    """A trainer that does what the test says, and says what came of it."""
    faults.arm()
    policy = {"retention": {"keepLast": 2}, "trigger": json.loads(os.environ.get("MATRIX_TRIGGER", "{}"))}
    with checkpointer.Checkpointer(os.environ["MATRIX_ROOT"], policy=policy) as opened:
        handles = {}
        while True:
            command, step = peer.hear()
            if command == "save":
                handles[step] = opened.save(state_of(step, peer.rank), step)
                handles[step].committed.add_done_callback(_fail)
                peer.tell("trains on")
            elif command == "result":
                try:
                    peer.tell(handles[step].result(Deadline.COMMITTED.s).step)
                except SaveError as err:
                    peer.tell(f"{type(err).__name__}: {err}")
                except Exception as err:
                    peer.tell(f"{type(err).__name__}: {err}")
            elif command == "again":
                # Another state than the committed one of this step.
                handles[step] = opened.save(state_of(step + AGAIN, peer.rank, named=step), step)
                peer.tell("trains on")
            elif command == "slow":
                handles[step].committed.add_done_callback(lambda _: time.sleep(CALLBACK_S))
                peer.tell("trains on")
            elif command == "fork":
                pid = os.fork()
                if pid == 0:
                    signal.pause()
                peer.tell(pid)
            elif command == "load":
                peer.tell(_load(opened, peer.rank, step or None))
            elif command == "pids":
                status = processes.status(opened)
                peer.tell((status["pid"], status["executor_pid"]))
            else:
                return


def _load(opened: checkpointer.Checkpointer, rank: int, step: int | None) -> Any:
    state = state_of(0, rank, named=-1)
    try:
        found = opened.load(state, step)
    except LoadError as err:
        return f"{type(err).__name__}: {err}"
    if found is None:
        return None
    check_state(state, found, rank)
    return found


@dataclass
class Scene:
    """One cell on its way."""

    cell: Cell
    ranks: Ranks
    root: Path
    folder: Path
    store: StoreHost
    job: Job
    network: Network | None

    def say(self, rank: int, command: str, step: int = 0) -> None:
        self.job[rank].say((command, step))

    def ask(self, rank: int, command: str, step: int = 0, deadline: Deadline = Deadline.COMMITTED) -> Any:
        self.say(rank, command, step)
        return self.job[rank].hear(deadline)

    def all(self, command: str, step: int = 0) -> list[Any]:
        for rank in range(len(PODS)):
            self.say(rank, command, step)
        return self.job.hear()

    def hit(self) -> faults.Hit:
        found = deadlines.eventually(
            lambda: faults.hits(self.folder), Deadline.COMMITTED, f"the fault of {self.cell.name} strikes"
        )
        return found[0]


def goes_on(scene: Scene) -> bool:
    """Whether the next save is committed; by the bounds a first one may still meet what the fault left."""
    return goes_on_from(scene, 3)


def goes_on_from(scene: Scene, first: int) -> bool:
    answers = []
    for step in range(first, first + 3):
        assert scene.all("save", step) == ["trains on"] * 2
        answers.append(scene.all("result", step))
        if answers[-1] == [step, step]:
            end(scene)
            return True
    print(answers)  # for whom the failure is shown
    return False


@contextlib.contextmanager
def successors(scene: Scene) -> Iterator[None]:
    """The trainers of the next attempt, with a store of their own, without faults: what restarts does not break again."""
    store = StoreHost()
    try:
        env = {"MATRIX_ROOT": str(scene.root), **BOUNDS, names.ENV_FAULTS: ""}
        scene.job = scene.ranks.start(train, num_ranks=2, pods=PODS, env=env, store=store, attempt=1)
        yield
    finally:
        store.end()


def lose_pods(scene: Scene) -> None:
    """The sidecars and their arenas go, as with their nodes."""
    for process in scene.ranks._named("pillion_sidecar"):
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            process.kill()
            folder = Path(arguments[arguments.index("--runtime-dir") + 1])
            psutil.wait_procs([process], timeout=Deadline.PROCESS_EXIT.s)
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def end(scene: Scene) -> None:
    for rank in (0, 1):
        scene.say(rank, "end")
    scene.job.finish(Deadline.DRAINED)


def is_committed(root: Path, step: int) -> bool:
    return (root / f"step-{step}" / ".metadata").exists()


def check_storage(root: Path, outcome: Outcome) -> None:
    """What is committed is loaded by stock DCP bit for bit, but for what storage lied about."""
    committed = processes.committed(root)
    assert committed, "the one before is there, or a newer one"
    for step in committed:
        if step == 2 and outcome is Outcome.REFUSED:
            continue
        state = state_of(0, 0, named=-1) | state_of(0, 1, named=-1)
        stock.load(state, checkpoint_id=root / f"step-{step}", no_dist=True)
        for rank in (0, 1):
            check_state(state, step, rank)
    leftovers = list(root.glob("**/*.tmp"))
    # A process that was killed in the middle of a rename leaves its temporary file; retention removes it with its directory.
    assert len(leftovers) <= 1, leftovers


def write_down(name: str, outcome: Outcome, elapsed_s: float) -> None:
    path = os.environ.get("PILLION_MATRIX_REPORT")
    if path:
        document = {"cell": name, "outcome": outcome.value, "elapsed_s": round(elapsed_s, 1)}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(document) + "\n")
