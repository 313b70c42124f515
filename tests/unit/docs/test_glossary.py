"""
The whole of: that the glossary's terms are unique, and that the places which it names exist.

Called from: pytest.
"""

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[3]
ROWS: Final = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| term |")
]


def test_a_term_means_one_thing() -> None:
    """A word that two rows explain is two words."""
    terms = [row[0] for row in ROWS]
    assert len(terms) > 30
    assert sorted(set(terms)) == sorted(terms)


def test_each_term_says_where_it_lives() -> None:
    """Files move; a reader who follows the glossary finds one."""
    absent = [row[0] for row in ROWS if not (ROOT / re.sub("`", "", row[2])).exists()]
    assert absent == []


def test_the_index_of_the_documentation_leads_to_pages_that_exist() -> None:
    """So do its links, and every page is in it, but those that have an index of their own."""
    folder = ROOT / "docs"
    links = re.findall(r"\]\(([^)#]+)\)", (folder / "README.md").read_text())
    assert [link for link in links if not (folder / link).exists()] == []
    listed = {(folder / link).resolve() for link in links}
    pages = {page for page in folder.rglob("*.md") if not {"decisions", "records", "troubleshooting"} & set(page.parts)}
    assert sorted(str(page) for page in pages - listed if page.name != "README.md") == []
