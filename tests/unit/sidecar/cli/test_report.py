"""
The whole of: what `pillion report` reads from a root, what it says of parts that nobody knows, and where it writes.

Called from: pytest.
"""

import json
from pathlib import Path

import pytest

from pillion_sidecar.checkpoint import milestones
from pillion_sidecar.cli import facts, main, page
from pillion_sidecar.cli.exits import Exit
from pillion_sidecar.run.journal import CLOSED, Attempt, Journal
from pillion_sidecar.storage.local import LocalFolder

S = 10**9
T0 = 1_700_000_000 * S


def attempt(number: int) -> Attempt:
    return Attempt(number=number, session="x", began_ns=T0, seen_ns=T0 + 10 * S)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0 ms"),
        (0.0849, "85 ms"),
        (12.34, "12.3 s"),
        (60, "1 min"),
        (754, "12 min 34 s"),
        (3600, "1 h"),
        (3900, "1 h 5 min"),
        (90000, "1 d 1 h"),
        (10 * 86400, "10 d"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds: float, said: str) -> None:
    """From milliseconds to days."""
    assert page.duration(seconds) == said


@pytest.mark.parametrize(
    ("numbers", "newest", "dropped", "texts"),
    [
        ((1, 2), 2, 0, []),
        ((1, 4), 4, 0, ["2 attempts between the first and the last one ended without a commit"]),
        ((3,), 3, 0, ["2 attempts before the first one left no facts"]),
        ((1,), 2, 0, ["1 attempt began after the last commit, and has committed nothing yet"]),
        ((3,), 3, 2, ["2 older ones are not on this page"]),
    ],
)
def test_attempts_without_facts_are_counted_by_their_numbers(
    numbers: tuple[int, ...], newest: int, dropped: int, texts: list[str]
) -> None:
    """An attempt without a commit writes nothing; its number on the root is taken all the same."""
    journal = Journal(attempts=tuple(map(attempt, numbers)), dropped=dropped)
    found = facts.missing(journal, newest, "")
    assert len(found) == len(texts)
    assert all(text in each for text, each in zip(texts, found, strict=True))


def test_the_newest_attempt_lives_until_its_last_sign_of_life() -> None:
    """Its last commit knows nothing of what came after; its record on the root does. That of another session says nothing of it."""
    journal = Journal(attempts=(attempt(4),))
    assert facts.until_now(journal, 4, T0 + 50 * S, left=True).attempts == (
        Attempt(number=4, session="x", began_ns=T0, seen_ns=T0 + 50 * S, ended=CLOSED),
    )
    assert facts.until_now(journal, 5, T0 + 50 * S, left=True) == journal
    assert facts.until_now(Journal(), 5, T0, left=False) == Journal()


def test_a_run_is_running_while_its_owner_gives_signs_of_life() -> None:
    """A run that has left has ended, however young the record is."""
    assert facts.state_of(T0, T0 + 10 * S, left=False) == facts.RUNNING
    assert facts.state_of(T0, T0 + 1000 * S, left=False) == facts.SILENT
    assert facts.state_of(T0, T0 + 10 * S, left=True) == facts.ENDED


def test_a_note_of_an_older_release_has_no_journal_and_the_page_says_so(tmp_path: Path) -> None:
    """The root tells what it has."""
    root = LocalFolder(str(tmp_path))
    assert "no note of a commit" in facts.gather(root, T0).missing[0]
    milestones.remember(root, 5, "1-0")
    assert "no journal" in facts.gather(root, T0).missing[0]
    (tmp_path / ".pillion" / "newest.json").write_text("{")
    assert "damaged" in facts.gather(root, T0).missing[0]


def test_a_commit_that_knows_no_journal_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    """A save that a later run finishes must not end the run's memory."""
    root = LocalFolder(str(tmp_path))
    kept = Journal(attempts=(attempt(1),)).to_document()
    milestones.remember(root, 5, "1-0", kept)
    milestones.remember(root, 6, "1-1")
    remembered = milestones.remembered(root)
    assert remembered is not None
    assert remembered[0] == 6
    assert milestones.journal_of(root) == json.loads(json.dumps(kept))


def test_the_page_replaces_no_file_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong argument after -o must not cost somebody a script."""
    script = tmp_path / "train.py"
    script.write_text("kept")
    assert main.main(["report", str(tmp_path), "-o", str(script)]) == Exit.USAGE
    assert "ends with .html or .json" in capsys.readouterr().err
    assert script.read_text() == "kept"


def test_a_folder_without_a_run_is_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And no page is written."""
    out = tmp_path / "page.html"
    assert main.main(["report", str(tmp_path), "-o", str(out)]) == Exit.FOUND
    assert "no journal of a run" in capsys.readouterr().err
    assert not out.exists()
