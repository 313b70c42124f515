"""
The drawings of a run's report as inline SVG, without text: labels are HTML beside them, which stays readable on a phone. Pure.

Called from: `cli.page`. A drawing stretches to the width of the page. Colours are classes, which the page's style gives for light and dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 1000
"""Width of a drawing in its own units."""
BAR_HEIGHT: Final = 28
ROW_HEIGHT: Final = 16
CHART_HEIGHT: Final = 120
MIN_WIDTH: Final = 1.5
"""Least width of what happened: shorter things would not be seen."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar."""

    kind: str
    """Class of its colour."""
    begin: float
    end: float
    """0 to 1."""
    title: str


def stacked(parts: Sequence[Part], label: str) -> str:
    """Return one bar of parts."""
    return _svg(BAR_HEIGHT, label, "".join(_rectangle(each, 0, BAR_HEIGHT, 0.0) for each in parts), "bar")


def rows(lines: Sequence[Sequence[Part]], marks: Sequence[Sequence[float]], label: str) -> str:
    """
    Return a row of parts for each line, with marks.

    Args:
        marks: for each line, where its marks are, 0 to 1.
    """
    drawn = ""
    for index, (parts, own) in enumerate(zip(lines, marks, strict=True)):
        top = index * ROW_HEIGHT + 2
        drawn += "".join(_rectangle(each, top, ROW_HEIGHT - 5, MIN_WIDTH) for each in parts)
        drawn += "".join(
            f'<line class="mark" x1="{_x(at)}" x2="{_x(at)}" y1="{top - 1}" y2="{top + ROW_HEIGHT - 3}"/>' for at in own
        )
    return _svg(len(lines) * ROW_HEIGHT + 2, label, drawn, "rows")


def columns(values: Sequence[float], titles: Sequence[str], kind: str, label: str) -> str:
    """Return a column for each value, from 0 to the largest."""
    most = max(values, default=0.0) or 1.0
    step = WIDTH / max(len(values), 1)
    gap = min(2.0, step / 5)
    drawn = ""
    for index, (value, title) in enumerate(zip(values, titles, strict=True)):
        height = max(value / most * CHART_HEIGHT, 1.0 if value > 0 else 0.0)
        drawn += (
            f'<rect class="{kind}" x="{index * step + gap / 2:.1f}" y="{CHART_HEIGHT - height:.1f}" width="{step - gap:.1f}"'
            f' height="{height:.1f}"><title>{html.escape(title)}</title></rect>'
        )
    base = f'<line class="axis" x1="0" x2="{WIDTH}" y1="{CHART_HEIGHT}" y2="{CHART_HEIGHT}"/>'
    return _svg(CHART_HEIGHT, label, drawn + base, "columns")


def _rectangle(part: Part, top: float, height: float, least: float) -> str:
    width = max((part.end - part.begin) * WIDTH, least)
    return (
        f'<rect class="{part.kind}" x="{_x(part.begin)}" y="{top}" width="{width:.1f}" height="{height}">'
        f"<title>{html.escape(part.title)}</title></rect>"
    )


def _x(at: float) -> str:
    return f"{at * WIDTH:.1f}"


def _svg(height: float, label: str, drawn: str, kind: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:g}" preserveAspectRatio="none" role="img"'
        f' aria-label="{html.escape(label, quote=True)}">{drawn}</svg>'
    )
