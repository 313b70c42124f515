"""
The whole of: the page of a run with a restart, recorded, so that a change of it is seen in review; and what any such page must be.

Called from: pytest. ``--update-golden`` writes the record anew.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

from pillion_sidecar.cli import inventory, page
from pillion_sidecar.cli.facts import ENDED, Facts
from pillion_sidecar.cli.style import STYLE
from pillion_sidecar.run import account
from pillion_sidecar.run.journal import CLOSED, DIED, Attempt, Journal, Load, Save
from pillion_sidecar.storage.local import LocalFolder

RECORD: Final = Path(__file__).parent / "page.html"
S: Final = 10**9
T0: Final = 1_700_000_000 * S
VOID: Final = {"meta", "rect", "line", "br"}
FETCHES: Final = {"script", "link", "img", "iframe", "object", "embed", "source", "base"}


def save(number: int, step: int, begin_s: float, stall_s: float) -> Save:
    began_ns = T0 + int(begin_s * S)
    return Save(
        number=number,
        step=step,
        began_ns=began_ns,
        committed_ns=began_ns + 6 * S,
        stall_s=stall_s,
        queued_s=0.01,
        persist_s=5.0,
        commit_s=0.5,
        bytes=40 * 1024**3,
        cause="Periodic",
    )


JOURNAL: Final = Journal(
    attempts=(
        Attempt(
            number=1,
            session="a",
            world_size=16,
            num_pods=2,
            began_ns=T0,
            seen_ns=T0 + 1000 * S,
            ended=DIED,
            loads=(Load(step=-1, tier="fresh", began_ns=T0 + S, ended_ns=T0 + 2 * S),),
            stalled_s=1.5,
            waited_s=0.5,
            saves=2,
            failed=1,
        ),
        Attempt(
            number=3,
            session="b",
            world_size=16,
            num_pods=2,
            began_ns=T0 + 1100 * S,
            seen_ns=T0 + 2000 * S,
            ended=CLOSED,
            loads=(
                Load(step=600, tier="storage", began_ns=T0 + 1110 * S, ended_ns=T0 + 1150 * S, saved_ns=T0 + 600 * S),
            ),
            stalled_s=2.0,
            saves=1,
        ),
    ),
    saves=(save(1, 300, 300, 0.7), save(1, 600, 600, 0.8), save(3, 900, 1500, 2.0)),
)


def facts(journal: Journal, *, root: str = "s3://bucket/<run>", missing: tuple[str, ...] = ()) -> Facts:
    step = inventory.Step(
        step=900,
        folder=LocalFolder("/nowhere/step-900"),
        state=inventory.State.COMMITTED,
        size_bytes=40 * 1024**3,
        saved_ns=T0 + 1506 * S,
        ranks=16,
        is_newest=True,
    )
    return Facts(root=root, now_ns=T0 + 3000 * S, journal=journal, steps=[step], state=ENDED, missing=missing)


def rendered(journal: Journal = JOURNAL, missing: tuple[str, ...] = ("1 attempt left no facts.",)) -> str:
    return page.render(facts(journal, missing=missing), account.of(journal))


class Reader(HTMLParser):
    """Checks that what is opened is closed, and keeps what is asked for elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.outside += [f"{tag} {name}" for name, _ in attributes if name in ("src", "href") or name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_the_recorded_one(update_golden: bool) -> None:
    """Without its style, which says nothing of a run."""
    text = rendered().replace(STYLE, "")
    if update_golden:
        RECORD.write_text(text)
    assert text == RECORD.read_text()


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """No script, no font, no picture: it can be mailed, and opened where there is no network."""
    reader = read(rendered())
    assert FETCHES.isdisjoint(reader.tags)
    assert reader.outside == []
    assert "url(" not in STYLE
    assert "@import" not in STYLE


def test_the_page_has_a_section_for_each_question() -> None:
    """In the order in which somebody asks them."""
    assert read(rendered()).ids == ["goodput", "timeline", "restarts", "saves", "points", "missing", "meaning"]


def test_a_run_without_a_journal_gets_its_checkpoints_and_what_is_missing() -> None:
    """Nothing is shown as zero that nobody knows."""
    text = rendered(Journal(), ("The run has no journal.",))
    assert read(text).ids == ["points", "missing", "meaning"]
    assert "The run has no journal." in text
    assert "goodput: share" not in text


def test_names_are_escaped() -> None:
    """A root's name is a user's text."""
    assert "&lt;run&gt;" in rendered()
    assert "<run>" not in rendered()


def test_the_numbers_of_the_restart_are_on_the_page() -> None:
    """400 s after the save of step 600 were lost, some 400 steps at one step a second, and 100 s had no trainer."""
    text = re.sub(r"<[^>]+>", " ", rendered())
    assert "6 min 40 s (some 400 steps)" in text
    assert "1 min 40 s" in text
    assert "step 600 from storage" in text
