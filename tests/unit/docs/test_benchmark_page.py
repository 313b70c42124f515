"""
The whole of: the page and the picture of the benchmarks are of the records, and every missed goal is on the page for users.

Called from: pytest.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_benchmarks", ROOT / "tools" / "draw_benchmarks.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


draw = tool()


def line(measured: float = 1.0, **changes: Any) -> dict[str, Any]:
    goal: dict[str, Any] = {"goal": 1.1, "sense": "<=", "verdict": "met", "unit": "", "note": "", "samples": []}
    return {"what": "stall", "group": "stall", "measured": measured, **goal, **changes}


def record(name: str, *lines: dict[str, Any], busy: float = 0.0) -> Any:
    facts = {"date": name, "commit": "abc"}
    return draw.Record(name=name, facts=facts, busy={"stall": busy}, lines=lines)


def test_page_and_picture_are_of_the_records() -> None:
    """Who adds a record draws them again."""
    runs = draw.records()
    assert draw.PAGE.read_text(encoding="utf-8") == draw.page(runs)
    assert draw.PICTURE.read_text(encoding="utf-8") == draw.picture(runs)


def test_every_missed_goal_is_named_on_the_page_for_users() -> None:
    """docs/performance.md names what was missed in the newest record, in the words of the record."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    missed = [each["what"] for each in draw.records()[-1].lines if each["verdict"] == "MISSED"]
    assert [what for what in missed if what not in text] == []


def test_a_regression_stands_out() -> None:
    """The change since the record before is bold from a quarter on, in both directions; a new row has none."""
    before = record("1", line(1.0), line(1.0, what="other"))
    page = draw.page([before, record("2", line(1.3), line(1.1, what="other"), line(what="new"))])
    assert [
        row.split("|")[-2].strip() for row in page.splitlines() if row.startswith(("| stall", "| other", "| new"))
    ] == [
        "**1.30**",
        "1.10",
        "",
    ]


def test_a_record_of_a_busy_machine_says_so() -> None:
    """Nobody takes its numbers for those of a quiet one."""
    assert "**the machine was not quiet**" in draw.page([record("1", line(), busy=0.5)])
    assert "the machine was quiet" in draw.page([record("1", line(), busy=0.05)])


@pytest.mark.parametrize(
    ("sense", "value", "expected"), [("<=", 2.2, 2.0), (">=", 0.55, 2.0), ("<=", 1000.0, 10.0), (">=", 0.0, 10.0)]
)
def test_a_miss_is_on_the_right_of_the_goal_for_both_senses(sense: str, value: float, expected: float) -> None:
    """A ratio that should be small and one that should be large share one axis."""
    assert draw.of_goal(line(sense=sense), value) == pytest.approx(expected)


def test_the_picture_has_each_goal_of_each_record() -> None:
    """A dot for each record, and the name once."""
    drawn = draw.picture([record("1", line(1.0)), record("2", line(1.3, verdict="MISSED", samples=[1.2, 1.4]))])
    assert drawn.count("<circle") == 2
    assert drawn.count(">stall</text>") == 1
    assert draw.MISSED in drawn
