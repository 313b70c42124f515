"""
`pillion doctor`: what this machine or a job's pods see, and why something does not work. Called from: `cli.main`.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from pillion.errors import PillionError
from pillion.wire import names
from pillion_sidecar import settings
from pillion_sidecar.checkpoint import ownership
from pillion_sidecar.cli import diagnosis, inventory, kubernetes, output, places, sidecars
from pillion_sidecar.cli.diagnosis import Finding, Level
from pillion_sidecar.cli.exits import Exit
from pillion_sidecar.storage import directio
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.stretches import Piece, Run

HEADS: Final = ("CHECK", "RESULT", "WHAT")
PROBE_BYTES: Final = 32 * 2**20
"""Size of the file that is written to storage and read back, for its rate."""
DISTRIBUTIONS: Final = ("pillion", "pillion-sidecar", "torch", "obstore")
LEAST_SHARED_BYTES: Final = 2**30
"""Free bytes of /dev/shm below which a warning is given. Containers often have 64 MiB."""
SHOWN_FAILURES: Final = 5
"""Maximum of a sidecar's last failures that are shown."""


def run(arguments: argparse.Namespace) -> Exit:
    """Print the findings. FOUND: one of them is a problem."""
    if arguments.cluster:
        namespace, name = kubernetes.parse(arguments.root or "")
        findings = list(diagnosis.of_job(kubernetes.read(namespace, name), time.time()))
    else:
        findings = [*_of_machine(), *_of_sidecars(arguments), *_of_root(arguments)]
    if arguments.output == "json":
        output.show_json([{"check": each.check, "result": str(each.level), "what": each.what} for each in findings])
    else:
        output.show(output.table(HEADS, [[each.check, each.level, each.what] for each in findings]))
    return Exit.FOUND if any(each.level is Level.PROBLEM for each in findings) else Exit.WELL


def _of_machine() -> Iterator[Finding]:
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    yield Finding(
        "versions", Level.OK, ", ".join([*found, f"Python {platform.python_version()}", f"Linux {platform.release()}"])
    )
    own, client = (metadata.version(name) for name in ("pillion-sidecar", "pillion"))
    if own != client:
        yield Finding("versions", Level.WARNING, f"sidecar {own} and client {client} are of different releases")
    try:
        shared = shutil.disk_usage("/dev/shm")
    except OSError as err:
        yield Finding(
            "shared memory", Level.WARNING, f"/dev/shm: {err.strerror}; the arena is then in a temporary directory"
        )
        return
    level = Level.OK if shared.free >= LEAST_SHARED_BYTES else Level.WARNING
    hint = "" if level is Level.OK else ": two copies of a rank's state must fit"
    yield Finding(
        "shared memory", level, f"/dev/shm has {output.size(shared.free)} free of {output.size(shared.total)}{hint}"
    )


def _of_sidecars(arguments: argparse.Namespace) -> Iterator[Finding]:
    found = sidecars.find(os.environ, arguments.runtime_dir)
    if not found:
        yield Finding("sidecar", Level.OK, "none of this user runs on this machine")
    for each in found:
        yield from _of_sidecar(each)


def _of_sidecar(found: sidecars.Found) -> Iterator[Finding]:
    status = found.status
    if status is None:
        yield Finding("sidecar", Level.WARNING, f"{found.problem}: it hangs, or has ended and left its directory")
        return
    metrics = status.metrics
    yield Finding(
        "sidecar",
        Level.OK,
        f"pid {status.pid}, release {status.release or 'older'}, run {status.run_id or output.NOTHING}, root {status.root or output.NOTHING}",
    )
    missing = sorted(set(status.local_ranks) - set(status.connected_ranks))
    level = Level.WARNING if missing else Level.OK
    away = f"; not connected: {', '.join(map(str, missing))}" if missing else ""
    yield Finding(
        "ranks",
        level,
        f"{len(status.connected_ranks)} of {len(status.local_ranks)} of this pod, world size {status.world_size}{away}",
    )
    arena = sum(entry.stat().st_blocks * 512 for entry in os.scandir(found.runtime_dir) if entry.is_file())
    yield Finding("arena", Level.OK, f"{output.size(arena)} in {found.runtime_dir}, {len(status.saves)} saves in it")
    last = metrics.get("last_committed_step", -1)
    when = metrics.get("last_committed_timestamp", 0)
    committed = f"the last is step {last}, {output.age(time.time() - when)} ago" if last >= 0 else "none yet"
    counts = f"{metrics.get('saves_committed', 0)} committed, {metrics.get('saves_failed', 0)} failed, {metrics.get('snapshots', 0)} snapshots"
    yield Finding(
        "saves", Level.PROBLEM if metrics.get("saves_failed") and last < 0 else Level.OK, f"{committed}; {counts}"
    )
    if status.interval:
        yield Finding("interval", Level.OK, status.interval)
    for problem in status.problems:
        yield Finding("saves", Level.PROBLEM, problem)
    for failure in status.failures[-SHOWN_FAILURES:]:
        yield Finding("failure", Level.WARNING, failure)


def _of_root(arguments: argparse.Namespace) -> Iterator[Finding]:
    text = arguments.root or os.environ.get(names.ENV_ROOT, "")
    options, ca_file = places.storage_options(arguments, os.environ)
    source = arguments.policy or os.environ.get(names.ENV_POLICY)
    if source:
        yield Finding(
            "policy", Level.OK, f"{source if settings.is_policy_file(source) else 'of ' + names.ENV_POLICY} is valid"
        )
    if not text:
        yield Finding("storage", Level.OK, "not looked at: name a ROOT")
        return
    root, _ = places.open_new(text, options, ca_file)
    try:
        problems = root.check()
        yield from (Finding("storage", Level.PROBLEM, problem) for problem in problems)
        if problems:
            return
        yield Finding("storage", Level.OK, _rates(root))
        owner = ownership.living(root, settings.Settings(runtime_dir="").owner_silent_s)
        yield Finding(
            "owner",
            Level.OK,
            f"{owner.name} uses the root, or did within the last minutes" if owner else "no training uses the root",
        )
        yield from diagnosis.of_steps(inventory.of_root(root))
    except OSError as err:
        yield Finding("storage", Level.PROBLEM, places.explain(err))
    except PillionError as err:
        yield Finding("storage", Level.PROBLEM, str(err))


def _rates(root: Folder) -> str:
    """Write a file, read it back, remove it, and return the rates for people. Raises: OSError."""
    folder, name = root.below(names.INTERNAL_DIR), names.data_file(0, 0, f"doctor-{secrets.token_hex(4)}")
    memory = memoryview(mmap.mmap(-1, PROBE_BYTES))
    memory[:] = os.urandom(2**20) * (PROBE_BYTES // 2**20)
    folder.make()
    try:
        started = time.monotonic()
        folder.write({name: [Run(0, PROBE_BYTES)]}, memory, num_threads=directio.NUM_THREADS)
        written = time.monotonic()
        folder.read_into(name, memory, [Piece(0, 0, PROBE_BYTES)])
        read = time.monotonic()
    finally:
        folder.delete([name])
    rates = [
        f"{output.size(int(PROBE_BYTES / max(seconds, 1e-6)))}/s" for seconds in (written - started, read - written)
    ]
    return f"{root} takes {rates[0]} and gives {rates[1]} ({output.size(PROBE_BYTES)}, one file)"
