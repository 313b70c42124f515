"""
What the agreement of many pods costs: commit after the last byte, by number of pods; and an unchanged plan, by tensors.

Called from: run.py. One real TCPStore; the coordinator runs the executor's own code (`persist.persist`) in this process, on
a real slot. The other pods are connections of one child process (simulated_pods.py), which sends the requests of an executor: post "plan", receive the
plan, write a file of one byte, post "result", receive the outcome. The last byte is that of the last pod, the coordinator among them: the clock is one for all
processes. Left out: the pods' own work on documents, their disks, their network. The loop of that child shares this machine's cores with coordinator and store, so
the numbers are still an upper bound for these two. Not left out: all pods write, post and ask at the same time.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import measures
import torch

from pillion import leaves, staging
from pillion.wire import arena, policy
from pillion_sidecar import channel
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.executor import session as session_module
from pillion_sidecar.executor.exchange import protocol, tcpstore
from pillion_sidecar.executor.exchange.watchdog import Watchdog
from pillion_sidecar.executor.save import persist
from pillion_sidecar.storage import opening
from pillion_sidecar.storage.local import LocalFolder

POD_COUNTS = (8, 64, 512, 2048)
GOAL_PODS = 512
"""The number of pods whose p95 has a goal."""
NUM_SAVES = 51
"""Saves of a run. The first one also agrees on the plan, and is left out."""
AGREE_TURNS = 7
CHILD_TIMEOUT_S = 60.0
RESOLVER_OPTIONS = "timeout:1 attempts:1"
"""A store of torch looks up the name of each client that connects. On a machine whose name server is slow, 2,048 clients would take minutes by the usual
5 s a failed lookup. Read by glibc's resolver at its first use in this process."""


def measure(of: measures.Settings) -> list[measures.Line]:
    os.environ.setdefault("RES_OPTIONS", RESOLVER_OPTIONS)
    lines: list[measures.Line] = []
    # Before the pods, whose threads and files are then no part of it; and in turns, as one median of 20 is 0.3 or 0.9 ms by where the two threads run.
    turns = [{num_tensors: _agree_s(of, num_tensors) for num_tensors in (100, 10_000)} for _ in range(AGREE_TURNS)]
    agreed = {num_tensors: statistics.median(turn[num_tensors] for turn in turns) for num_tensors in turns[0]}
    for num_pods in POD_COUNTS:
        lines += _commit_lines(of, num_pods)
    for num_tensors, agreed_s in agreed.items():
        lines.append(measures.Line(what=f"unchanged plan, {num_tensors} tensors", measured=agreed_s * 1e3, unit="ms"))
    lines.append(
        measures.Line(what="unchanged plan: 10,000 tensors / 100", measured=agreed[10_000] / agreed[100], goal=1.5)
    )
    return lines


class _Trainer:
    """One segment with one slot, sealed anew for each step by the client's own code."""

    def __init__(self, path: Path, num_tensors: int) -> None:
        state_dict = {"layer": {str(i): torch.zeros(16) for i in range(num_tensors)}}
        self.leaves = leaves.Collector().collect(state_dict)
        of = self.leaves.layout
        room = arena.room_bytes(of.tensors_bytes, len(of.encoded), 4096, len(of.items))
        self.segment = Segment.create(str(path), num_slots=1, stride_bytes=-(-room // (1 << 20)) * (1 << 20))
        self.segment.grow(0, room)
        self._mapping = staging.SegmentMapping(str(path))

    def save(self, context: session_module.Context, step: int, *, persisted: bool) -> tuple[float, channel.Persisted]:
        """Seal the slot (with the same tensors) and run the executor's save. Return when that began, monotonic seconds, and its outcome."""
        self._mapping.seal(
            0, leaves=self.leaves, opaque=[], step=step, rank=0, world_size=context.world_size, session=bytes(16)
        )
        wanted = channel.Persist(step=step, slot=0, persist=persisted, retention=policy.Retention())
        return time.monotonic(), persist.persist(context, wanted)

    def close(self) -> None:
        self._mapping.close()
        self.segment.close()


def _context(root: Path, between: protocol.Exchange, num_pods: int, segment: Segment) -> session_module.Context:
    parsed = policy.parse({"retention": {"keepLast": 1}}, embedded=True)
    return session_module.Context(
        session="bench",
        run_id="bench",
        world_size=num_pods,
        pods=tuple((rank,) for rank in range(num_pods)),
        local_ranks=(0,),
        root=LocalFolder(str(root)),
        segments={0: segment},
        exchange=between,
        generation=1,
        retention=parsed.retention,
        restore=parsed.restore,
        opener=opening.Opener(),
        peer_timeout_s=600.0,
        persist_timeout_s=600.0,
        write_threads=2,
        watch=Watchdog(storage_timeout_s=120.0, store_timeout_s=120.0),
    )


def _commit_lines(of: measures.Settings, num_pods: int) -> list[measures.Line]:
    keep, view = tcpstore.host("127.0.0.1", "bench/")
    between = tcpstore.StoreExchange(view, keep, [(rank,) for rank in range(num_pods)], 0)
    own_bytes, ends, own = [], [], []
    with measures.scratch(of) as root:
        trainer = _Trainer(root / "segment", 16)
        script = str(Path(__file__).with_name("simulated_pods.py"))
        (root / "run").mkdir()
        arguments = [sys.executable, script, str(keep.port), str(root / "run"), trainer.leaves.layout.digest]
        arguments += [str(NUM_SAVES), *map(str, range(1, num_pods))]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        try:
            context = _context(root / "run", between, num_pods, trainer.segment)
            for step in range(1, NUM_SAVES + 1):
                before_s = time.process_time()
                begun, outcome = trainer.save(context, step, persisted=True)
                own.append(time.process_time() - before_s)
                own_bytes.append(begun + outcome.persist_s)
                ends.append(own_bytes[-1] + outcome.commit_s)
            last_bytes = json.loads(child.communicate(timeout=CHILD_TIMEOUT_S)[0])
        except BaseException:
            child.kill()
            raise
        finally:
            child.wait(CHILD_TIMEOUT_S)
            trainer.close()
    # Not the name of the records until 2026-11-30, whose last byte was the coordinator's own, and whose pods were threads on the same cores.
    name = f"commit after the last byte of all pods, {num_pods} simulated"
    counted = tuple(
        end - max(pair) for end, pair in zip(ends[1:], zip(own_bytes[1:], last_bytes[1:], strict=True), strict=True)
    )
    p95_s = sorted(counted)[math.ceil(0.95 * len(counted)) - 1]
    goal = 0.1 if num_pods == GOAL_PODS else None
    return [
        measures.Line(what=f"{name}, p95 of {len(counted)}", measured=p95_s, unit="s", goal=goal, samples=counted),
        measures.median_line(f"{name}, a pod", [each / num_pods * 1e6 for each in counted], unit="us"),
        # The simulated pods are on the same cores. This is what a coordinator with a core of its own would take at least.
        measures.median_line(f"{name}, the coordinator's processor", own[1:], unit="s"),
    ]


def _agree_s(of: measures.Settings, num_tensors: int) -> float:
    """Seconds from the slot to the plan when nothing changed, over a real store with one pod in it: the median of 20."""
    keep, view = tcpstore.host("127.0.0.1", "bench/")
    between = tcpstore.StoreExchange(view, keep, [(0,)], 0)
    times = []
    with measures.scratch(of) as root:
        trainer = _Trainer(root / "segment", num_tensors)
        context = _context(root, between, 1, trainer.segment)
        for step in range(1, 22):
            times.append(trainer.save(context, step, persisted=False)[1].persist_s)
        trainer.close()
    return sorted(times[1:])[len(times) // 2]
