"""
The whole of: every link of every document of the repository leads to a file, and to a heading where it names one.

Called from: pytest.
Must never: open an address of another site.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[3]
IGNORED: Final = {
    ".venv",
    ".venv-frameworks",
    ".venv-oldest",
    ".venv-release",
    ".venv-wheels",
    ".git",
    "scratch",
    "node_modules",
    ".pytest_cache",
    ".hypothesis",
}
DOCUMENTS: Final = sorted(
    path for path in ROOT.rglob("*.md") if not IGNORED & set(path.relative_to(ROOT).parts) and path.is_file()
)


def prose(text: str) -> str:
    """A document without its code blocks, where a bracket is no link and a # no heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What a heading is linked by."""
    titles = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text: str) -> Iterator[str]:
    """Where a document's links go, other than to another site."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_leads_somewhere(document: Path) -> None:
    """A link to a file of the repository finds it, and one to a heading finds the heading."""
    dead = []
    for target in links(document.read_text()):
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        is_here = path.is_relative_to(ROOT.resolve()) and path.exists()
        if not is_here or (anchor and anchor not in anchors(path.read_text())):
            dead.append(target)
    assert dead == []
