"""
The whole of: what a sidecar writes down of its trainers for the run's journal, and what it makes of a journal that is there.

Called from: pytest.
"""

from dataclasses import replace

import pytest

from pillion_sidecar.run import journal
from pillion_sidecar.run.journal import Attempt, Journal, Save
from pillion_sidecar.run.ledger import Ledger

S = 10**9


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger(clock)


def begin(ledger: Ledger, session: str = "a") -> None:
    ledger.begin(session, world_size=4, num_pods=2, coordinator=True)


def read(ledger: Ledger) -> Journal:
    found = ledger.journal()
    assert found is not None
    return found


def test_nothing_is_written_before_the_session_owns_the_root(ledger: Ledger) -> None:
    """Else an attempt would overwrite the journal of the attempts before it."""
    begin(ledger)
    assert ledger.journal() is None
    assert ledger.pending(Save(number=0, step=1, began_ns=1)) is None
    ledger.opened("a", 1, None, 0)
    assert ledger.pending(Save(number=0, step=1, began_ns=1)) is not None


def test_reading_the_journal_changes_nothing(ledger: Ledger, clock: Clock) -> None:
    """The thread of the metrics endpoint reads it while the event loop writes: a change there could undo one of the loop."""
    begin(ledger)
    ledger.opened("a", 1, None, 0)
    before = ledger._now
    clock.now_s += 5
    assert read(ledger).attempts[-1].seen_ns == int(1005 * 1e9)
    assert ledger._now is before


def test_only_the_pod_of_rank_0_writes(ledger: Ledger) -> None:
    """The journal has one writer."""
    ledger.begin("a", world_size=4, num_pods=2, coordinator=False)
    ledger.opened("a", 1, None, 0)
    assert ledger.pending(Save(number=0, step=1, began_ns=1)) is None


def test_the_facts_of_an_attempt_are_counted(ledger: Ledger, clock: Clock) -> None:
    """Stalls without the wait for a slot, the wait, loads, failures, and committed saves with their time to the commit."""
    begin(ledger)
    ledger.opened("a", 1, None, 0)
    ledger.loading()
    clock.now_s += 5
    ledger.loaded(7, "storage", 3 * S, refused=1)
    ledger.stalled(2.0, 0.5)
    ledger.stalled(1.0, 4.0)  # a wait is never more than what it held up
    ledger.failed()
    ledger.dropped()
    ledger.snapshot()
    ledger.committed(
        Save(number=0, step=8, began_ns=9, committed_ns=10, bytes=100, queued_s=0.5, persist_s=1.0, commit_s=0.25)
    )
    clock.now_s += 5
    (only,) = read(ledger).attempts
    assert (only.began_ns, only.seen_ns) == (1000 * S, 1010 * S)
    assert (only.stalled_s, only.waited_s) == (1.5, 1.5)
    assert (only.failed, only.dropped, only.snapshots, only.refused) == (1, 1, 1, 1)
    assert (only.saves, only.bytes, only.persist_s) == (1, 100, 1.75)
    assert [(each.step, each.began_ns, each.ended_ns, each.saved_ns) for each in only.loads] == [
        (7, 1000 * S, 1005 * S, 3 * S)
    ]
    assert [(each.number, each.step) for each in read(ledger).saves] == [(1, 8)]


def test_the_end_is_when_the_first_trainer_ended_and_not_when_somebody_asks(ledger: Ledger, clock: Clock) -> None:
    """A sidecar outlives its trainers by the drain of their last snapshot, and the commit of that one writes the journal."""
    begin(ledger)
    ledger.opened("a", 1, None, 0)
    clock.now_s += 10
    ledger.ended(journal.DIED)
    clock.now_s += 10
    ledger.ended(journal.CLOSED)
    (only,) = read(ledger).attempts
    assert (only.ended, only.seen_ns) == (journal.DIED, 1010 * S)


def test_the_next_session_of_a_sidecar_has_the_one_before_in_its_journal(ledger: Ledger, clock: Clock) -> None:
    """Also where that one's end came after its last commit, so that the root does not know it."""
    begin(ledger)
    ledger.opened("a", 4, None, 0)
    on_root = read(ledger).to_document()
    clock.now_s += 10
    ledger.ended(journal.DIED)
    clock.now_s += 10
    begin(ledger, "b")
    ledger.opened("b", 5, on_root, 0)
    first, second = read(ledger).attempts
    assert (first.number, first.ended, first.seen_ns) == (4, journal.DIED, 1010 * S)
    assert (second.number, second.began_ns) == (5, 1020 * S)


def test_the_end_of_an_attempt_whose_sidecar_is_gone_is_its_last_sign_of_life(ledger: Ledger) -> None:
    """Its record on the root has a later time than its last commit."""
    lost = Attempt(number=4, session="lost", began_ns=100 * S, seen_ns=200 * S)
    begin(ledger)
    ledger.opened("a", 5, Journal(attempts=(lost,)).to_document(), 250 * S)
    assert read(ledger).attempts[0].seen_ns == 250 * S
    again = Ledger(lambda: 1000.0)
    begin(again)
    # The record is of session 5, without a commit: it says nothing of number 4.
    again.opened("a", 6, Journal(attempts=(lost,)).to_document(), 250 * S)
    assert read(again).attempts[0].seen_ns == 200 * S


def test_a_restarted_sidecar_goes_on_with_its_attempt(ledger: Ledger) -> None:
    """The sums of the earlier sidecar are on the root; what this one has seen since is added."""
    own = Attempt(number=4, session="a", began_ns=100 * S, seen_ns=200 * S, stalled_s=2.0, saves=3)
    begin(ledger)
    ledger.stalled(1.0, 0.0)
    ledger.opened("a", 4, Journal(attempts=(own,)).to_document(), 0)
    (only,) = read(ledger).attempts
    assert (only.began_ns, only.stalled_s, only.saves) == (100 * S, 3.0, 3)


def test_a_damaged_journal_is_left_behind(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Training never stops for it: the journal begins again, and the log says so."""
    begin(ledger)
    ledger.opened("a", 2, {"attempts": 7}, 0)
    assert len(read(ledger).attempts) == 1
    assert "journal" in caplog.text


def test_the_executor_completes_the_save_that_is_being_committed() -> None:
    """It alone knows when, and it writes the journal with the commit: also the last save of a run has its times."""
    ledger = Ledger(lambda: 1000.0)
    begin(ledger)
    ledger.opened("a", 1, None, 0)
    pending = ledger.pending(Save(number=0, step=5, began_ns=10, queued_s=0.5))
    assert pending is not None
    document = journal.committed(pending, 5, now_ns=20, size_bytes=100, persist_s=1.0, commit_s=0.25)
    written = journal.read(document)
    (save,) = written.saves
    assert (save.number, save.committed_ns, save.bytes, save.persist_s, save.commit_s) == (1, 20, 100, 1.0, 0.25)
    assert (written.attempts[0].saves, written.attempts[0].bytes, written.attempts[0].persist_s) == (1, 100, 1.75)


def test_a_journal_is_bounded() -> None:
    """The newest attempts and saves stay, and the dropped attempts are counted."""
    full = Journal()
    for number in range(1, journal.MAX_ATTEMPTS + 4):
        full = journal.with_attempt(full, Attempt(number=number, session="x" * 32, began_ns=1, seen_ns=2))
        for step in range(4):
            full = journal.with_save(full, Save(number=number, step=step, began_ns=number * 10 + step, committed_ns=9))
    assert (len(full.attempts), full.dropped) == (journal.MAX_ATTEMPTS, 3)
    assert len(full.saves) == journal.MAX_SAVES
    assert full.attempts[-1].number == journal.MAX_ATTEMPTS + 3
    same = journal.with_attempt(full, replace(full.attempts[-1], saves=9))
    assert len(same.attempts) == journal.MAX_ATTEMPTS
    assert journal.read(same.to_document()) == same
