"""
The whole of: docs/reference/events.md has the reasons that the operator writes, each in its section, and no other.

Called from: pytest.
Must never: list a reason by hand; they come from the code, so that a new one without a row fails here.
"""

import re
from pathlib import Path
from typing import Final

from pillion_operator.controller import commands, conditions, mirror
from pillion_operator.injection import reasons

PAGE: Final = (Path(__file__).parents[3] / "docs" / "reference" / "events.md").read_text()


def section(title: str) -> str:
    """The text below a heading."""
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def linked(text: str) -> set[str]:
    """The reasons that a text links to."""
    links = re.findall(r"\[(\w+)\]\(\.\./guide/troubleshooting/(\w+)\.md\)", text)
    assert all(shown == page for shown, page in links)
    return {shown for shown, _ in links}


def test_the_page_has_each_reason_of_an_admission() -> None:
    """Each reason is in the table, or in the line of those without an event."""
    table, _, silent = section("Events about a pod's admission").partition("No event:")
    assert linked(table).isdisjoint(linked(silent))
    assert linked(table) | linked(silent) == {each.value for each in reasons.Reason}


def test_the_page_has_each_reason_of_a_jobs_event() -> None:
    """Requests by annotation, commits, loads and failures."""
    assert linked(section("Events about a job")) == {each.value for each in commands.NoticeReason}


def test_the_page_has_each_condition_of_a_policy_and_its_reasons() -> None:
    """The conditions that turn into events, with all reasons that they can have."""
    text = section("Conditions of a CheckpointPolicy")
    kinds = (
        conditions.READY,
        conditions.STORAGE,
        conditions.DEGRADED,
        conditions.DRAIN,
        conditions.MEMORY,
        conditions.LOCAL,
        conditions.QUOTA,
    )
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) == list(kinds)
    assert linked(text) == {each.value for each in conditions.Reason}


def test_the_page_has_each_reason_of_a_checkpoint() -> None:
    """What the condition Ready of a Checkpoint object can have as its reason."""
    said = {each.value for each in commands.Reason} | {mirror.COMMITTED, mirror.REMOVED}
    assert linked(section("The condition Ready of a Checkpoint")) == said
