"""
The whole of: that a root has one living owner: who is refused, who is let in, and how soon.

Called from: pytest.
"""

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillion.errors import UsageError
from pillion_sidecar.checkpoint import commit, ownership
from pillion_sidecar.checkpoint.ownership import Lease, Record, Verdict
from pillion_sidecar.session.state import State
from pillion_sidecar.storage.local import LocalFolder
from support import deadlines
from support.deadlines import Deadline

FIRST = Record(session="a" * 32, name="Job llm (pod team/llm-0)")
SECOND = Record(session="b" * 32, name="Job sweep (pod team/sweep-1)")
SILENT_S = 0.5
"""The product's bound, shortened."""


@pytest.mark.parametrize(
    ("record", "age_s", "verdict"),
    [
        (None, 0.0, Verdict.FREE),
        (FIRST, 0.0, Verdict.UNKNOWN),
        (dataclasses.replace(FIRST, draining=True), 0.0, Verdict.UNKNOWN),
        (dataclasses.replace(FIRST, left=True), 0.0, Verdict.FREE),
        (dataclasses.replace(FIRST, session="c" * 32), 0.0, Verdict.FREE),
        (FIRST, ownership.STALE_S - 1, Verdict.UNKNOWN),
        (FIRST, ownership.STALE_S + 1, Verdict.FREE),
        (FIRST, -3600.0, Verdict.UNKNOWN),
    ],
)
def test_a_record_says_whether_its_owner_can_be_succeeded_at_once(
    record: Record | None, age_s: float, verdict: Verdict
) -> None:
    """One that has left, that this pod has served, or that is stale; a clock that runs ahead proves nothing."""
    assert ownership.judge(record, served={"c" * 32}, age_s=age_s) is verdict


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Lease]:
    """The first session owns the root, and lives."""
    number, record = ownership.claim(LocalFolder(str(tmp_path)), FIRST, silent_s=SILENT_S)
    lease = Lease(
        LocalFolder(str(tmp_path)),
        number,
        record,
        beat_s=SILENT_S / ownership.BEATS_WITHIN_SILENCE,
        state=State.TRAINING,
    )
    yield lease
    lease.close()


def no_beats() -> bool:
    """No lease has a thread any more."""
    return "pillion-owner" not in {thread.name for thread in threading.enumerate()}


def say(lease: Lease, state: State) -> None:
    written = threading.Event()
    lease.change(state, written.set)
    assert written.wait(Deadline.SETTLE.s)


def test_a_second_training_is_refused_with_both_names_and_does_not_fence_the_first_off(
    tmp_path: Path, living: Lease
) -> None:
    """The first one goes on to commit; the second one has left nothing."""
    before = sorted(os.listdir(tmp_path / ".pillion" / commit.GENERATIONS))
    with pytest.raises(UsageError) as raised:
        ownership.claim(LocalFolder(str(tmp_path)), SECOND, silent_s=Deadline.SETTLE.s)
    assert FIRST.name in str(raised.value)
    assert SECOND.name in str(raised.value)
    commit.fence(LocalFolder(str(tmp_path)), 1)
    assert sorted(os.listdir(tmp_path / ".pillion" / commit.GENERATIONS)) == before


def test_an_owner_that_has_left_is_succeeded_at_once(tmp_path: Path, living: Lease) -> None:
    """Its bound is not waited for."""
    say(living, State.LEFT)
    begun = time.monotonic()
    assert ownership.claim(LocalFolder(str(tmp_path)), SECOND, silent_s=Deadline.SETTLE.s)[0] == 2
    assert time.monotonic() - begun < Deadline.SETTLE.s


def test_a_session_that_this_pod_has_served_is_succeeded_at_once_although_it_beats(
    tmp_path: Path, living: Lease
) -> None:
    """Its trainers have come back: the older attempt is fenced off."""
    assert (
        ownership.claim(LocalFolder(str(tmp_path)), SECOND, before=[FIRST.session], silent_s=Deadline.SETTLE.s)[0] == 2
    )


def test_an_owner_that_another_pod_of_the_job_has_served_is_succeeded(tmp_path: Path, living: Lease) -> None:
    """The coordinator is asked for the evidence once it is known to live."""
    asked: list[Record] = []

    def succeeds(owner: Record) -> bool:
        asked.append(owner)
        return True

    assert ownership.claim(LocalFolder(str(tmp_path)), SECOND, silent_s=Deadline.SETTLE.s, succeeds=succeeds)[0] == 2
    assert [owner.session for owner in asked] == [FIRST.session]


def test_an_owner_that_died_without_a_word_is_succeeded_at_its_bound(tmp_path: Path, living: Lease) -> None:
    """And not before."""
    living.close()
    deadlines.eventually(no_beats, Deadline.SETTLE, "its last beat is written")
    begun = time.monotonic()
    assert ownership.claim(LocalFolder(str(tmp_path)), SECOND, silent_s=SILENT_S)[0] == 2
    assert time.monotonic() - begun >= SILENT_S


def test_an_owner_whose_trainers_are_gone_is_waited_for_until_its_snapshot_is_on_storage(
    tmp_path: Path, living: Lease
) -> None:
    """Neither refused nor fenced off: the newest snapshot would be lost by it."""
    say(living, State.DRAINING)
    number: list[int] = []
    waiting = threading.Thread(
        target=lambda: number.append(ownership.claim(LocalFolder(str(tmp_path)), SECOND, silent_s=Deadline.SETTLE.s)[0])
    )
    waiting.start()
    waiting.join(SILENT_S)
    assert waiting.is_alive()
    commit.fence(LocalFolder(str(tmp_path)), 1)
    say(living, State.LEFT)
    waiting.join(Deadline.SETTLE.s)
    assert number == [2]


def test_of_many_that_come_at_once_each_gets_a_number_of_its_own_or_is_refused(tmp_path: Path) -> None:
    """Nobody fences off a session that has begun a moment before."""
    outcomes: list[int | str] = []

    def come(index: int) -> None:
        record = Record(session=f"{index:032x}", name=f"training {index}")
        try:
            number, made = ownership.claim(LocalFolder(str(tmp_path)), record, silent_s=Deadline.SETTLE.s)
        except UsageError as err:
            outcomes.append(str(err))
            return
        leases.append(Lease(LocalFolder(str(tmp_path)), number, made, beat_s=0.05, state=State.TRAINING))
        outcomes.append(number)

    leases: list[Lease] = []
    coming = [threading.Thread(target=come, args=(index,)) for index in range(4)]
    try:
        for each in coming:
            each.start()
        for each in coming:
            each.join(Deadline.COMMITTED.s)
    finally:
        for lease in leases:
            lease.close()
    assert len(outcomes) == 4
    assert [each for each in outcomes if isinstance(each, int)] == [1]
    assert all("which lives" in each for each in outcomes if isinstance(each, str))


def test_a_claim_file_of_an_older_release_and_a_damaged_record_own_nothing(tmp_path: Path) -> None:
    """The number after theirs is taken."""
    folder = tmp_path / ".pillion" / commit.GENERATIONS
    folder.mkdir(parents=True)
    (folder / "7").touch()
    assert ownership.claim(LocalFolder(str(tmp_path)), FIRST, silent_s=Deadline.SETTLE.s)[0] == 8
    (folder / "9").write_bytes(b"[" * 2000)
    assert ownership.claim(LocalFolder(str(tmp_path)), SECOND, silent_s=Deadline.SETTLE.s)[0] == 10


def test_all_sessions_of_a_root_have_one_line_and_an_emptied_root_has_another(tmp_path: Path) -> None:
    """Whatever a session was for, and also past a damaged record: what a node keeps for the root is told by it."""
    root = LocalFolder(str(tmp_path))
    folder = tmp_path / ".pillion" / commit.GENERATIONS
    lines = []
    for number in range(1, 5):
        claimed, record = ownership.claim(root, FIRST, silent_s=SILENT_S)
        assert claimed == number + (number > 3)
        lines.append(record.line)
        if number == 3:
            (folder / "4").write_bytes(b"damaged")
    assert lines[0] != ""
    assert lines == [lines[0]] * 4
    shutil.rmtree(tmp_path / ".pillion")
    assert ownership.claim(root, FIRST, silent_s=SILENT_S)[1].line not in ("", lines[0])


def test_a_pod_on_the_same_root_reads_the_nonce_back_and_one_on_another_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the other root has a record of the same number."""
    monkeypatch.setattr(ownership, "SHARED_WITHIN_S", 0.0)
    roots = [LocalFolder(str(tmp_path / name)) for name in ("one", "other")]
    claims = [ownership.claim(root, FIRST, silent_s=SILENT_S) for root in roots]
    assert [number for number, _ in claims] == [1, 1]
    nonces = [record.nonce for _, record in claims]
    shared = [[ownership.find_shared(root, 1, nonce) for nonce in nonces] for root in roots]
    assert shared == [[True, False], [False, True]]


def test_a_record_is_written_whole_whatever_it_holds(tmp_path: Path) -> None:
    """Names are cut and escaped, so that its length is always the same: a beat never leaves half of the one before."""
    for text in ("x", "\N{SNOWMAN}", "\\", '"', "\udcff", "\0"):
        long = text * 1000
        record = Record(session="a" * 32, name=long, root=long, owner=long, nonce="c" * 32, beats=2**62)
        assert len(record.encode()) == ownership.RECORD_BYTES
        found = Record.decode(record.encode())
        assert found is not None
        assert found.session == record.session


def test_a_root_says_whose_checkpoints_it_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job made again under its name goes on, and the log has both UIDs; a retry of one job says nothing; older records have no owner."""
    first = dataclasses.replace(FIRST, owner="Job llm (uid-1)", left=True)
    old = first.encode().replace(b'"owner": "Job llm (uid-1)", ', b"")
    assert Record.decode(old) == dataclasses.replace(first, owner="")
    for owner in ("Job llm (uid-1)", "Job llm (uid-1)", "Job llm (uid-2)"):
        ownership.claim(LocalFolder(str(tmp_path)), dataclasses.replace(first, owner=owner), silent_s=SILENT_S)
    said = [each.getMessage() for each in caplog.records if "continues from" in each.getMessage()]
    assert said == [f"{tmp_path} holds checkpoints of Job llm (uid-1): Job llm (uid-2) continues from them"]


def test_a_lease_ends_by_itself_when_a_newer_session_has_removed_its_record(tmp_path: Path, living: Lease) -> None:
    """Nothing of it comes back."""
    record = tmp_path / ".pillion" / commit.GENERATIONS / "1"
    record.unlink()
    deadlines.eventually(no_beats, Deadline.SETTLE, "the thread has ended")
    assert not record.exists()


def test_pods_whose_processes_have_one_number_do_not_trip_over_each_others_probe(tmp_path: Path) -> None:
    """In containers each pod's sidecar is process 1, and all look at the root when their trainers start."""
    problems: list[str] = []
    looking = [threading.Thread(target=lambda: problems.extend(LocalFolder(str(tmp_path)).check())) for _ in range(16)]
    for each in looking:
        each.start()
    for each in looking:
        each.join(Deadline.SETTLE.s)
    assert problems == []
    assert os.listdir(tmp_path / ".pillion") == []
