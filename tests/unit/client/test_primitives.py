"""
The whole of: archives of numbers and short texts: that torch reads them, and how seldom torch writes one.

Called from: pytest.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pillion import opaque, primitives

VALUES: list[object] = [
    None, True, False, 0, -1, 255, 65_536, 2**31, -(2**63), 2**200, 0.0, -0.0, 1e-300, math.inf, math.nan,
    "", "a", "gr\u00f6\u00dfe", "x" * primitives.TEXT_CHARS, "\u6f22" * 100,
]  # fmt: skip


@pytest.fixture
def no_templates() -> Iterator[None]:
    before = dict(primitives._templates)
    primitives._templates.clear()
    yield
    primitives._templates.clear()
    primitives._templates.update(before)


def read(archive: bytes) -> object:
    return torch.load(io.BytesIO(archive), weights_only=True)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__} {value!s:.12}")
def test_torch_reads_the_very_value_of_an_archive(value: object) -> None:
    """Type, sign and all digits are those that were put in, and every checksum in the archive is right."""
    archive = primitives.archive(value)
    assert archive is not None
    assert (type(read(archive)), repr(read(archive))) == (type(value), repr(value))
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        assert entries.testzip() is None


def saved_by_torch(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What torch.save is called with from here on."""
    saved: list[object] = []
    save = torch.save

    def counted(leaf: object, *rest: Any) -> None:
        saved.append(leaf)
        save(leaf, *rest)

    monkeypatch.setattr(torch, "save", counted)
    return saved


@pytest.mark.usefixtures("no_templates")
def test_thousands_of_numbers_that_change_take_a_few_calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each length of a pickle, and not one for each number of each save."""
    saved, pickler = saved_by_torch(monkeypatch), opaque.Pickler()
    for step in range(3):
        archives = pickler.pickled({f"offset.{number}": 1_000_000 * step + number for number in range(5000)})
        assert read(archives[-1]) == 1_000_000 * step + 4999
    assert len(saved) <= 4


@pytest.mark.usefixtures("no_templates")
def test_an_archive_does_not_depend_on_what_came_before_it() -> None:
    """Ranks that agree on a value have equal archives of it, whatever other values each of them has."""
    first = [primitives.archive(value) for value in ("abc", 70_001, 70_002, 1.5, 2.5)]
    primitives._templates.clear()
    assert [primitives.archive(value) for value in (2.5, 1.5, 70_002, 70_001, "abc")] == first[::-1]


@pytest.mark.usefixtures("no_templates")
def test_archives_of_another_form_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that writes no checksums, or another layout, still gets its leaves saved: by itself."""

    def save(leaf: object, buffer: io.BytesIO) -> None:
        with zipfile.ZipFile(buffer, "w") as entries:
            entries.writestr("archive/other.pkl", repr(leaf))

    monkeypatch.setattr(torch, "save", save)
    assert primitives.archive(7) is None
    assert opaque.Pickler().pickled({"lr": 7}) == [opaque.pickled(7, "lr")]


def test_subclasses_and_long_texts_are_no_primitives() -> None:
    """An IntEnum is pickled as what it is, and a text that grows does not leave a template of each length."""

    class Counted(int):
        pass

    assert not any(map(primitives.is_primitive, (Counted(3), "x" * (primitives.TEXT_CHARS + 1), b"x", (1,))))
