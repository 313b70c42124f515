"""
Memory of the sidecar beside the arena: supervisor and executor, with one pod, and in a live job of two pods (which
speak to the job's store).

Called from: run.py. Counted are RssAnon and RssFile of both processes; the arena's pages are RssShmem, and are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import measures

from pillion.wire import control

NUM_SAVES = 50
PODS_TIMEOUT_S = 300.0
"""Timeout for a job of two pods: it imports torch twice, and saves `NUM_SAVES` times."""


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
    for store, what, goal in (
        ("Prefix", "the same, the larger of two live pods", 400.0),
        ("Own", "the same, where rank 0's sidecar hosts the store (store: Own)", None),
    ):
        lines.append(_of_pods(of, store, what, goal))
    return lines


def _of_pods(of: measures.Settings, store: str, what: str, goal: float | None) -> measures.Line:
    """The sidecar of two live pods that takes more, after `NUM_SAVES` saves of their job."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("pods_memory.py"))
    num_bytes = min(of.num_bytes, 64 << 20)
    with measures.scratch(of) as root:
        done = subprocess.run(
            [*torchrun, script, str(root / "run"), store, str(NUM_SAVES), str(num_bytes)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=PODS_TIMEOUT_S,
            check=True,
        )
    pods = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(pods) != 2:
        raise RuntimeError(f"two pods, and {len(pods)} answers: {done.stdout}")
    supervisor, executor = max((pod["sizes"][-1] for pod in pods), key=sum)
    note = f"supervisor {supervisor:.0f}, executor {executor:.0f}; " + ", ".join(
        f"rank {pod['rank']}'s sidecar {sum(pod['sizes'][-1]):.0f}" for pod in sorted(pods, key=lambda pod: pod["rank"])
    )
    return measures.Line(what=what, measured=supervisor + executor, unit="MiB", goal=goal, note=note)


def private_mib(pid: int) -> float:
    """RssAnon + RssFile of a process, MiB."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) / 1024
