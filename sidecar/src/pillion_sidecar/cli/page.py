"""
A run's report as one HTML page: no scripts, nothing from elsewhere, light and dark, readable on a phone. Pure.

Called from: `cli.report`.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Sequence
from typing import Final

from pillion_sidecar.cli import charts, output
from pillion_sidecar.cli.charts import Part
from pillion_sidecar.cli.facts import Facts
from pillion_sidecar.cli.style import STYLE
from pillion_sidecar.run.account import Account
from pillion_sidecar.run.journal import CLOSED, DIED, Attempt, Save

SHOWN_SAVES: Final = 20
"""Newest saves in the table. The charts have all of the journal."""
SHOWN_STEPS: Final = 50
"""Newest checkpoints in the table."""
SHOWN_ROWS: Final = 40
"""Newest attempts in the drawing and in the table of restarts."""
KINDS: Final = {
    "trained": "trained, and kept",
    "retrained": "lost by a restart: trained again",
    "stalled": "held up by saves: copying",
    "waited": "held up by saves: waiting for storage",
    "restoring": "starting and loading",
    "down": "no trainer",
}
"""Kind of time -> its name. The order is that of the bar."""
ENDS: Final = {CLOSED: "closed", DIED: "died", "": "not known"}


def render(facts: Facts, account: Account) -> str:
    """Return the page."""
    sections = [
        _goodput(account),
        _timeline(facts, account),
        _restarts(facts, account),
        _saves(facts.journal.saves),
        _points(facts),
        _missing(facts.missing),
        _meaning(),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>Pillion report: {_text(facts.root)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(facts, account)}\n{''.join(each for each in sections if each)}</main>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{_text(title)}</h2>\n{body}\n</section>\n'


def _head(facts: Facts, account: Account) -> str:
    journal = facts.journal
    lines = [f"Written {output.timestamp(facts.now_ns)}. The run is {facts.state}."]
    if journal.attempts:
        last = journal.attempts[-1]
        ranks = f", {_counted(last.world_size, 'rank')} in {_counted(last.num_pods, 'pod')}" if last.world_size else ""
        lines.append(
            f"{output.timestamp(journal.attempts[0].began_ns)} to {output.timestamp(last.seen_ns)}: {duration(account.wall_s)}{ranks}."
        )
    return f"<h1>{_text(facts.root)}</h1>\n" + "".join(f'<p class="quiet">{_text(each)}</p>\n' for each in lines)


# --- numbers ---------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Return a duration for people, with two units at most: ``2 d 3 h``, ``1 h 5 min``, ``12.3 s``, ``85 ms``. Pure."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, name, below in ((60, 1, "min", "s"), (3600, 60, "h", "min"), (86400, 3600, "d", "h")):
        if whole < unit * (60 if name != "h" else 24) or name == "d":
            rest = whole % unit // size
            return f"{whole // unit} {name}" + (f" {rest} {below}" if rest else "")
    raise AssertionError("days have no limit")


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"


def _seconds_of(account: Account) -> dict[str, float]:
    return {kind: getattr(account, f"{kind}_s") for kind in KINDS}


def lag_s(save: Save) -> float:
    """Return the time from a save's begin until it was a recovery point, seconds."""
    return max(0.0, (save.committed_ns - save.began_ns) / 1e9)


def rate(save: Save) -> float:
    """Return the bytes a second from the seal to the commit; 0: not known."""
    seconds = save.persist_s + save.commit_s
    return save.bytes / seconds if seconds > 0 else 0.0


def _size(num_bytes: float) -> str:
    return output.size(round(num_bytes))


# --- sections --------------------------------------------------------------------------------------------------------


def _figure(value: str, name: str, *, is_main: bool = False) -> str:
    return f'<div class="figure{" main" if is_main else ""}"><b>{_text(value)}</b><span>{_text(name)}</span></div>'


def _goodput(account: Account) -> str:
    if not account.attempts:
        return ""
    seconds = _seconds_of(account)
    parts, begin = [], 0.0
    for kind, each in seconds.items():
        end = begin + (each / account.wall_s if account.wall_s > 0 else 0.0)
        parts.append(Part(kind, begin, end, f"{KINDS[kind]}: {duration(each)}"))
        begin = end
    lost = [each.lost_s for each in account.restarts if each.lost_s is not None]
    figures = [
        _figure(_share(account.trained_s, account.wall_s), "goodput: share of the time that trained", is_main=True),
        _figure(str(account.attempts - 1), "restarts"),
        _figure(
            duration(sum(lost)) if lost else "none" if not account.restarts else "not known",
            "of training lost by restarts",
        ),
        _figure(duration(account.stalled_s + account.waited_s), "of training held up by saves"),
    ]
    rows = [
        [
            f'<span class="key {kind}"></span>{_text(KINDS[kind])}',
            _text(duration(each)),
            _text(_share(each, account.wall_s)),
        ]
        for kind, each in seconds.items()
    ]
    body = f'<div class="figures">{"".join(figures)}</div>\n<p></p>\n{charts.stacked(parts, "the time of the run, by kind")}\n'
    return _section("goodput", "Goodput", body + _table(("where the time went", "time", "share"), rows, "nn"))


def _timeline(facts: Facts, account: Account) -> str:
    attempts = facts.journal.attempts[-SHOWN_ROWS:]
    if not attempts:
        return ""
    begin_ns, end_ns = attempts[0].began_ns, max(each.seen_ns for each in attempts)
    span = max(end_ns - begin_ns, 1)
    lost_ns = {each.number: int((each.lost_s or 0.0) * 1e9) for each in account.restarts}

    def at(time_ns: int) -> float:
        return min(1.0, max(0.0, (time_ns - begin_ns) / span))

    lines, marks = [], []
    for index, attempt in enumerate(attempts):
        ready_ns = attempt.loads[0].ended_ns if attempt.loads else attempt.began_ns
        after = attempts[index + 1] if index + 1 < len(attempts) else None
        gone_ns = max(ready_ns, attempt.seen_ns - (lost_ns.get(after.number, 0) if after is not None else 0))
        name = f"attempt {attempt.number}"
        lines.append(
            [
                Part("restoring", at(attempt.began_ns), at(ready_ns), f"{name}: starting and loading"),
                Part("trained", at(ready_ns), at(gone_ns), f"{name}: trained"),
                *(
                    [Part("retrained", at(gone_ns), at(attempt.seen_ns), f"{name}: lost")]
                    if gone_ns < attempt.seen_ns
                    else []
                ),
            ]
        )
        marks.append(
            [
                at(each.committed_ns)
                for each in facts.journal.saves
                if each.number == attempt.number and each.committed_ns
            ]
        )
    drawn = charts.rows(lines, marks, "the attempts over time, and their recovery points")
    keys = "".join(
        f'<span><span class="key {kind}"></span>{_text(name)}</span>'
        for kind, name in (
            ("restoring", "starting and loading"),
            ("trained", "trained"),
            ("retrained", "lost"),
            ("mark", "recovery point (commit)"),
        )
    )
    more = len(facts.journal.attempts) - len(attempts)
    note = (
        f'<p class="quiet">The newest {len(attempts)} attempts; {more} older ones are in the sums above.</p>'
        if more
        else ""
    )
    body = (
        f'<div class="keys">{keys}</div>\n{drawn}\n<div class="ends"><span>{output.timestamp(begin_ns)}</span>'
        f"<span>{output.timestamp(end_ns)}</span></div>\n{note}"
    )
    return _section("timeline", "Attempts and recovery points", body)


def _restarts(facts: Facts, account: Account) -> str:
    if not facts.journal.attempts:
        return ""
    by_number = {each.number: each for each in account.restarts}
    rows = []
    for attempt in facts.journal.attempts[-SHOWN_ROWS:][::-1]:
        restart = by_number.get(attempt.number)
        load = attempt.loads[0] if attempt.loads else None
        loaded = (
            "no load" if load is None else f"step {load.step} from {load.tier}" if load.step >= 0 else "nothing there"
        )
        lost = "-"
        if restart is not None:
            lost = "not known" if restart.lost_s is None else duration(restart.lost_s)
            lost += f" (some {_counted(restart.lost_steps, 'step')})" if restart.lost_steps else ""
        rows.append(
            [
                _text(attempt.number),
                _text(output.timestamp(attempt.began_ns)),
                _text(duration(max(0, attempt.seen_ns - attempt.began_ns) / 1e9)),
                _text(_end(attempt, facts)),
                _text(loaded),
                _text(lost),
                _text("-" if restart is None else duration(restart.down_s)),
                _text(attempt.saves),
                _text(attempt.failed),
                _text(attempt.refused),
            ]
        )
    heads = (
        "attempt",
        "began",
        "lived",
        "end",
        "loaded",
        "lost before it",
        "down before it",
        "commits",
        "failed saves",
        "refused",
    )
    quiet = (
        '<p class="quiet">Lost before it: what was trained after the save of the step that the attempt loaded. Refused: checkpoints that its load found'
        " damaged or lost.</p>"
    )
    return _section("restarts", "Restarts, and what each cost", quiet + _table(heads, rows, "n", left=(1, 3, 4, 5)))


def _end(attempt: Attempt, facts: Facts) -> str:
    if attempt is facts.journal.attempts[-1] and not attempt.ended:
        return facts.state
    return ENDS.get(attempt.ended, attempt.ended)


def _saves(saves: Sequence[Save]) -> str:
    done = [each for each in saves if each.committed_ns]
    if not done:
        return ""
    stalls, lags, rates = [each.stall_s for each in done], [lag_s(each) for each in done], [rate(each) for each in done]
    figures = [
        _figure(duration(statistics.median(stalls)), f"stall of a save, median; {duration(max(stalls))} at most"),
        _figure(f"{_size(statistics.median(rates))}/s", f"persist rate, median; {_size(min(rates))}/s at least"),
        _figure(
            duration(statistics.median(lags)), f"lag from the save to the commit, median; {duration(max(lags))} at most"
        ),
        _figure(_size(done[-1].bytes), f"size of step {done[-1].step}, the newest commit"),
    ]
    named = [f"step {each.step}" for each in done]
    drawings = [
        _chart("Stall of training by a save", stalls, duration, named, "stalled", done),
        _chart("Persist rate, in bytes a second", rates, lambda value: f"{_size(value)}/s", named, "trained", done),
        _chart("Lag from the save to the commit", lags, duration, named, "restoring", done),
    ]
    rows = [
        [
            _text(each.step),
            _text(output.timestamp(each.began_ns)),
            _text(each.cause),
            _text(_size(each.bytes)),
            _text(duration(each.stall_s)),
            _text(duration(each.queued_s)),
            _text(duration(each.persist_s)),
            _text(duration(each.commit_s)),
            _text(duration(lag_s(each))),
            _text(f"{_size(rate(each))}/s"),
        ]
        for each in done[-SHOWN_SAVES:][::-1]
    ]
    heads = ("step", "began", "cause", "size", "stall", "queue", "write", "commit", "lag", "rate")
    body = f'<div class="figures">{"".join(figures)}</div>\n<p></p>\n<div class="charts">{"".join(drawings)}</div>\n'
    if len(done) > SHOWN_SAVES:
        body += f'<p class="quiet">The newest {SHOWN_SAVES} of the {len(done)} saves in the charts:</p>\n'
    return _section("saves", "Saves", body + _table(heads, rows, "n", left=(1, 2)))


def _chart(
    title: str, values: Sequence[float], name: object, steps: Sequence[str], kind: str, saves: Sequence[Save]
) -> str:
    assert callable(name)
    titles = [f"{step}: {name(value)}" for step, value in zip(steps, values, strict=True)]
    drawn = charts.columns(values, titles, kind, f"{title}, for each save")
    return (
        f'<div><div class="ends"><span>{_text(title)}</span><span>up to {_text(name(max(values)))}</span></div>{drawn}'
        f'<div class="ends"><span>{_text(steps[0])}</span><span>{_text(steps[-1])}</span></div></div>'
    )


def _points(facts: Facts) -> str:
    rows = [
        [
            _text("-" if each.step is None else each.step),
            _text(each.state),
            _text(output.timestamp(each.saved_ns) if each.saved_ns else "-"),
            _text(output.age(max(0, facts.now_ns - each.saved_ns) / 1e9) if each.saved_ns else "-"),
            _text(_size(each.size_bytes)),
            _text("-" if each.ranks is None else each.ranks),
            _text(", ".join([*(["a restart loads it"] if each.is_newest else []), *(["verified"] if each.is_verified else []),
                             *(["left behind"] if each.is_left_behind else []), *(["pinned"] if each.pinned else [])])),
        ]
        for each in list(facts.steps)[-SHOWN_STEPS:][::-1]
    ]  # fmt: skip
    if not rows:
        return _section("points", "Recovery points now", "<p>The root holds no checkpoint.</p>")
    heads = ("step", "state", "saved", "age", "size", "ranks", "note")
    return _section("points", "Recovery points now", _table(heads, rows, "n", left=(1, 2, 6)))


def _missing(missing: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(each)}</li>" for each in missing)
    return _section("missing", "What this page does not know", f"<ul>{items}</ul>") if items else ""


def _meaning() -> str:
    meanings = (
        ("goodput", "time that trained and was kept, as a share of the whole time from the first attempt to the last sign of life"),
        ("trained", "from the end of the load to the end of the attempt, without stalls, and without what a restart lost. The sidecar sees that a trainer lives, and not whether its step makes progress"),
        ("lost", "what was trained after the save that the next attempt loaded. Its steps are trained again"),
        ("held up by saves", "time that save() took in the training loop, on the slowest rank in the pod of rank 0. Waiting for storage: the part of it in which no slot was free"),
        ("starting and loading", "from the first trainer's connection to the end of its load"),
        ("no trainer", "between the end of an attempt and the first trainer of the next one: scheduling, images, imports"),
        ("persist rate", "bytes by the time from the executor's begin to the commit"),
        ("lag", "from the begin of a save to its commit. Before the commit a lost node loses the save"),
    )  # fmt: skip
    body = "".join(f"<dt>{_text(name)}</dt><dd>{_text(meaning)}</dd>" for name, meaning in meanings)
    return _section("meaning", "What the words mean", f"<dl>{body}</dl>")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str, left: Sequence[int] = (0,)) -> str:
    """Return a table whose cells are HTML. `left`: columns that are text; the others are numbers."""
    kinds = ["t" if column in left else "n" for column in range(len(heads))]
    head = "".join(f'<th class="{kind}">{_text(each)}</th>' for kind, each in zip(kinds, heads, strict=True))
    lines = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
