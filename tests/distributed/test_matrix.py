"""
The whole of: every phase of a save and a load, broken by every fault that fits, on real processes: two pods of one rank each.

Called from: pytest. `make test` runs a sample, `make matrix` (PILLION_MATRIX=all) every cell, `make test-filesystem` those that depend on the file system. PILLION_MATRIX_REPORT names a file for the results, one JSON line a cell, from which docs/reliability.md is made.
Must never: pass a cell whose fault did not strike.

Each cell: step 1 is committed; step 2 meets the fault; training goes on unless the trainer itself was killed; step 2 is committed or
absent, as the cell allows, within the bounds; then step 3 is committed, by the same trainers or, when one was killed, by their successors,
which first load the newest. In a rescue all trainers are killed before, and steps 1 and 2 are in memory only: step 2 is committed without
them, unless a supervisor is killed as well. What became of step 2 is compared with the letter in support/matrix_outcomes.txt, either way. Last, stock DCP loads whatever is committed, bit for bit, and nothing is left behind.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from distributed.scene import (
    BOUNDS,
    PODS,
    Scene,
    check_storage,
    end,
    goes_on,
    is_committed,
    lose_pods,
    successors,
    train,
    write_down,
)
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from pillion.testing.faults import Kind
from process import ranks as processes
from process.ranks import Ranks
from support import deadlines, matrix, network
from support.deadlines import Deadline
from support.matrix import Cell, Deed, Outcome, Where, Who
from support.network import Network
from support.store_host import StoreHost

INTERRUPTED_S: Final = 3.0
"""How long a link is interrupted: more than the store's bound, so that its pod may, or may not, have given the store up."""
RESUME_S: Final = 1.0
"""How long a stopped process stays stopped: less than the ping's bound for a trainer or supervisor."""


@pytest.fixture
def scene(request: pytest.FixtureRequest, ranks: Ranks, tmp_path: Path) -> Iterator[Scene]:
    cell: Cell = request.param
    folder, root = tmp_path / "faults", tmp_path / "runs"
    folder.mkdir()
    fault = faults.fail_at(
        rank=cell.rank,
        phase=cell.phase,
        fault=cell.kind,
        step=2 if cell.phase not in (FaultPoint.LOAD, FaultPoint.RESCUE) else None,
        times=cell.times,
        seconds=cell.seconds,
    )
    env = {"MATRIX_ROOT": str(root), **BOUNDS, **faults.to_environment(folder, [fault])}
    if cell.phase is FaultPoint.RESCUE:
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
CELLS: Final = matrix.selected(os.environ.get("PILLION_MATRIX", ""))


@pytest.mark.parametrize("scene", CELLS, ids=[cell.name for cell in CELLS], indirect=True)
def test_a_fault_at_a_phase_loses_nothing_and_stops_nothing(scene: Scene) -> None:
    """See the module."""
    begun = time.monotonic()
    cell = scene.cell
    assert scene.all("save", 1) == ["trains on"] * 2
    assert scene.all("result", 1) == [1, 1]
    before = scene.all("pids")
    break_it = {FaultPoint.LOAD: load_under_the_fault, FaultPoint.RESCUE: rescue_under_the_fault}
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
        # One pod is at this phase as soon as it has sealed: the other one's seal is a race with the deed, until its trainer trains on.
        staged(scene, (0, 1))
        do_deed(scene, before)
        faults.release(scene.folder)
    else:
        staged(scene, alive)
    told = [scene.ask(rank, "result", 2) for rank in alive]
    if cell.kills_a_trainer or cell.kind is Kind.FLIP:
        return restart(scene, told)
    # Whoever said that it is committed was right; a rank whose sidecar was killed cannot know.
    committed = is_committed(scene.root, 2)
    assert committed or 2 not in told, told
    assert goes_on(scene), told
    return Outcome.COMMITTED if is_committed(scene.root, 2) or committed else Outcome.ABSENT


def staged(scene: Scene, ranks: Sequence[int]) -> None:
    for rank in ranks:
        assert scene.job[rank].hear(Deadline.STAGED) == "trains on"


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


def restart(scene: Scene, told: list[Any]) -> Outcome:
    """The trainers end, as torchrun ends them; their successors load the newest that is whole, and save."""
    cell = scene.cell
    lost_pods = cell.kind is Kind.FLIP
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
