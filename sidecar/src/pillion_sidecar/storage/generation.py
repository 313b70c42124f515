"""
The generation text in every file name of a save, and its order: ``<generation of the session>`` or ``<generation>-<number of the save>``.

No two saves have the same text, so no file name is ever written twice. Pure. Called from: `storage.local`, `checkpoint`, `executor.save`.
"""

from __future__ import annotations

from typing import Final

from pillion.wire import names

MAX_DIGITS: Final = 19
"""Maximum of digits in a generation, which is a count, or a time in nanoseconds. Pillion writes no longer number."""

Order = tuple[int, int]
"""Order of a checkpoint's commit: (generation, epoch). The generation counts the sessions of a root, the epoch counts the loads of a session. Of
two checkpoints with the same order the larger step is newer, because steps only grow within an epoch."""
OLDEST: Final[Order] = (0, 0)


def text(generation: int, number: int) -> str:
    """
    Return the generation text in every file name of a save.

    Args:
        generation: generation of the session.
        number: number of the save within its session and step, see `save_number`. 0 is left out of the text.
    """
    return f"{generation}-{number}" if number else str(generation)


def save_number(epoch: int, *, rescued: bool) -> int:
    """
    Return the number of a save within its session and step.

    Steps only grow between two loads. So the number of loads separates a save from an earlier save of the same step before a rollback. Within an
    epoch, the trainers may save a step again after its rescue. The rescue has the smaller number, because it comes first.
    """
    return 2 * epoch + (0 if rescued else 1)


def order_of(generation: str) -> Order:
    """Return the order of a checkpoint, from the generation in its manifest."""
    first, *rest = order(generation)
    return max(first, 0), max(rest[0], 0) // 2 if rest else 0


def order(generation: str) -> tuple[int, ...]:
    """Return the numbers of a generation text, for the comparison of two texts. A part that is not Pillion's number counts as -1."""
    return tuple(number(part) for part in generation.split("-"))


def in_file_name(name: str) -> str | None:
    """Return the generation in the name of a data or part file; None: it is another file."""
    data, part = names.parse_data_file(name), names.parse_part_file(name)
    return data[2] if data is not None else part[1] if part is not None else None


def number(name: str) -> int:
    """Return the number in a name; -1: the name is not a number."""
    return int(name) if name.isdecimal() and len(name) <= MAX_DIGITS else -1
