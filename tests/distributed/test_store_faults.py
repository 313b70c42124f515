"""
The whole of: two pods of one rank each that share nothing but a bucket, whose store fails, hangs, loses answers, refuses, or loses objects
while they save and load.

Called from: pytest. `make test` runs the first of each kind, `make matrix` (PILLION_MATRIX=all) all of them.
Must never: pass a fault that did not strike.

Each fault of a save meets a step of its own, and has one letter, as the cells of the matrix have (`support.matrix.Outcome`): C, the step is
committed whole; A, both ranks have an error that names the URL, and the step is absent. Then a step without a fault is committed, at the end
stock DCP loads whatever is committed, bit for bit, and the store has no upload that nobody ended. Each fault of a load: C, the newest is
loaded; R, it is refused with the reason and the one before is loaded; A, an error on both ranks. "There is no checkpoint" is never said.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import pytest

from distributed.bucket_jobs import FOLDER, ask, check_bucket, finish, save, variables
from distributed.scene import PODS, train
from pillion.wire import names
from process.ranks import Job, Ranks
from support import deadlines
from support.deadlines import Deadline
from support.matrix import LETTERS, Outcome
from support.object_stores import behind
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.faults import Fault
from support.object_stores.operations import Only, Operation

PUT: Final = Operation.PUT
DATA: Final = r"/__\d+_\d+\..*\.distcp$"
PART: Final = r"/part-\d+\..*\.json$"
MANIFEST: Final = rf"/{re.escape(names.MANIFEST)}$"
MARKER: Final = rf"/{re.escape(names.COMMIT_MARKER)}$"


T = TypeVar("T")


def sampled(cases: Iterable[T]) -> list[T]:
    """
    All cases in `make matrix`, else the first one: each is a job of two pods, and takes a quarter of a minute or more.
    """
    every = list(cases)
    return every if os.environ.get("PILLION_MATRIX") == "all" else every[:1]


@dataclass(frozen=True, slots=True)
class Strike:
    """
    One fault of the store, and what becomes of the step that it meets.
    """

    name: str
    fault: Fault
    letter: str
    key: str = ""
    """A regular expression for the end of the key; empty: whatever is asked of the step's folder."""
    operation: Operation | None = None
    times: int | None = 1
    """None: until the step is over."""

    def only(self, step: int) -> Only:
        return Only(operation=self.operation, key=rf"^{FOLDER}/step-{step}(?=/|$).*{self.key}")

    @property
    def outcome(self) -> Outcome:
        return LETTERS[self.letter]


ANSWERS_LOST: Final = (
    Strike("lost-data", Fault.CUT_AFTER, "C", DATA, PUT),
    Strike("lost-manifest", Fault.CUT_AFTER, "C", MANIFEST, PUT),
    Strike("lost-marker", Fault.CUT_AFTER, "C", MARKER, PUT),
    Strike("failed-after-data", Fault.FAILED_AFTER, "C", DATA, PUT),
    Strike("failed-after-manifest", Fault.FAILED_AFTER, "C", MANIFEST, PUT),
    Strike("failed-after-marker", Fault.FAILED_AFTER, "C", MARKER, PUT),
)
WHAT_PASSES: Final = (
    Strike("storm-ends", Fault.SLOW_DOWN, "C", times=5),
    Strike("too-many-ends", Fault.TOO_MANY, "C", DATA, PUT, times=3),
    Strike("reset-data", Fault.CUT_BEFORE, "C", DATA, PUT),
    Strike("reset-marker", Fault.CUT_BEFORE, "C", MARKER, PUT),
    Strike("conflict-manifest", Fault.CONFLICT, "C", MANIFEST, PUT),
    Strike("conflict-marker", Fault.CONFLICT, "C", MARKER, PUT),
)
HANGS: Final = (
    Strike("hang-after-marker", Fault.HANG_AFTER, "C", MARKER, PUT),
    Strike("stall-data", Fault.STALL_UPLOAD, "A", DATA, PUT),
)
"""The bound of a document ends before the one for storage (here 20 s), that of bulk bytes after it."""
REFUSALS: Final = (
    Strike("expired", Fault.EXPIRED, "A", times=None),
    Strike("denied", Fault.DENIED, "A", DATA, PUT, times=None),
)
WHAT_STAYS: Final = (
    Strike("no-bucket", Fault.NO_BUCKET, "A", times=None),
    Strike("storm-stays", Fault.SLOW_DOWN, "A", times=None),
)
SAVES: Final = {
    "answers lost": ANSWERS_LOST,
    "what passes": WHAT_PASSES,
    "hangs": HANGS,
    "refusals": REFUSALS,
    "what stays": WHAT_STAYS,
}


@contextlib.contextmanager
def armed(proxy: FaultProxy, strike: Strike, step: int) -> Iterator[None]:
    """The fault, for as long as in ``with``; it has to strike."""
    waits = proxy.arm(strike.fault, strike.only(step), times=strike.times)
    try:
        yield
    finally:
        proxy.disarm()
        proxy.release()
    assert waits.struck, f"{strike.name} met no request: {[(each.method, each.key) for each in proxy.seen()][-20:]}"


@pytest.mark.parametrize("strikes", sampled(SAVES.values()), ids=sampled([name.replace(" ", "-") for name in SAVES]))
def test_a_fault_of_the_store_in_a_save_has_one_outcome(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path, strikes: tuple[Strike, ...]
) -> None:
    """See the module."""
    job = ranks.start(train, num_ranks=len(PODS), pods=PODS, env=variables(s3_proxy))
    assert save(job, 1) == [1, 1]
    step = 1
    for strike in strikes:
        step += 1
        with armed(s3_proxy, strike, step):
            told = save(job, step)
        committed = step in behind.committed(s3_proxy.place, FOLDER)
        assert committed == (strike.outcome is Outcome.COMMITTED), f"{strike.name}: {told}"
        if committed:
            assert told == [step, step], f"{strike.name}: {told}"
        else:
            print(strike.name, told)
            assert all(f"{s3_proxy.place.url}/{FOLDER}" in text for text in told), f"{strike.name}: {told}"
            step += 1
            assert save(job, step) == [step, step], f"after {strike.name}"
    finish(job)
    check_bucket(s3_proxy, tmp_path)


FULL: Final = (
    Strike("quota", Fault.QUOTA, "C", DATA, PUT, times=None),
    # The client itself repeats a 507, for 30 s in a small document.
    Strike("no-space", Fault.FULL, "C", PART, PUT, times=None),
)


@pytest.mark.parametrize("strike", sampled(FULL), ids=sampled([strike.name for strike in FULL]))
def test_a_full_bucket_gets_room_from_the_checkpoints_that_the_policy_removes_next(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path, strike: Strike
) -> None:
    """It is full until the oldest checkpoint is removed; then the save that met it is committed. No other checkpoint is lost for it."""
    bounds = {"PILLION_STORAGE_TIMEOUT_S": "120", "PILLION_PERSIST_TIMEOUT_S": "240", "PILLION_PING_TIMEOUT_S": "30"}
    job = ranks.start(train, num_ranks=len(PODS), pods=PODS, env=variables(s3_proxy) | bounds)
    for step in (1, 2, 3):
        assert save(job, step) == [step, step]
    place = s3_proxy.place
    deadlines.eventually(lambda: behind.committed(place, FOLDER) == [2, 3], Deadline.COMMITTED, "step 1 is removed")
    waits = s3_proxy.arm(strike.fault, strike.only(4), times=None)
    assert ask(job, "save", 4) == ["trains on"] * len(PODS)
    deadlines.eventually(lambda: waits.struck, Deadline.COMMITTED, "the bucket is full")
    deadlines.eventually(lambda: behind.committed(place, FOLDER) == [3], Deadline.COMMITTED, "room is made")
    s3_proxy.disarm()
    assert ask(job, "result", 4) == [4, 4]
    assert behind.committed(place, FOLDER) == [3, 4]
    finish(job)
    check_bucket(s3_proxy, tmp_path)


@pytest.mark.skipif(
    os.environ.get("PILLION_MATRIX") != "all", reason="a part of make matrix: the tries of a save take a minute"
)
def test_a_bucket_that_stays_full_is_an_error_that_says_so_and_training_goes_on(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    """With the URL and the store's word; the last checkpoint stays, and the next save is well when there is room."""
    job = ranks.start(train, num_ranks=len(PODS), pods=PODS, env=variables(s3_proxy) | {"PILLION_PING_TIMEOUT_S": "30"})
    assert save(job, 1) == [1, 1]
    s3_proxy.arm(Fault.QUOTA, Only(operation=PUT, key=rf"^{FOLDER}/step-2/"), times=None)
    told = save(job, 2)
    s3_proxy.disarm()
    assert all(f"{s3_proxy.place.url}/{FOLDER}" in text and "QuotaExceeded" in text for text in told), told
    assert behind.committed(s3_proxy.place, FOLDER) == [1]
    assert save(job, 3) == [3, 3]
    finish(job)
    check_bucket(s3_proxy, tmp_path)


LOADS: Final = (
    Strike("answer-cut", Fault.TRUNCATE, "C", DATA, Operation.GET),
    Strike("bits-flip", Fault.FLIP, "R", DATA, Operation.GET, times=None),
    Strike("hang", Fault.HANG, "C", DATA, Operation.GET),
    Strike("storm-ends", Fault.SLOW_DOWN, "C", times=5),
)
ROOT_LOADS: Final = (
    Strike("storm-stays", Fault.SLOW_DOWN, "A", times=None),
    Strike("expired", Fault.EXPIRED, "A", times=None),
    Strike("no-bucket", Fault.NO_BUCKET, "A", times=None),
)
"""Of these every request is struck, so that nobody sees any checkpoint."""


@pytest.fixture
def two_steps(ranks: Ranks, s3_proxy: FaultProxy) -> Iterator[Job]:
    """Steps 1 and 2 are in the bucket and nowhere else; the next trainers wait to be told to load."""
    job = ranks.start(train, num_ranks=len(PODS), pods=PODS, env=variables(s3_proxy))
    for step in (1, 2):
        assert save(job, step) == [step, step]
    finish(job)
    ranks.alone()
    assert behind.committed(s3_proxy.place, FOLDER) == [1, 2]
    job = ranks.start(train, num_ranks=len(PODS), pods=PODS, env=variables(s3_proxy), attempt=1)
    assert all(ask(job, "pids"))
    # The session is open: both pods have read the record that says who owns the root. A fault before that is one of the start.
    record = Only(operation=Operation.GET, key=r"/generations/2$")
    deadlines.eventually(lambda: len(s3_proxy.seen(record)) >= len(PODS), Deadline.LOADED, "both pods know the session")
    # Without the store that this process hosts: pytest holds a fixture's value until it has looked at what is left.
    trainers = job.trainers
    del job
    yield Job(trainers, None)
    s3_proxy.disarm()
    assert behind.unended_uploads(s3_proxy.place) == []


@pytest.mark.parametrize("strike", sampled(LOADS), ids=sampled([strike.name for strike in LOADS]))
def test_a_fault_of_the_store_in_a_load_has_one_outcome(two_steps: Job, s3_proxy: FaultProxy, strike: Strike) -> None:
    """See the module."""
    with armed(s3_proxy, strike, 2):
        told = ask(two_steps, "load")
    assert told == ([2, 2] if strike.outcome is Outcome.COMMITTED else [1, 1])
    finish(two_steps)


@pytest.mark.parametrize("strike", sampled(ROOT_LOADS[::-1]), ids=sampled([strike.name for strike in ROOT_LOADS[::-1]]))
def test_a_store_that_cannot_be_asked_is_an_error_of_the_load_and_the_next_load_is_well(
    two_steps: Job, s3_proxy: FaultProxy, strike: Strike
) -> None:
    """Nobody begins anew because a listing failed."""
    waits = s3_proxy.arm(strike.fault, times=None)
    told = ask(two_steps, "load")
    s3_proxy.disarm()
    assert waits.struck
    assert all(isinstance(text, str) and f"{s3_proxy.place.url}/{FOLDER}" in text for text in told), told
    print(strike.name, told)
    deadlines.eventually(lambda: ask(two_steps, "load") == [2, 2], Deadline.LOADED, "the next load is well")
    finish(two_steps)


@pytest.mark.parametrize("done", sampled(["removed", "truncated"]))
def test_a_newest_checkpoint_that_has_lost_bytes_is_refused_and_the_one_before_loaded(
    ranks: Ranks, two_steps: Job, s3_proxy: FaultProxy, done: str
) -> None:
    """As a lifecycle rule removes objects, or a store that lies; the log says which object."""
    client = s3_proxy.place.client()
    [name, *_] = [each for each in behind.files(s3_proxy.place, FOLDER) if each.startswith("step-2/__1_")]
    key = f"{FOLDER}/{name}"
    if done == "removed":
        client.delete(key)
    else:
        data = client.get(key).bytes()
        client.put(key, bytes(data)[: len(data) // 2])
    assert ask(two_steps, "load") == [1, 1]
    finish(two_steps)
    ranks.alone()
    log = bytes(client.get(f"{FOLDER}/.pillion/sidecar-0.log").bytes()).decode()
    assert any("refused the checkpoint" in line and name.rpartition("/")[2] in line for line in log.splitlines()), log
