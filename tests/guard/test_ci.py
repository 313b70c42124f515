"""
That `.ci/run`, which divides the tests between lanes, leaves no level out.

Called from: pytest.
"""

import re
from pathlib import Path
from typing import Final

import conftest

RUN: Final = Path(__file__).parents[2] / ".ci" / "run"
ELSEWHERE: Final = {"frameworks", "cluster"}
"""Levels that have commands of their own, which it runs too."""


def test_each_level_is_in_one_lane() -> None:
    """What is in none would run nowhere, and what is in both would run twice."""
    text = RUN.read_text(encoding="utf-8")
    lanes = [re.findall(r"tests/(\w+)", found) for found in re.findall(r'^readonly \w+="([^"]*)"', text, re.MULTILINE)]
    assert len(lanes) == 3
    assert sorted(level for lane in lanes for level in lane) == sorted(set(conftest.LEVELS) - ELSEWHERE)
    for target in ("test-frameworks", "test-cluster", "test-filesystem", "check"):
        assert f"make --no-print-directory {target}" in text
