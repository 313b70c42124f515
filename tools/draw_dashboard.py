"""
Draw docs/reference/dashboard.svg: the dashboard's panels over three hours of two jobs, as a real Prometheus answers their queries.

Run by hand when the dashboard or a metric changes: `.venv/bin/python tools/draw_dashboard.py`. It needs prometheus and promtool (Debian:
prometheus). The jobs are made up, and every number goes through the operator's own collector, promtool and Prometheus: a query that names what
is not there, or divides by nothing, shows as an empty panel.

    story --> metrics.Fleet --> OpenMetrics --> promtool tsdb create-blocks-from --> prometheus --> query_range --> SVG
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

from pillion_operator import metrics

ROOT: Final = Path(__file__).parents[1]
DASHBOARD: Final = ROOT / "charts" / "pillion" / "dashboards" / "pillion.json"
PICTURE: Final = ROOT / "docs" / "reference" / "dashboard.svg"
END_S: Final = 1_800_000_000
SPAN_S: Final = 3 * 3600
SCRAPE_S: Final = 15
STEP_S: Final = 45
START_TIMEOUT_S: Final = 30.0
"""For Prometheus to answer: it reads a few small blocks."""
COLUMNS: Final = 3
WIDTH, HEIGHT, GAP, TITLE = 420, 190, 16, 24
"""Of a panel and around it, pixels."""
COLORS: Final = ("#3274d9", "#e0752d", "#56a64b", "#a352cc", "#e02f44", "#8f8f8f")
UNITS: Final = {"percentunit": "", "s": "s", "Bps": "B/s", "ops": "/s", "reqps": "/s", "short": "", "bool": ""}

Series = tuple[str, list[tuple[float, float]]]


# --- the story -------------------------------------------------------------------------------------------------------


class Told:
    """A job that saves to storage each `period_s`, and to memory each `snapshot_s`."""

    def __init__(self, name: str, *, gib: float, period_s: int, snapshot_s: int, stall_s: float, gib_s: float) -> None:
        self.name = name
        self._size = gib * 2**30
        self._period_s, self._snapshot_s = period_s, snapshot_s
        self._stall_s, self._rate = stall_s, gib_s * 2**30
        self._committed_at, self._step, self._stored = 0, 0, 0
        self._due = self._busy_until = 0.0
        self._coming: list[tuple[float, float, float]] = []
        """When saves will be committed, when they were due, and how long they are written."""
        self.counters = dict.fromkeys(metrics._JOB_COUNTERS, 0.0)
        self.restarts: dict[str, float] = {"retrained": 0.0, "restoring": 0.0, "down": 0.0}
        """What the restarts have cost so far."""

    def at(self, second: int, *, slow: bool, away: bool) -> metrics.JobRow:
        """The job so many seconds after the begin; `slow` and `away` say how its storage is."""
        of = self.counters
        self._step = second // self._snapshot_s * 10
        of["snapshots"] = second // self._snapshot_s
        while self._due <= second:
            if away:
                of["saves_failed"] += 1
            else:
                takes = self._size / (self._rate / (9 if slow else 1))
                self._busy_until = max(self._due, self._busy_until) + takes
                self._coming.append((self._busy_until, self._due, takes))
            of["stalls"] += 1
            of["stall_seconds"] += self._stall_s
            self._due += self._period_s
        while self._coming and self._coming[0][0] <= second:
            done, due, takes = self._coming.pop(0)
            of["saves_committed"] += 1
            of["persisted_bytes"] += self._size
            of["queue_seconds"] += done - takes - due
            of["persist_seconds"] += done - due
            of["commit_seconds"] += 0.06
            self._committed_at, self._stored = int(done), int(due) // self._snapshot_s * 10
        gauges = {
            "last_committed_step": float(self._stored),
            "last_committed_timestamp_seconds": float(END_S - SPAN_S + self._committed_at),
            "recovery_point_seconds": float(max(0, second - self._committed_at)),
            "snapshot_recovery_point_seconds": float((second + 7) % self._snapshot_s),
            "lag_steps": float(max(0, self._step - self._stored)),
            "storage_reachable": float(not away),
            "pods": 4.0,
            "checkpoints": float(min(3, of["saves_committed"])),
        }
        lost = {**self.restarts, "stalled": of["stall_seconds"], "waited": 0.0}
        spent = {"trained": max(0.0, second - sum(lost.values())), **lost}
        gauges |= {"goodput_ratio": spent["trained"] / max(1, second), "attempts": 1.0}
        return metrics.JobRow(
            namespace="research", job=self.name, policy="llm", gauges=gauges, counters=dict(of), seconds=spent
        )


def samples() -> Iterator[tuple[str, Mapping[str, str], float, int]]:
    """Name, labels, value and time of each sample of the story."""
    jobs = [
        Told("llm-70b", gib=140, period_s=600, snapshot_s=60, stall_s=0.9, gib_s=2.0),
        Told("vision", gib=6, period_s=180, snapshot_s=30, stall_s=0.12, gib_s=1.1),
    ]
    fleet = metrics.Fleet()
    fleet.pods = lambda: [(("research", "llm"), 8)]
    for second in range(0, SPAN_S + 1, SCRAPE_S):
        slow, away = 4200 <= second < 7200, 8400 <= second < 9300
        rows = [jobs[0].at(second, slow=slow, away=False), jobs[1].at(second, slow=slow, away=away)]
        if second == 5400:
            jobs[1].counters["loads_arena"] += 1
            jobs[1].restarts = {"retrained": 21.0, "restoring": 4.0, "down": 35.0}
        if second == 9600:
            jobs[1].counters["loads_storage"] += 1
            jobs[1].restarts = {"retrained": 480.0, "restoring": 30.0, "down": 260.0}
        fleet.jobs = lambda rows=rows: rows  # type: ignore[misc] # bound now
        at_s = END_S - SPAN_S + second
        for family in fleet.collect():
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value, at_s
        yield from ((name, labels, value, at_s) for name, labels, value in _operator(second))


def _operator(second: int) -> Iterator[tuple[str, Mapping[str, str], float]]:
    asked = second / 20.0
    for decision, reason, share in (("inject", "Injected", 1.0), ("deny", "BadAnnotation", 0.05)):
        yield "pillion_admission_requests_total", {"decision": decision, "reason": reason}, asked * share
    for le, share in (("0.005", 0.6), ("0.01", 0.9), ("0.02", 0.985), ("0.05", 1.0), ("+Inf", 1.0)):
        yield "pillion_admission_duration_seconds_bucket", {"le": le}, asked * share
    yield "pillion_reports_total", {"result": "accepted"}, second / 1.5
    yield "pillion_reports_total", {"result": "stale"}, float(second > 5400) * 4


def openmetrics() -> str:
    """The story as promtool takes it: each series whole, in the order of time."""
    lines: dict[str, list[str]] = {}
    for name, labels, value, at_s in samples():
        series = name + "{" + ",".join(f'{key}="{each}"' for key, each in labels.items()) + "}"
        lines.setdefault(series, []).append(f"{series} {value} {at_s}")
    return "\n".join(line for series in lines.values() for line in series) + "\n# EOF\n"


# --- Prometheus ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """A Prometheus that holds the story; its address. Blocks: up to START_TIMEOUT_S."""
    (folder / "story.txt").write_text(openmetrics())
    made = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "story.txt", "data"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    (folder / "prometheus.yml").write_text("{}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--web.listen-address={address}", "--storage.tsdb.path=data", "--storage.tsdb.retention.time=100y"]
    log = (folder / "log").open("wb")
    with log, subprocess.Popen(["prometheus", *flags], cwd=folder, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _is_ready(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit((folder / "log").read_text())
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=1.0):
            return True
    except OSError:
        return False


def ask(address: str, expression: str, legend: str) -> list[Series]:
    """What a panel's query gives over the story, by legend."""
    query = expression.replace("$namespace", ".*").replace("$job", ".*")
    about = {"query": query, "start": END_S - SPAN_S, "end": END_S, "step": STEP_S}
    url = f"http://{address}/api/v1/query_range?{urllib.parse.urlencode(about)}"
    try:
        with urllib.request.urlopen(url, timeout=START_TIMEOUT_S) as answer:
            found = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as err:
        sys.exit(f"{query}: {err.read().decode()}")
    series = []
    for each in found:
        name = legend
        for key, value in each["metric"].items():
            name = name.replace("{{" + key + "}}", value)
        points = [(float(at), float(value)) for at, value in each["values"]]
        series.append((name, [(at, value) for at, value in points if math.isfinite(value)]))
    return sorted(series)


# --- the picture -----------------------------------------------------------------------------------------------------


def picture(panels: Sequence[tuple[str, str, list[Series]]]) -> str:
    """An SVG of panels: title, unit, series."""
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + GAP, rows * (HEIGHT + GAP) + GAP
    drawn = [
        f'<g transform="translate({GAP + index % COLUMNS * (WIDTH + GAP)},{GAP + index // COLUMNS * (HEIGHT + GAP)})">'
        f"{_panel(*panel)}</g>"
        for index, panel in enumerate(panels)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#f4f5f5"/>', *drawn, "</svg>", ""])


def _panel(title: str, unit: str, series: list[Series]) -> str:
    left, top, right, bottom = 56, TITLE + 8, WIDTH - 12, HEIGHT - 38
    values = [value for _, points in series for _, value in points]
    most = max(values, default=1.0) or 1.0
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff" stroke="#d8d9da"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e8e8e8"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{amount(most * share, unit)}</text>'
        )
    for hour in range(4):
        x = left + (right - left) * hour / 3
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">{hour} h</text>')
    if not values:
        parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle" fill="#c00">no data</text>')
    shown = left
    for index, (name, points) in enumerate(series):
        color = COLORS[index % len(COLORS)]
        for run in _runs(points):
            path = " ".join(
                f"{left + (right - left) * (at - END_S + SPAN_S) / SPAN_S:.1f},{bottom - value / most * (bottom - top):.1f}"
                for at, value in run
            )
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<text x="{shown}" y="{HEIGHT - 8}" fill="{color}">{escape(name)}</text>')
        shown += 7 * len(name) + 14
    return "".join(parts)


def _runs(points: list[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """The stretches without a gap."""
    run: list[tuple[float, float]] = []
    for point in points:
        if run and point[0] - run[-1][0] > STEP_S:
            yield run
            run = []
        run.append(point)
    if run:
        yield run


def amount(value: float, unit: str) -> str:
    """A number as an axis shows it."""
    suffix = UNITS[unit]
    for factor, letter in ((2**30, "Gi"), (2**20, "Mi")) if unit == "Bps" else ((10**6, "M"), (10**3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}{suffix}"
    return f"{value:.3g} {suffix}".strip()


def main() -> None:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    with tempfile.TemporaryDirectory() as folder, prometheus(Path(folder)) as address:
        panels = [
            (
                each["title"],
                each["fieldConfig"]["defaults"]["unit"],
                [line for target in each["targets"] for line in ask(address, target["expr"], target["legendFormat"])],
            )
            for each in found["panels"]
        ]
    PICTURE.write_text(picture(panels))
    for title, _, series in panels:
        print(f"{title}: {len(series)} series, {sum(len(points) for _, points in series)} points")


if __name__ == "__main__":
    main()
