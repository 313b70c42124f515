"""
Draw docs/records/benchmarks.md and benchmarks.svg from the records of `make bench ARGS="--json docs/records/bench/DATE.json"`.

Run by hand after a run of record: `.venv/bin/python tools/draw_benchmarks.py`; `--check` compares, as a test does. The newest record is the page, and
each row has its change since the record before. The picture has every row with a goal, as a multiple of that goal, of all records.
Called from: people; tests/unit/docs/test_benchmark_page.py.
Must never: leave out a missed goal, or a record.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

ROOT: Final = Path(__file__).parents[1]
RECORDS: Final = ROOT / "docs" / "records" / "bench"
PAGE: Final = ROOT / "docs" / "records" / "benchmarks.md"
PICTURE: Final = PAGE.with_suffix(".svg")
WORSE: Final = 1.25
"""Ratio to the record before from which a change is marked. Two quiet runs of one commit differ by less."""
QUIET_SHARE: Final = 0.10
"""As benchmarks/machine.py has it."""
ROW, LABELS, PLOT, EDGE = 18, 420, 460, 16
"""Height of a row, width of the names and of the plot, and the margin, pixels."""
LOW, HIGH = 0.1, 10.0
"""Ends of the axis, multiples of a goal. What is beyond stands at the end."""
NEWEST, OLDER, MISSED = "#3274d9", "#b8bcc2", "#e02f44"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run."""

    name: str
    facts: Mapping[str, Any]
    busy: Mapping[str, float]
    lines: Sequence[Mapping[str, Any]]

    def line(self, what: str) -> Mapping[str, Any] | None:
        return next((each for each in self.lines if each["what"] == what), None)


def records() -> list[Record]:
    """All records, oldest first."""
    read = []
    for path in RECORDS.glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        facts, busy, lines = document["facts"], document["busy"], document["lines"]
        read.append(Record(name=path.stem, facts=facts, busy=busy, lines=lines))
    return sorted(read, key=lambda each: str(each.facts["date"]))


def page(runs: Sequence[Record]) -> str:
    """The page of the newest record. Pure."""
    newest = runs[-1]
    before = runs[-2] if len(runs) > 1 else None
    return "\n".join([*_head(newest, before), *_tables(newest, before), *_older(runs), ""])


def _head(newest: Record, before: Record | None) -> Iterator[str]:
    yield "# Benchmarks"
    yield ""
    yield "<!-- made by tools/draw_benchmarks.py from the files in bench/ -->"
    yield ""
    yield f"The newest run of record, [{newest.name}](bench/{newest.name}.json), with every sample in the file. [performance.md](../performance.md) says what it means."
    yield "Every ratio is of one run, in which the thing and its floor took turns. The range is that of the samples; the number is their median."
    if before is not None:
        yield f"The last column is the number over that of [{before.name}](bench/{before.name}.json); bold where it differs by more than {WORSE:g}."
    yield ""
    yield "![each measured goal as a multiple of the goal](benchmarks.svg)"
    yield ""
    yield from (f"- {name}: {value}" for name, value in newest.facts.items() if value not in ("", None))
    yield ""


def _tables(newest: Record, before: Record | None) -> Iterator[str]:
    for group in dict.fromkeys(str(line["group"]) for line in newest.lines):
        share = newest.busy.get(group, 0.0)
        yield f"## {group}"
        yield ""
        quiet = "the machine was quiet" if share <= QUIET_SHARE else "**the machine was not quiet**"
        yield f"Before it {share:.0%} of the processors were busy: {quiet}."
        yield ""
        yield "| what | measured | goal | | range | change |"
        yield "|---|---|---|---|---|---|"
        for line in newest.lines:
            if line["group"] == group:
                yield _row(line, before.line(str(line["what"])) if before is not None else None)
        yield ""


def _row(line: Mapping[str, Any], old: Mapping[str, Any] | None) -> str:
    samples = line["samples"]
    cells = [
        f"{line['what']}" + (f" ({line['note']})" if line["note"] else ""),
        f"{_number(line['measured'])} {line['unit']}".strip(),
        "" if line["goal"] is None else f"{line['sense']} {line['goal']:g}",
        str(line["verdict"]).lower(),
        f"{_number(min(samples))} to {_number(max(samples))}" if samples else "",
        _change(line, old),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _change(line: Mapping[str, Any], old: Mapping[str, Any] | None) -> str:
    if old is None or not old["measured"] or not line["measured"] or old["unit"] != line["unit"]:
        return ""
    ratio = line["measured"] / old["measured"]
    return f"**{ratio:.2f}**" if not 1 / WORSE <= ratio <= WORSE else f"{ratio:.2f}"


def _older(runs: Sequence[Record]) -> Iterator[str]:
    if len(runs) > 1:
        yield "## Older records"
        yield ""
        yield from (f"- [{each.name}](bench/{each.name}.json), commit {each.facts['commit']}" for each in runs[-2::-1])
        yield ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def of_goal(line: Mapping[str, Any], value: float) -> float:
    """A value as a multiple of its goal, where more than 1 is a miss, within the ends of the axis. Pure."""
    if value <= 0 or not line["goal"]:
        return LOW if line["sense"] == "<=" else HIGH
    ratio = value / line["goal"] if line["sense"] == "<=" else line["goal"] / value
    return float(min(max(ratio, LOW), HIGH))


def picture(runs: Sequence[Record]) -> str:
    """Every row with a goal as a multiple of it, of all records, the newest on top. Pure."""
    rows = [line for line in runs[-1].lines if line["goal"] is not None]
    height = (len(rows) + 2) * ROW + 2 * EDGE
    width = LABELS + PLOT + 2 * EDGE
    drawn = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10):
        x, color = _x(mark), "#30343b" if mark == 1 else "#dfe2e6"
        drawn.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{EDGE + ROW}" y2="{height - EDGE - ROW / 2}" stroke="{color}"/>'
        )
        label = "goal" if mark == 1 else f"{mark:g}"
        drawn.append(f'<text x="{x:.1f}" y="{EDGE + ROW / 2}" text-anchor="middle" fill="#555">{label}</text>')
    for index, line in enumerate(rows):
        drawn += _drawn_row(line, EDGE + (index + 1.5) * ROW, runs)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, *drawn, "</svg>", ""])


def _drawn_row(line: Mapping[str, Any], y: float, runs: Sequence[Record]) -> Iterator[str]:
    color = MISSED if line["verdict"] == "MISSED" else NEWEST
    yield f'<text x="{EDGE}" y="{y + 4:.1f}" fill="#30343b">{escape(str(line["what"]))}</text>'
    for older in runs[:-1]:
        old = older.line(str(line["what"]))
        if old is not None:
            yield f'<circle cx="{_x(of_goal(line, old["measured"])):.1f}" cy="{y:.1f}" r="3" fill="{OLDER}"/>'
    if line["samples"]:
        ends = sorted(_x(of_goal(line, value)) for value in (min(line["samples"]), max(line["samples"])))
        yield f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}" stroke-width="3" opacity="0.35"/>'
    yield f'<circle cx="{_x(of_goal(line, line["measured"])):.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'


def _x(ratio: float) -> float:
    share = math.log(ratio / LOW) / math.log(HIGH / LOW)
    return EDGE + LABELS + share * PLOT


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).strip().splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    args = parser.parse_args()
    runs = records()
    if not runs:
        sys.exit(f"there is no record in {RECORDS.relative_to(ROOT)}")
    for path, text in ((PAGE, page(runs)), (PICTURE, picture(runs))):
        if args.check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path.relative_to(ROOT)} is not of the newest record; run python tools/draw_benchmarks.py")
        if not args.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
