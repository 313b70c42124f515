"""
The whole of: `make soak`: thousands of saves and restores on two pods, with retention and elastic restarts, and what grows meanwhile.

Called from: the Makefile. Prints a line a sample, and ends with status 1 when something that must be flat is not.
Must never: count what belongs to the trainers; they are torch's.
"""

import argparse
import json
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from campaign.__main__ import warm
from pillion import checkpointer
from process import ranks as processes
from process.ranks import Job, Peer, Ranks
from support import leaks
from support.deadlines import Deadline

ROUNDS_AN_ATTEMPT: Final = 250
ROUNDS_A_LOAD: Final = 25
ROUNDS_A_SAMPLE: Final = 125
NUMEL: Final = 500_000
SETTLED_SHARE: Final = 0.25
"""The first quarter warms up: allocators, plans, page tables."""
MAY_GROW: Final = {"supervisor_rss_mib": 3.0, "executor_rss_mib": 8.0, "store_keys": 4}
"""Between the first settled sample and the last; beyond it something is kept. A new executor after a restart differs by a few MiB, and a
sample falls between two phases, whose keys are there or not."""


GLOO_KEYS: Final = 2
"""Keys that torch's gloo leaves in the store for each start of two ranks; without Pillion as well."""


def values(step: int, rank: int) -> torch.Tensor:
    return torch.arange(NUMEL, dtype=torch.float32) + step * 3 + rank * 7


def train(peer: Peer) -> None:
    """Rounds of one attempt: a save each, a load now and then, checked."""
    name = f"weights{peer.rank}"
    policy = {"retention": {"keepLast": 2}}
    with checkpointer.Checkpointer(os.environ["SOAK_ROOT"], policy=policy) as opened:
        state: dict[str, Any] = {name: torch.zeros(NUMEL), "step": 0}
        begin = opened.load(state) or 0
        for step in range(begin + 1, begin + ROUNDS_AN_ATTEMPT + 1):
            state[name].copy_(values(step, peer.rank))
            state["step"] = step
            opened.save(state, step).result(Deadline.COMMITTED.s)
            if step % ROUNDS_A_LOAD == 0:
                state[name].zero_()
                assert opened.load(state) == step
                assert torch.equal(state[name], values(step, peer.rank))
            if step % ROUNDS_A_SAMPLE == 0:
                status = processes.status(opened)
                peer.tell((step, status["pid"], status["executor_pid"], opened._session.runtime_dir))
                peer.hear()
        # Ends as a crash does: the arena stays, and the next attempt finds it.
        os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--report", type=Path)
    of = parser.parse_args()
    warm()
    os.environ[leaks.MARK_VARIABLE] = mark = f"soak-{uuid.uuid4().hex}"
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pillion-soak-") as folder:
        root = Path(folder) / "runs"
        output = Path(folder) / "output"
        output.mkdir()
        group = Ranks(output, mark)
        store = None
        try:
            for attempt in range(-(-of.rounds // ROUNDS_AN_ATTEMPT)):
                env = {"SOAK_ROOT": str(root)}
                job = group.start(train, num_ranks=2, pods=("a", "b"), env=env, store=store, attempt=attempt)
                store = job.store
                for _ in range(ROUNDS_AN_ATTEMPT // ROUNDS_A_SAMPLE):
                    samples.append(sample(job, root, attempt))
                    print(json.dumps(samples[-1]), flush=True)
                    job.say()
                for trainer in job.trainers:
                    assert trainer.wait() == 0
        finally:
            group.end()
    if of.report is not None:
        of.report.write_text("".join(json.dumps(each) + "\n" for each in samples))
    return judge(samples)


def sample(job: Job, root: Path, attempt: int) -> dict[str, Any]:
    """What is there now, of the coordinator's pod."""
    (step, supervisor, executor, runtime_dir), _ = job.hear()
    found: dict[str, Any] = {"round": step}
    for name, pid in (("supervisor", supervisor), ("executor", executor)):
        process = psutil.Process(pid)
        with process.oneshot():
            found[f"{name}_rss_mib"] = round(process.memory_info().rss / 2**20, 1)
            found[f"{name}_fds"] = process.num_fds()
            found[f"{name}_threads"] = process.num_threads()
    blocks = sum(path.stat().st_blocks for path in Path(runtime_dir).iterdir())
    found["arena_mib"] = round(blocks * 512 / 2**20, 1)
    assert job.store is not None
    found["store_keys"] = job.store.num_keys() - GLOO_KEYS * (attempt + 1)
    found["files"] = sum(1 for path in root.rglob("*") if path.is_file())
    return found


def judge(samples: list[dict[str, Any]]) -> int:
    """0 when all is flat."""
    settled = samples[int(len(samples) * SETTLED_SHARE) :]
    first, last = settled[0], settled[-1]
    grown = {}
    for key in first:
        if key == "round":
            continue
        if last[key] - first[key] > MAY_GROW.get(key, 0.0):
            grown[key] = (first[key], last[key])
    print(json.dumps({"grown": grown, "attempts": len(samples) * ROUNDS_A_SAMPLE // ROUNDS_AN_ATTEMPT}))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
