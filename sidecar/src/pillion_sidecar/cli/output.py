"""
What `pillion` prints: tables for people, JSON for programs, and progress on standard error.

A table has kubectl's form: a line of heads, columns that are padded with blanks, no frames. So it reads well in a terminal, and `awk` reads it too.

Called from: every command of `cli`.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

GAP: Final = "   "
"""Blanks between two columns of a table."""
NOTHING: Final = "-"
"""Shown in a table for a value that is not known or that does not exist."""
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """
    Return a table. Pure.

    Args:
        right: heads of the columns that are aligned at the right, such as numbers.
    """
    lines = [list(heads), *([each or NOTHING for each in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    text = ""
    for line in lines:
        cells = [
            cell.rjust(width) if head in right else cell.ljust(width)
            for cell, width, head in zip(line, widths, heads, strict=True)
        ]
        text += GAP.join(cells).rstrip() + "\n"
    return text


def size(num_bytes: int) -> str:
    """Return a size for people, such as 1.2 GiB. Pure."""
    value, unit = float(num_bytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{num_bytes} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


def age(seconds: float) -> str:
    """Return an age in kubectl's form, such as 3m12s, 5h or 12d. Pure."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    if whole < 600:
        return f"{whole // 60}m{whole % 60}s" if whole % 60 else f"{whole // 60}m"
    if whole < 3 * 3600:
        return f"{whole // 60}m"
    return f"{whole // 3600}h" if whole < 2 * 86400 else f"{whole // 86400}d"


def timestamp(time_ns: int) -> str:
    """Return a wall clock time in RFC 3339, UTC, to the second. Pure."""
    return datetime.datetime.fromtimestamp(time_ns // 10**9, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def show(text: str) -> None:
    """Print text on standard output."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_json(document: object) -> None:
    """Print one JSON document on standard output."""
    show(json.dumps(document, indent=2) + "\n")


def say(text: str) -> None:
    """Print a line on standard error, for people."""
    print(text, file=sys.stderr, flush=True)


class Progress(Protocol):
    """A progress bar of bytes."""

    def moved(self, num_bytes: int) -> None:
        """Count bytes that are done."""


class _Silent:
    def moved(self, num_bytes: int) -> None:
        """Show nothing."""


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def moved(self, num_bytes: int) -> None:
        self._bar.update(num_bytes)


@contextmanager
def progress(what: str, total_bytes: int, *, is_quiet: bool) -> Iterator[Progress]:
    """
    Show a bar with rate and remaining time on standard error, if that is a terminal.

    Args:
        what: what is done, in front of the bar.
        is_quiet: show nothing.
    """
    if is_quiet or not sys.stderr.isatty():
        yield _Silent()
        return
    import tqdm

    bar = tqdm.tqdm(
        total=total_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        ascii=True,
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
    )
    try:
        yield _Bar(bar)
    finally:
        bar.close()


class Rate:
    """Counts bytes and time."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def since(self, num_bytes: int) -> tuple[float, float]:
        """Return (seconds, bytes per second) since the beginning."""
        seconds = max(time.monotonic() - self._start, 1e-6)
        return seconds, num_bytes / seconds
