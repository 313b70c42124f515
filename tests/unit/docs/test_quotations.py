"""
The whole of: the messages that the guide lists for people who search for them are messages of the code.

Called from: pytest.
Must never: hold a message by hand; they come from the tables of the guide.
"""

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[3]
GUIDE: Final = ROOT / "docs" / "guide"
TABLES: Final = {
    "training.md": "## When something is wrong",
    "troubleshooting/LoadError.md": "## What it means",
    "troubleshooting/StagingError.md": "## What it means",
}
"""Page -> what its table of messages stands behind."""
SHORTEST: Final = 8
"""Characters of a piece between two variable parts that are compared: a shorter one is in any text."""
PYTHONS: Final = "OSError: "
"""What begins the messages of the operating system."""


def sources() -> str:
    """The code of client and sidecar, with each message in one piece, and its variable parts as three dots."""
    folders = (ROOT / "client" / "src", ROOT / "sidecar" / "src")
    text = "\n".join(path.read_text() for folder in folders for path in sorted(folder.rglob("*.py")))
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def quoted(page: str, behind: str) -> list[str]:
    """The messages in the first column of a table."""
    section = (GUIDE / page).read_text().partition(behind)[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \|", section, flags=re.MULTILINE)
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("page", TABLES)
def test_each_message_of_the_guide_is_one_of_the_code(page: str) -> None:
    """Dots, numbers and names in a quotation stand for what differs; each piece between them is in the code."""
    code, found = sources(), quoted(page, TABLES[page])
    assert found
    pieces = {text: [each.strip() for each in re.split(r"\.\.\.|\d+|'", text)] for text in found}
    assert [
        text
        for text, each in pieces.items()
        if not text.startswith(PYTHONS) and not all(piece in code for piece in each if len(piece) >= SHORTEST)
    ] == []
