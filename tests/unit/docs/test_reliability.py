"""
The whole of: the matrix's expected outcomes, its cells, and the table of docs/records/matrix.md say the same.

Called from: pytest.
"""

from pathlib import Path
from typing import Final

from support import matrix
from support.matrix import Cell

PAGE: Final = Path(__file__).parents[3] / "docs" / "records" / "matrix.md"
LETTERS: Final = {letter.lower() if letter == "A" else letter: outcome for letter, outcome in matrix.LETTERS.items()}
"""As the page has them."""


def table() -> dict[tuple[str, str], list[str]]:
    """The letters of the page, by row and phase."""
    part = PAGE.read_text(encoding="utf-8").split("<!-- matrix: generated -->")[1].split("<!-- matrix: end -->")[0]
    part = part.split("| story |")[0]
    head, _, *rows = [
        [each.strip() for each in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
    ]
    return {(row[0], phase): letters.split() for row in rows for phase, letters in zip(head[1:], row[1:], strict=True)}


def test_every_cell_has_one_expected_outcome_or_a_reason_for_two() -> None:
    """A cell that went from committed to absent would pass a set that holds both; no line is of a cell that is gone."""
    names = [cell.name for cell in matrix.cells()] + [story.value for story in matrix.Story]
    found = matrix.expected()
    assert sorted(names) == sorted(found)
    assert [name for name, each in found.items() if (len(each.outcomes) > 1) != bool(each.reason)] == []


def test_the_page_shows_what_is_expected() -> None:
    """Each letter of the table is one of its cell's, in the order coordinator, peer."""
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in matrix.cells():
        cells.setdefault((cell.row, cell.phase.value), []).append(cell)
    shown = {key: letters for key, letters in table().items() if letters}
    assert set(shown) == set(cells)
    expected = matrix.expected()
    for key, of in cells.items():
        for cell, letter in zip(sorted(of, key=lambda each: each.where.value), shown[key], strict=True):
            assert LETTERS[letter] in expected[cell.name].outcomes, f"{cell.name}: the page says {letter}"
