"""
Memory of the sidecar beside the arena: supervisor and executor, with one pod and with several (a client of the job's store).

Called from: run.py. Counted are RssAnon and RssFile of both processes; the arena's pages are RssShmem, and are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys

import measures

from pillion.wire import control

NUM_SAVES = 50


def measure(of: measures.Settings) -> list[measures.Line]:
    state_dict = measures.state(min(of.num_bytes, 64 << 20), 64)
    with measures.scratch(of) as root, measures.checkpointer(root) as checkpointer:
        measures.prepare(checkpointer, state_dict)
        status = checkpointer._session.request(control.ReadStatus(), measures.SAVE_TIMEOUT_S)
        pids = [status.pid, status.executor_pid or 0]
        sizes = []
        for step in range(1, NUM_SAVES + 11):
            checkpointer.save(state_dict, step).result(measures.SAVE_TIMEOUT_S)
            sizes.append(sum(private_mib(pid) for pid in pids))
    lines = [
        measures.Line(what="sidecar beside the arena, one pod", measured=sizes[-1], unit="MiB", goal=400.0),
        # The first ten saves fill caches (layouts, plans, the allocator's own).
        measures.Line(
            what=f"its growth over {NUM_SAVES} saves",
            measured=(sizes[-1] / sizes[9] - 1) * 100,
            unit="%",
            goal=1.0,
        ),
    ]
    with_store = _bare_mib("import pillion_sidecar.executor.save.persist, pillion_sidecar.executor.exchange.tcpstore")
    hosting = _bare_mib("import pillion_sidecar.executor.save.persist, pillion_sidecar.executor.exchange.torch_store")
    without = _bare_mib("import pillion_sidecar.executor.save.persist")
    lines.append(
        measures.Line(
            what="the same, several pods",
            measured=sizes[-1] + with_store - without,
            unit="MiB",
            goal=400.0,
            note=f"one pod's plus what the import takes in a bare process ({with_store - without:.1f} MiB)",
        )
    )
    lines.append(
        measures.Line(
            what="the same, where rank 0's sidecar hosts the store (store: Own)",
            measured=sizes[-1] + hosting - without,
            unit="MiB",
            note="it imports torch for that",
        )
    )
    return lines


def private_mib(pid: int) -> float:
    """RssAnon + RssFile of a process, MiB."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) / 1024


def _bare_mib(statement: str) -> float:
    code = f"{statement}\nimport sys\nprint('ready', flush=True)\nsys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    with process:
        if process.stdout is None or process.stdin is None:
            raise RuntimeError("no pipes")
        process.stdout.readline()
        found = private_mib(process.pid)
        process.stdin.close()
    return found
