"""
The whole of: `make fuzz`: a number of inputs over all targets, each target in a process of its own.

    python -m fuzz [TARGET ...] [--runs N] [--seed S] [--save FOLDER] [--guided]

Prints a row for each target, and each finding with the file that its input lies in. Exit status 1: there are findings.
Called from: the Makefile; a test, for few inputs.
Must never: take a process that died for one that found nothing.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from fuzz import engine, guided, targets
from fuzz.targets import Target

POLL_S: Final = 0.2
STUCK_POLLS: Final = 200
"""A process whose input is the same after so many polls (40 s) is killed: it is inside something that looks at no signal. Polls and no
clock, so that a run that was stopped can go on."""
ALONE_FROM: Final = 100_000
"""From so many inputs on each target has a process of its own."""
SEED: Final = 1
RUNS: Final = 1_000_000


def main() -> int:
    """Run what the command line says. Blocks: until all inputs were fed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="names of targets; all of them when there is none")
    parser.add_argument("--runs", type=int, default=RUNS, help="inputs, over all targets")
    parser.add_argument("--seed", type=int, default=SEED, help="the same seed feeds the same inputs")
    parser.add_argument("--save", type=Path, help="where inputs of findings go; default: a new temporary folder")
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris, where it is installed")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.journal is not None:
        return _work(given)
    known = targets.all_targets()
    if wrong := set(given.targets) - {each.name for each in known}:
        parser.error(f"no such target: {', '.join(sorted(wrong))}; there are {', '.join(each.name for each in known)}")
    chosen = [each for each in known if not given.targets or each.name in given.targets]
    given.save = given.save or Path(tempfile.mkdtemp(prefix="pillion-fuzz-findings-"))
    return _all(chosen, given)


def _all(chosen: list[Target], given: argparse.Namespace) -> int:
    how = "by coverage, with atheris" if given.guided else "by mutation"
    print(f"{given.runs} inputs over {len(chosen)} targets, {how}, seed {given.seed}")
    print(f"{'target':24}{'inputs':>10}{'taken':>8}{'inputs/s':>10}{'slowest':>10}{'findings':>10}", flush=True)
    # An interpreter for each target costs a second of each: too much for few inputs.
    is_short = given.runs < ALONE_FROM and not given.guided
    outcomes = []
    begun = time.monotonic()
    for group in [chosen] if is_short else [[each] for each in chosen]:
        for outcome in _in_a_process(group, chosen, given):
            outcomes.append(outcome)
            _print(outcome)
    inputs = sum(each.inputs for each in outcomes)
    elapsed_s = time.monotonic() - begun
    findings = [finding for each in outcomes for finding in each.findings]
    print(f"{'all':24}{inputs:>10}{'':8}{inputs / elapsed_s:>10.0f}{'':10}{len(findings):>10}   {elapsed_s:.0f} s")
    for finding in findings:
        given.save.mkdir(parents=True, exist_ok=True)
        path = given.save / f"{finding.target}-{hashlib.sha256(finding.data).hexdigest()[:12]}"
        path.write_bytes(finding.data)
        print(f"{finding.target}: {finding.why}\n    {path}")
    return 1 if findings else 0


def _print(outcome: engine.Outcome) -> None:
    taken = f"{100 * outcome.accepted / max(1, outcome.inputs):.0f} %"
    rate = outcome.inputs / max(outcome.elapsed_s, 1e-9)
    row = f"{outcome.target:24}{outcome.inputs:>10}{taken:>8}{rate:>10.0f}{outcome.slowest_s:>8.2f} s"
    print(f"{row}{len(outcome.findings):>10}", flush=True)


def _in_a_process(group: list[Target], chosen: list[Target], given: argparse.Namespace) -> list[engine.Outcome]:
    total = sum(each.weight for each in chosen)
    wanted = [f"{each.name}={max(1, round(given.runs * each.weight / total))}" for each in group]
    with tempfile.TemporaryDirectory(prefix="pillion-fuzz-") as folder:
        path = Path(folder, "journal")
        path.touch()
        journal = engine.Journal(path)
        command = [sys.executable, "-m", "fuzz", *wanted, "--journal", str(path), "--seed", str(given.seed)]
        command += ["--guided"] if given.guided else []
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        before, polls = (0, b""), 0
        while True:
            try:
                told, errors = child.communicate(timeout=POLL_S)
                break
            except subprocess.TimeoutExpired:
                now = journal.read()
                polls = polls + 1 if now == before else 0
                before = now
                if polls > STUCK_POLLS:
                    child.kill()
        outcomes = [_from_document(json.loads(line)) for line in told.splitlines() if line.startswith("{")]
        if len(outcomes) == len(group):
            return outcomes
        # The first that told nothing is the one that it died of; those behind it were not run.
        count, data = journal.read()
        end = signal.Signals(-child.returncode).name if child.returncode < 0 else f"status {child.returncode}"
        dead = group[len(outcomes)].name
        finding = engine.Finding(dead, f"died: {end} {errors.strip()[-400:]}", data)
        return [*outcomes, engine.Outcome(dead, inputs=count + 1, elapsed_s=1.0, findings=[finding])]


def _work(given: argparse.Namespace) -> int:
    """In the process of some targets, given as ``name=runs``."""
    journal = engine.Journal(given.journal)
    wanted = [(name, int(runs)) for name, _, runs in (each.partition("=") for each in given.targets)]
    with guided.instrumented() if given.guided else contextlib.nullcontext():
        known = [targets.find(name) for name, _ in wanted]
    corpora = [each.corpus() for each in known]
    if not given.guided:
        engine.limit_memory()
    for target, corpus, (_, runs) in zip(known, corpora, wanted, strict=True):
        if given.guided:
            guided.run(target, corpus, runs=runs, seed=given.seed, journal=journal, done=_tell)
        else:
            _tell(engine.run(target, corpus, runs=runs, seed=given.seed, journal=journal))
    return 0


def _tell(outcome: engine.Outcome) -> None:
    """To the parent."""
    document = dataclasses.asdict(outcome)
    for each in document["findings"]:
        each["data"] = each["data"].hex()
    print(json.dumps(document), flush=True)


def _from_document(document: dict[str, Any]) -> engine.Outcome:
    findings = [
        engine.Finding(each["target"], each["why"], bytes.fromhex(each["data"])) for each in document["findings"]
    ]
    return engine.Outcome(**(document | {"findings": findings}))


if __name__ == "__main__":
    sys.exit(main())
