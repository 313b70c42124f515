"""
The whole of: what training code does around a save, and what happens to it, as stories of two pods of one rank each: a step is saved again
while storage refuses or executors die, strangers' files lie in the way, descriptors run out, a child is forked, a deletion or a callback is
slow.

Called from: pytest. `make test` runs some, `make matrix` (PILLION_MATRIX=all) all; what became of step 2 is compared with its letter in
support/matrix_outcomes.txt.
Must never: pass a story in which nothing happened.
"""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from distributed.scene import (
    BOUNDS,
    CALLBACK_S,
    PODS,
    Scene,
    check_storage,
    end,
    goes_on,
    goes_on_from,
    is_committed,
    successors,
    train,
    write_down,
)
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from pillion.testing.faults import Kind
from process.ranks import Job, Ranks
from support import deadlines, matrix
from support.deadlines import Deadline
from support.matrix import PERSISTENT, Outcome, Story
from support.store_host import StoreHost

SHORT_S: Final = 1.0
"""How long a process has no descriptor left: less than the tries of `supervisor.executor_client.START_TRIES` take."""
SLOW_DELETION_S: Final = 6.0


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
        yield Scene(next(matrix.cells()), ranks, root, folder, store, Job([], None), None)


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
    assert outcome in matrix.expected()[story.value].outcomes, f"{story.value}: {outcome}"
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
    begin(scene, faults.fail_at(rank=0, phase=FaultPoint.WRITE, fault=kind, step=2, times=times), attempt=1)
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
    begin(scene, faults.fail_at(rank=0, phase=FaultPoint.WRITE, fault=Kind.HOLD, step=2))
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
    begin(scene, faults.fail_at(rank=0, phase=FaultPoint.RETAIN, fault=Kind.SLOW, step=2, seconds=SLOW_DELETION_S))
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
