"""
All benchmarks, and one table: what, measured, goal, met or missed.

    python benchmarks/run.py [--only stall,apart,persist,step,load,verify,commit,memory,objects,peers] [--bytes 1GiB] [--repeat 7]
                             [--dir DIR] [--json FILE] [--await-quiet SECONDS]

Every ratio comes from one run: the thing and its floor are measured in turn. The exit status is 0 whether goals are met or
not: on a shared machine a missed one is a fact to look at, not a failure. Before each benchmark it looks whether the machine is
quiet, and says so in the table and in the record. Leaves nothing behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import bench_apart
import bench_commit
import bench_load
import bench_memory
import bench_objects
import bench_peers
import bench_persist
import bench_stall
import bench_verify
import floors
import machine
import measures

BENCHMARKS: dict[str, Callable[[measures.Settings], list[measures.Line]]] = {
    "stall": bench_stall.measure,
    "apart": bench_apart.measure,
    "persist": bench_persist.measure,
    "step": bench_persist.measure_steps,
    "load": bench_load.measure,
    "verify": bench_verify.measure,
    "commit": bench_commit.measure,
    "memory": bench_memory.measure,
    "objects": bench_objects.measure,
    "peers": bench_peers.measure,
}


def main() -> None:
    # The store warns of each of our 512 simulated pods that it has no host name. Read when torch first logs.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser = argparse.ArgumentParser(description="Measure Pillion against the machine and against its peers.")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--bytes", type=floors._parsed_bytes, default=1 << 30, help="size of the state, like 1GiB")
    parser.add_argument("--repeat", type=int, default=7, help="samples of each measure; the median is shown")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="a directory on the disk to measure"
    )
    parser.add_argument("--json", type=Path, help="write every sample here")
    parser.add_argument(
        "--await-quiet",
        type=float,
        default=0.0,
        help="seconds to wait before each benchmark until the machine is quiet",
    )
    args = parser.parse_args()
    wanted = args.only.split(",")
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: there is no directory {args.json.parent}")
    of = measures.Settings(num_bytes=args.bytes, repeat=args.repeat, directory=args.dir)
    facts = {"command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]), **machine.facts(args.dir)}
    print("; ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    lines: list[measures.Line] = []
    busy: dict[str, float] = {}
    for name in wanted:
        busy[name] = machine.await_quiet(args.await_quiet)
        begin_s = time.perf_counter()
        with measures.muted():
            found = BENCHMARKS[name](of)
        quiet = "" if busy[name] <= machine.QUIET_SHARE else ": NOT QUIET"
        print(f"\n{name}: {time.perf_counter() - begin_s:.0f} s, {busy[name]:.0%} busy before{quiet}", flush=True)
        _print_table(found)
        lines += [dataclasses.replace(line, group=name) for line in found]
        if args.json is not None:  # after each one, so that a later one that fails costs nothing
            rows = [dataclasses.asdict(line) | {"verdict": line.verdict} for line in lines]
            document = {"facts": facts, "busy": busy, "lines": rows}
            args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    missed = [line.what for line in lines if line.verdict == "MISSED"]
    print(f"\n{sum(line.verdict == 'met' for line in lines)} goals met, {len(missed)} missed")


def _print_table(lines: Sequence[measures.Line]) -> None:
    for line in lines:
        goal = "" if line.goal is None else f"{line.sense} {line.goal:g}"
        spread = f"{min(line.samples):.3f} to {max(line.samples):.3f}" if line.samples else ""
        print(
            f"  {line.what:62} {line.measured:9.3f} {line.unit:4} {goal:8} {line.verdict:7} {spread} {line.note}".rstrip()
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
