"""
The whole of: how `pillion` writes tables, sizes, ages and times.

Called from: pytest.
"""

import pytest

from pillion_sidecar.cli import output


def test_a_table_pads_columns_with_blanks_and_aligns_numbers_at_the_right() -> None:
    """As kubectl does: no frames, no blanks at the end of a line, a dash for what is not known."""
    assert output.table(
        ("STEP", "STATE", "NOTE"), [["7", "committed", ""], ["1200", "torn", "x"]], right=("STEP",)
    ) == ("STEP   STATE       NOTE\n   7   committed   -\n1200   torn        x\n")


def test_a_table_without_rows_is_its_heads() -> None:
    """A program that reads it finds the columns."""
    assert output.table(("A", "B"), []) == "A   B\n"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1536, "1.5 KiB"),
        (64 * 2**20, "64 MiB"),
        (1000 * 2**20, "0.977 GiB"),
        (3 * 2**40, "3 TiB"),
        (2**70, "1.02e+03 EiB"),
    ],
)
def test_sizes_have_three_digits_and_a_unit(num_bytes: int, text: str) -> None:
    """Never four digits before the point, up to the largest unit."""
    assert output.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(-5, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (125, "2m5s"), (599, "9m59s"), (600, "10m")],
        *[(3 * 3600 - 1, "179m"), (3 * 3600, "3h"), (2 * 86400 - 1, "47h"), (2 * 86400, "2d"), (86400 * 400, "400d")],
    ],
)
def test_ages_are_as_kubectl_writes_them(seconds: float, text: str) -> None:
    """A clock that is behind the storage's gives no negative age."""
    assert output.age(seconds) == text


def test_times_are_rfc_3339_in_utc() -> None:
    """To the second, cut off."""
    assert output.timestamp(1_700_000_000_999_999_999) == "2023-11-14T22:13:20Z"
