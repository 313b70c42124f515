"""
The whole of: `make soak`: thousands of saves and restores, of a state whose layout and texts change, with retention and elastic restarts (one
pod to three), and what grows meanwhile.

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
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from campaign.__main__ import warm
from pillion import checkpointer
from process import ranks as processes
from process.ranks import Job, Peer, Ranks
from support import leaks
from support.deadlines import Deadline

ROUNDS_AN_ATTEMPT: Final = 250
ROUNDS_A_LOAD: Final = 25
ROUNDS_A_SAMPLE: Final = 125
WORLDS: Final = (2, 1, 2, 3)
"""Pods of the attempts in turn, a rank each: every restart finds another world than the one that saved."""
PODS: Final = ("a", "b", "c")
LOGGED: Final = 50
"""Entries of the state's log at most: it grows with each save, so that hardly one has the layout of the save before, and begins again."""
NUMEL: Final = 500_000
"""Of the whole state; does not divide by three."""
SETTLED: Final = len(WORLDS) * ROUNDS_AN_ATTEMPT // ROUNDS_A_SAMPLE
"""Samples until every world was there once: allocators, plans and page tables are warm then, and the third pod's sidecar has its log."""
MAY_GROW: Final = {
    "supervisor_rss_mib": 3.0,
    "executor_rss_mib": 8.0,
    "store_keys": 2,
    "supervisor_threads": 3,
    "supervisor_fds": 1,
}
"""Between the first settled sample and the last; beyond it something is kept. A new executor after a restart differs by a few MiB, and a
sample falls between two phases, whose keys are there or not. The supervisor's pool makes a thread when all it has are busy, six at most; one
of them may have a file open."""


def values(step: int) -> torch.Tensor:
    """The whole state after a step, in any world."""
    return torch.arange(NUMEL, dtype=torch.float32) + step * 3


def shard(step: int, peer: Peer) -> torch.Tensor:
    """A rank's part of it."""
    return values(step).chunk(peer.world_size)[peer.rank]


def log(step: int) -> dict[str, Any]:
    """What a trainer keeps beside its weights: a history, and texts of all lengths."""
    history = [{"loss": number / step, "step": number} for number in range(step % LOGGED)]
    return {"history": history, "note": f"{step:06} " * (step % LOGGED) * 100}


def train(peer: Peer) -> None:
    """Rounds of one attempt: a save each, a load now and then, checked."""
    local = torch.zeros_like(shard(0, peer))
    weights = local
    if peer.world_size > 1:
        mesh = init_device_mesh("cpu", (peer.world_size,))
        weights = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([NUMEL]), stride=(1,))
    begin = int(os.environ["SOAK_BEGIN"])
    with checkpointer.Checkpointer(os.environ["SOAK_ROOT"], policy={"retention": {"keepLast": 2}}) as opened:
        state: dict[str, Any] = {"weights": weights, "step": 0} | log(begin)
        loaded = opened.load(state) or 0
        assert loaded == begin, f"step {begin} was told to be committed, and {loaded} was loaded"
        assert begin == 0 or torch.equal(local, shard(begin, peer))
        for step in range(begin + 1, begin + ROUNDS_AN_ATTEMPT + 1):
            local.copy_(shard(step, peer))
            state |= {"step": step} | log(step)
            opened.save(state, step).result(Deadline.COMMITTED.s)
            if step % ROUNDS_A_LOAD == 0:
                local.zero_()
                assert opened.load(state) == step
                assert torch.equal(local, shard(step, peer))
            if step % ROUNDS_A_SAMPLE == 0:
                status = processes.status(opened)
                peer.tell((step, status["pid"], status["executor_pid"], opened._session.runtime_dir))
                peer.hear()
        # Ends as a crash does: the arena stays, and the next attempt finds it.
        os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--report", type=Path)
    of = parser.parse_args()
    least = (2 * len(WORLDS)) * ROUNDS_AN_ATTEMPT
    if of.rounds < least:
        parser.error(f"--rounds {of.rounds}: at least {least} are allowed, so that every world comes twice")
    warm()
    os.environ[leaks.MARK_VARIABLE] = mark = f"soak-{uuid.uuid4().hex}"
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pillion-soak-") as folder:
        root = Path(folder) / "runs"
        output = Path(folder) / "output"
        output.mkdir()
        group = Ranks(output, mark)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            for attempt in range(-(-of.rounds // ROUNDS_AN_ATTEMPT)):
                env = {"SOAK_ROOT": str(root), "SOAK_BEGIN": str(attempt * ROUNDS_AN_ATTEMPT)}
                pods = PODS[: WORLDS[attempt % len(WORLDS)]]
                job = group.start(train, num_ranks=len(pods), pods=pods, env=env, store=store, attempt=attempt)
                for _ in range(ROUNDS_AN_ATTEMPT // ROUNDS_A_SAMPLE):
                    samples.append(sample(job, store, root))
                    print(json.dumps(samples[-1]), flush=True)
                    job.say()
                for trainer in job.trainers:
                    assert trainer.wait() == 0
        finally:
            group.end()
    if of.report is not None:
        of.report.write_text("".join(json.dumps(each) + "\n" for each in samples))
    return judge(samples)


def sample(job: Job, store: dist.TCPStore, root: Path) -> dict[str, Any]:
    """What is there now, of the coordinator's pod."""
    (step, supervisor, executor, runtime_dir), *_ = job.hear()
    found: dict[str, Any] = {"round": step, "pods": len(job.trainers)}
    for name, pid in (("supervisor", supervisor), ("executor", executor)):
        process = psutil.Process(pid)
        with process.oneshot():
            found[f"{name}_rss_mib"] = round(process.memory_info().rss / 2**20, 1)
            found[f"{name}_fds"] = process.num_fds()
            found[f"{name}_threads"] = process.num_threads()
    # Its log lies there as well, and is turned over at a size that a soak does not reach.
    blocks = sum(path.stat().st_blocks for path in Path(runtime_dir).glob("*.arena"))
    found["arena_mib"] = round(blocks * 512 / 2**20, 1)
    # gloo's stay behind at each start of the ranks; without Pillion as well.
    found["store_keys"] = sum("pillion" in key for key in store.list_keys())
    found["files"] = sum(1 for path in root.rglob("*") if path.is_file())
    return found


def judge(samples: list[dict[str, Any]]) -> int:
    """0 when all is flat: each world by itself, as more pods have more keys and files."""
    settled = samples[SETTLED:]
    grown = {}
    for pods in sorted(set(WORLDS)):
        alike = [each for each in settled if each["pods"] == pods]
        for key in alike[0] if alike else ():
            if key != "round" and alike[-1][key] - alike[0][key] > MAY_GROW.get(key, 0.0):
                grown[f"{pods} pods: {key}"] = (alike[0][key], alike[-1][key])
    print(json.dumps({"grown": grown, "attempts": len(samples) * ROUNDS_A_SAMPLE // ROUNDS_AN_ATTEMPT}))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
