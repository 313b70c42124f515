"""
The whole of: every phase of a save and a load, broken by every fault that fits, on real processes: two pods of one rank each.

Called from: pytest. `make test` runs a sample, `make matrix` (PILLION_MATRIX=all) every cell. PILLION_MATRIX_REPORT names a file for the results, one JSON line a cell, from which docs/reliability.md is made.
Must never: pass a cell whose fault did not strike.

Each cell: step 1 is committed; step 2 meets the fault; training goes on unless the trainer itself was killed; step 2 is committed or
absent, as the cell allows, within the bounds; then step 3 is committed, by the same trainers or, when one was killed, by their successors,
which first load the newest. In a rescue all trainers are killed before, and steps 1 and 2 are in memory only: step 2 is committed without
them, unless a supervisor is killed as well. What became of step 2 is compared with the letter in support/matrix_outcomes.txt, either way. Last, stock DCP loads whatever is committed, bit for bit, and nothing is left behind.
"""

import contextlib
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import torch
from torch.distributed import checkpoint as stock

from pillion import checkpointer
from pillion.errors import LoadError, SaveError
from pillion.phases import Phase
from pillion.wire import names
from pillion_sidecar import faults
from pillion_sidecar.faults import Kind
from process import ranks as processes
from process.ranks import Job, Peer, Ranks
from support import deadlines, matrix, network
from support.deadlines import Deadline
from support.matrix import PERSISTENT, Cell, Deed, Outcome, Story, Where, Who
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
RESUME_S: Final = 1.0
"""How long a stopped process stays stopped: less than the ping's bound for a trainer or supervisor."""
AGAIN: Final = 500
"""What a step that is saved again holds is that of a step so much later."""
CALLBACK_S: Final = 8.0
SHORT_S: Final = 1.0
"""How long a process has no descriptor left: less than the tries of `operation.START_TRIES` take."""
SLOW_DELETION_S: Final = 6.0
INTERRUPTED_S: Final = 3.0
"""How long a link is interrupted: more than the store's bound, so that its pod may, or may not, have given the store up."""


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


@pytest.fixture
def scene(request: pytest.FixtureRequest, ranks: Ranks, tmp_path: Path) -> Iterator[Scene]:
    cell: Cell = request.param
    folder, root = tmp_path / "faults", tmp_path / "runs"
    folder.mkdir()
    fault = faults.fail_at(
        rank=cell.rank,
        phase=cell.phase,
        fault=cell.kind,
        step=2 if cell.phase not in (Phase.LOAD, Phase.RESCUE) else None,
        times=cell.times,
        seconds=cell.seconds,
    )
    env = {"MATRIX_ROOT": str(root), **BOUNDS, **faults.to_environment(folder, [fault])}
    if cell.phase is Phase.RESCUE:
        env["MATRIX_TRIGGER"] = json.dumps({"periodSteps": 1000, "snapshotSteps": 1})
    with contextlib.ExitStack() as stack:
        made = None
        if cell.who is Who.NETWORK:
            if absent := network.missing():
                pytest.skip(absent)
            made = Network(PODS)
            stack.callback(made.close)
            env["GLOO_SOCKET_IFNAME"] = network.INTERFACE
        store = StoreHost(made)
        stack.callback(store.end)
        stack.callback(faults.release, folder)
        namespaces = made.pods if made else None
        job = ranks.start(train, num_ranks=len(PODS), pods=PODS, env=env, store=store, namespaces=namespaces)
        yield Scene(cell, ranks, root, folder, store, job, made)


EXPECTED: Final = matrix.expected()
CELLS: Final = list(matrix.cells() if os.environ.get("PILLION_MATRIX") == "all" else matrix.sample())


@pytest.mark.parametrize("scene", CELLS, ids=[cell.name for cell in CELLS], indirect=True)
def test_a_fault_at_a_phase_loses_nothing_and_stops_nothing(scene: Scene) -> None:
    """See the module."""
    begun = time.monotonic()
    cell = scene.cell
    assert scene.all("save", 1) == ["trains on"] * 2
    assert scene.all("result", 1) == [1, 1]
    before = scene.all("pids")
    break_it = {Phase.LOAD: load_under_the_fault, Phase.RESCUE: rescue_under_the_fault}
    outcome = break_it.get(cell.phase, save_under_the_fault)(scene, before)
    assert outcome in EXPECTED[cell.name].outcomes, f"{cell.name}: {outcome}; see {matrix.OUTCOMES.name}"
    check_storage(scene.root, outcome)
    write_down(cell.name, outcome, time.monotonic() - begun)


def save_under_the_fault(scene: Scene, before: list[tuple[int, int]]) -> Outcome:
    cell = scene.cell
    alive = [rank for rank in (0, 1) if not (cell.kills_a_trainer and rank == victim_rank(cell))]
    for rank in (0, 1):
        scene.say(rank, "save", 2)
    hit = scene.hit()
    if cell.kind is Kind.SIGSTOP and cell.who is not Who.EXECUTOR:
        resume(hit.pid)
    if cell.deed is not Deed.NONE:
        do_deed(scene, before)
        faults.release(scene.folder)
    for rank in alive:
        assert scene.job[rank].hear(Deadline.STAGED) == "trains on"
    told = [scene.ask(rank, "result", 2) for rank in alive]
    if cell.kills_a_trainer or cell.kind in (Kind.CUT, Kind.FLIP):
        return restart(scene, told)
    # Whoever said that it is committed was right; a rank whose sidecar was killed cannot know.
    committed = is_committed(scene.root, 2)
    assert committed or 2 not in told, told
    assert goes_on(scene), told
    return Outcome.COMMITTED if is_committed(scene.root, 2) or committed else Outcome.ABSENT


def load_under_the_fault(scene: Scene, before: list[tuple[int, int]]) -> Outcome:
    cell = scene.cell
    for rank in (0, 1):
        scene.say(rank, "load")
    hit = scene.hit()
    if cell.deed is not Deed.NONE:
        do_deed(scene, before)
        faults.release(scene.folder)
    del hit
    told = scene.job.hear()
    # It loads, or says why not on every rank; then the next one does.
    if told != [1, 1]:
        # Whoever is cut off between the last rank's word and the verdict cannot know what the others know.
        assert cell.who is Who.NETWORK or all(isinstance(each, str) for each in told), told
        again = deadlines.eventually(
            lambda: (answers := scene.all("load")) == [1, 1] and answers, Deadline.LOADED, "the next load is well"
        )
        assert again == [1, 1], (told, again)
    assert goes_on(scene), told
    return Outcome.COMMITTED if told == [1, 1] else Outcome.ABSENT


def rescue_under_the_fault(scene: Scene, before: list[tuple[int, int]]) -> Outcome:
    cell = scene.cell
    assert scene.all("save", 2) == ["trains on"] * 2
    assert scene.all("result", 2) == [2, 2]
    assert processes.committed(scene.root) == []
    scene.job.kill()
    scene.hit()
    if cell.deed is not Deed.NONE:
        do_deed(scene, before)
        faults.release(scene.folder)
    if cell.who is not Who.SUPERVISOR:
        # Nobody but trainers starts a supervisor here; in a pod it is the kubelet.
        deadlines.eventually(lambda: is_committed(scene.root, 2), Deadline.DRAINED, "the sidecars persist step 2")
    if cell.who is Who.NETWORK:
        # Its successors would need it.
        return Outcome.COMMITTED
    with successors(scene):
        assert scene.all("load") == [2, 2]
        deadlines.eventually(lambda: is_committed(scene.root, 2), Deadline.DRAINED, "step 2 is on storage")
        assert goes_on(scene)
    return Outcome.COMMITTED


def victim_rank(cell: Cell) -> int:
    where = cell.of or cell.where
    return 0 if where is Where.COORDINATOR else 1


def resume(pid: int) -> None:
    process = psutil.Process(pid)
    deadlines.eventually(lambda: process.status() == psutil.STATUS_STOPPED, Deadline.SETTLE, f"{pid} has stopped")
    until = time.monotonic() + RESUME_S
    deadlines.eventually(lambda: time.monotonic() > until, Deadline.SETTLE, "it stays stopped for a while")
    os.kill(pid, signal.SIGCONT)


def do_deed(scene: Scene, before: list[tuple[int, int]]) -> None:
    cell = scene.cell
    rank = victim_rank(cell)
    supervisor, executor = before[rank]
    if cell.who is Who.STORE:
        if cell.deed is Deed.LOSE:
            scene.store.end()
        else:
            scene.store.stop()
    elif cell.who is Who.NETWORK:
        assert scene.network is not None
        scene.network.cut(PODS[rank])
        if cell.deed is Deed.INTERRUPT:
            threading.Timer(INTERRUPTED_S, scene.network.mend, (PODS[rank],)).start()
    elif cell.who is Who.TRAINER:
        scene.job[rank].kill()
    else:
        os.kill(supervisor if cell.who is Who.SUPERVISOR else executor, signal.SIGKILL)


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


def restart(scene: Scene, told: list[Any]) -> Outcome:
    """The trainers end, as torchrun ends them; their successors load the newest that is whole, and save."""
    cell = scene.cell
    lost_pods = cell.kind in (Kind.CUT, Kind.FLIP)
    for trainer in scene.job.trainers:
        if trainer.status is None:
            trainer.kill()
    if lost_pods:
        lose_pods(scene)
    with successors(scene):
        loaded = scene.all("load")
        assert loaded in ([1, 1], [2, 2]), loaded
        if lost_pods:
            assert loaded == [1, 1], "what storage lies about is refused"
            assert told == [2, 2]
            end(scene)
            return Outcome.REFUSED
        assert loaded == [2, 2] or 2 not in told, (told, loaded)
        committed = is_committed(scene.root, 2)
        assert goes_on(scene)
        return Outcome.COMMITTED if committed else Outcome.ABSENT


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


@pytest.fixture
def plain(ranks: Ranks, tmp_path: Path) -> Iterator[Scene]:
    """Two pods without a fault; a story makes its own."""
    folder, root = tmp_path / "faults", tmp_path / "runs"
    folder.mkdir()
    root.mkdir()
    store = StoreHost()
    with contextlib.ExitStack() as stack:
        stack.callback(store.end)
        stack.callback(faults.release, folder)
        # What a story asks of a scene that is no cell of its own.
        yield Scene(CELLS[0], ranks, root, folder, store, Job([], None), None)


STORIES: Final = (
    list(Story) if os.environ.get("PILLION_MATRIX") == "all" else [Story.AGAIN_REFUSED, Story.SHORT_SUPERVISOR]
)


@pytest.mark.parametrize("story", STORIES, ids=[story.value for story in STORIES])
def test_what_training_does_around_a_save_loses_nothing(plain: Scene, story: Story) -> None:
    """As a cell: what became of step 2 is as expected, what is committed is whole, and the next save is committed."""
    begun = time.monotonic()
    tell = {
        Story.AGAIN_REFUSED: again,
        Story.AGAIN_DIES: again,
        Story.FOREIGN: foreign,
        Story.SHORT_SUPERVISOR: short_supervisor,
        Story.SHORT_TRAINER: short_trainer,
        Story.FORKED: forked,
        Story.SLOW_RETENTION: slow_retention,
        Story.SLOW_CALLBACK: slow_callback,
    }[story]
    outcome = tell(plain, story)
    assert outcome in EXPECTED[story.value].outcomes, f"{story.value}: {outcome}"
    check_storage(plain.root, outcome)
    write_down(story.value, outcome, time.monotonic() - begun)


def begin(scene: Scene, *broken: faults.Fault, attempt: int = 0) -> None:
    """Trainers whose processes and sidecars meet these faults."""
    env = {"MATRIX_ROOT": str(scene.root), **BOUNDS, **faults.to_environment(scene.folder, broken)}
    scene.job = scene.ranks.start(train, num_ranks=2, pods=PODS, env=env, store=scene.store, attempt=attempt)


def saved(scene: Scene, step: int) -> None:
    assert scene.all("save", step) == ["trains on"] * 2
    assert scene.all("result", step) == [step, step]


def again(scene: Scene, story: Story) -> Outcome:
    begin(scene)
    saved(scene, 1)
    saved(scene, 2)
    end(scene)
    scene.ranks.alone()
    kind, times = (Kind.EIO, PERSISTENT) if story is Story.AGAIN_REFUSED else (Kind.SIGKILL, 2)
    begin(scene, faults.fail_at(rank=0, phase=Phase.WRITE, fault=kind, step=2, times=times), attempt=1)
    assert scene.all("load", 1) == [1, 1]
    assert scene.all("again", 2) == ["trains on"] * 2
    told = scene.all("result", 2)
    assert len(faults.hits(scene.folder)) == times
    assert all(isinstance(each, str) for each in told), told
    check_storage(scene.root, Outcome.ABSENT)
    assert is_committed(scene.root, 2), "the committed one is gone"
    assert goes_on(scene)
    return Outcome.ABSENT


def foreign(scene: Scene, _: Story) -> Outcome:
    files = [
        scene.root / each for each in ("README", "step-1/model.safetensors", "step-90/model.safetensors", "step-7")
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("somebody else's")
    begin(scene)
    for step in (1, 2, 3, 4):
        saved(scene, step)
    deadlines.eventually(lambda: not is_committed(scene.root, 1), Deadline.COMMITTED, "retention has removed step 1")
    assert goes_on_from(scene, 5)
    assert [file.read_text() for file in files] == ["somebody else's"] * len(files)
    return Outcome.COMMITTED


@contextlib.contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """The process has those that it has, and gets no more; for a while."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), before[1]))
    try:
        yield
        until = time.monotonic() + SHORT_S
        deadlines.eventually(lambda: time.monotonic() > until, Deadline.SETTLE, "it has none for a while")
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def short_supervisor(scene: Scene, _: Story) -> Outcome:
    begin(scene, faults.fail_at(rank=0, phase=Phase.WRITE, fault=Kind.HOLD, step=2))
    saved(scene, 1)
    supervisor, executor = scene.all("pids")[0]
    assert scene.all("save", 2) == ["trains on"] * 2
    deadlines.eventually(lambda: faults.hits(scene.folder), Deadline.COMMITTED, "step 2 is being written")
    with without_descriptors(supervisor):
        os.kill(executor, signal.SIGKILL)
    faults.release(scene.folder)
    assert scene.all("result", 2) == [2, 2]
    assert goes_on(scene)
    return Outcome.COMMITTED


def short_trainer(scene: Scene, _: Story) -> Outcome:
    begin(scene)
    saved(scene, 1)
    saved(scene, 2)
    supervisor, _ = scene.all("pids")[0]
    with without_descriptors(scene.job[0].pid):
        os.kill(supervisor, signal.SIGKILL)
    assert goes_on(scene)
    return Outcome.COMMITTED


def forked(scene: Scene, _: Story) -> Outcome:
    begin(scene)
    saved(scene, 1)
    saved(scene, 2)
    children = scene.all("fork")
    scene.job.kill()
    try:
        with successors(scene):
            assert scene.all("load") == [2, 2]
            assert goes_on(scene)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            # Orphans come to this process where it is the first of its pid namespace.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return Outcome.COMMITTED


def slow_retention(scene: Scene, _: Story) -> Outcome:
    begin(scene, faults.fail_at(rank=0, phase=Phase.RETAIN, fault=Kind.SLOW, step=2, seconds=SLOW_DELETION_S))
    saved(scene, 1)
    begun = time.monotonic()
    saved(scene, 2)
    assert time.monotonic() - begun < SLOW_DELETION_S, "the save waited for the deletion"
    assert goes_on(scene)
    return Outcome.COMMITTED


def slow_callback(scene: Scene, _: Story) -> Outcome:
    begin(scene)
    saved(scene, 1)
    assert scene.all("save", 2) == ["trains on"] * 2
    assert scene.all("slow", 2) == ["trains on"] * 2
    begun = time.monotonic()
    assert scene.all("result", 2) == [2, 2]
    saved(scene, 3)
    assert time.monotonic() - begun < CALLBACK_S, "a save waited for the callback"
    assert goes_on_from(scene, 4)
    return Outcome.COMMITTED


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
