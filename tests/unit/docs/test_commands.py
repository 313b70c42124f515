"""
The whole of: the commands of this repository that documents name exist.

Called from: pytest.
Must never: run one of them.
"""

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[3]
TARGETS: Final = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
DOCUMENTS: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests" / "README.md"])


def commands(text: str) -> str:
    """What a document shows as code."""
    return "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_make_target_exists(document: Path) -> None:
    """`make name` in a document is a target of the Makefile."""
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", commands(document.read_text()), flags=re.MULTILINE))
    assert named - TARGETS == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_program_of_the_repository_exists(document: Path) -> None:
    """A script that a document runs with Python, or names by its path in a folder of programs, is there."""
    named = re.findall(r"\b((?:tools|benchmarks|examples|tests)/[\w/.-]+\.(?:py|yaml|txt))\b", document.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []
