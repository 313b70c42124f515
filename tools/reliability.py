"""
The whole of: the generated tables of docs/records, from the raw results of `make matrix`, `make campaign` and `make soak`.

    tools/reliability.py matrix FILE | campaign FILE | soak FILE

Called from: the Makefile, people. A part stands between two markers; the text around them is written by hand.
Must never: write a figure that is not in the file, or leave out a run that went badly.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
RECORDS: Final = ROOT / "docs" / "records"
BARS: Final = "0123456789"
sys.path[:0] = [str(ROOT / each) for each in ("tests", "client/src", "sidecar/src")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="reliability", description=__doc__)
    parser.add_argument("part", choices=("matrix", "campaign", "soak"))
    parser.add_argument("file", type=Path)
    of = parser.parse_args()
    lines = [json.loads(line) for line in of.file.read_text().splitlines()]
    made = {"matrix": matrix, "campaign": campaign, "soak": soak}[of.part](lines)
    begin, end = f"<!-- {of.part}: generated -->", f"<!-- {of.part}: end -->"
    page = RECORDS / f"{of.part}.md"
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{made}\n{end}{after}")


def matrix(lines: list[dict[str, Any]]) -> str:
    """A table of phase by fault; each cell: what became of the save, in the coordinator's pod and in the peer's."""
    from support import matrix as cells

    found = {line["cell"]: line for line in lines}
    rows: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    columns: list[str] = []
    for cell in cells.cells():
        if cell.phase.value not in columns:
            columns.append(cell.phase.value)
        line = found.get(cell.name)
        rows[cell.row][cell.phase.value][cell.where.value] = line["outcome"] if line else "not run"
    short = {"committed": "C", "absent": "a", "refused": "R", "not run": "-"}
    table = ["| fault | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for whose, by_phase in rows.items():
        entries = []
        for phase in columns:
            told = by_phase.get(phase, {})
            entries.append(" ".join(short[told[where]] for where in ("coordinator", "peer") if where in told))
        table.append(f"| {whose} | " + " | ".join(entries) + " |")
    wrong = [
        name for name, line in found.items() if cells.Outcome(line["outcome"]) not in cells.expected()[name].outcomes
    ]
    if wrong:
        raise SystemExit(f"not as {cells.OUTCOMES.name} has it: {', '.join(wrong)}; say there what is right, and why")
    table += ["", "| story | outcome |", "|---|---|"]
    for story in cells.Story:
        line = found.get(story.value)
        table.append(f"| {story.value} | {short[line['outcome'] if line else 'not run']} |")
    total = sum(1 for _ in cells.cells()) + len(cells.Story)
    outcomes = [line["outcome"] for line in found.values()]
    slowest = max(found.values(), key=lambda line: line["elapsed_s"], default={"cell": "none", "elapsed_s": 0})
    counted = ", ".join(f"{outcomes.count(each)} {each}" for each in ("committed", "absent", "refused"))
    return (
        f"{len(found)} of {total} cells green: {counted}. Slowest: {slowest['cell']}, {slowest['elapsed_s']:.0f} s with start"
        f" and end.\n\n" + "\n".join(table) + "\n"
    )


def campaign(lines: list[dict[str, Any]]) -> str:
    """Counts and recovery points."""
    from campaign.runs import Result, summary

    results = [Result(**line) for line in lines]
    told = summary(results)
    seeds = sorted(result.seed for result in results)
    elapsed = sorted(result.elapsed_s for result in results if result.elapsed_s)
    rows = [
        ("runs; seeds", f"{told['runs']}; {seeds[0]} to {seeds[-1]}"),
        ("verdicts", ", ".join(f"{name} {count}" for name, count in sorted(told["verdicts"].items()))),
        ("of two pods", told["two_pods"]),
        ("restarts of the trainers", told["restarts"]),
        ("loaded from", ", ".join(f"{name} {count}" for name, count in sorted(told["tiers"].items()))),
        (
            "steps trained again: median, p99, most",
            f"{told['lost_steps_median']}, {told['lost_steps_p99']}, {told['lost_steps_most']}",
        ),
        ("seconds of training lost: most", told["lost_s_most"]),
        ("checkpoints compared bit for bit", told["checkpoints_checked"]),
        ("seconds a run: median, most", f"{elapsed[len(elapsed) // 2]}, {elapsed[-1]}" if elapsed else "-"),
    ]
    table = ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    strikes = [
        "| strike | hit |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(told["strikes"].items())),
    ]
    inside = ["| storage or executor | runs |", "|---|---|"]
    inside += [f"| {name} | {count} |" for name, count in sorted(told["inside"].items())]
    bad = [
        f"- seed {result.seed}: {result.verdict}: {result.detail.splitlines()[0] if result.detail else ''}"
        for result in results
        if result.verdict != "ok"
    ]
    return "\n".join([*table, "", *strikes, "", *inside, "", *bad]) + "\n"


def soak(lines: list[dict[str, Any]]) -> str:
    """A table for each number of pods, as what is counted differs between them by design."""
    worlds = sorted({line["pods"] for line in lines})
    return "\n".join(_soak_of(pods, [line for line in lines if line["pods"] == pods]) for pods in worlds)


def _soak_of(pods: int, lines: list[dict[str, Any]]) -> str:
    """A row for each thing that was counted: a few of its values, first to last, and all of them as shares of the largest."""
    shown = [lines[index * (len(lines) - 1) // 5] for index in range(6)] if len(lines) > 6 else lines
    rounds = [f"round {line['round']}" for line in shown]
    head = [f"{pods} pod{'s' if pods > 1 else ''}", *rounds, "all, in ninths of the largest"]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key in (each for each in lines[0] if each not in ("round", "pods")):
        values = [float(line[key]) for line in lines]
        bars = "".join(BARS[round(value / (max(values) or 1.0) * (len(BARS) - 1))] for value in values)
        table.append(f"| {key} | " + " | ".join([*(str(line[key]) for line in shown), bars]) + " |")
    return "\n".join(table) + "\n"


if __name__ == "__main__":
    main()
