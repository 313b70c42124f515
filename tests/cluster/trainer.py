"""
A trainer for the tests on a cluster: small, quick, and able to say whether what it loaded is what it saved.

Runs in a pod, from a ConfigMap, with the pod's own Python and torch, and with whatever client library injection has brought.
The state of step N and rank R is a function of both, under a name of R's own, so a load is checked bit for bit without another run. Events go to the standard output,
one JSON object a line.

Environment: STEPS, STEP_S, MIB (of state a rank); DIE_AT: the step at which rank 0 kills itself, unless it has loaded
something (under torchrun only: the first process of a container cannot);
HANG_AT: the step after which every rank stands still for ever and ignores SIGTERM, unless it has loaded something;
EXIT: the exit status at the end; EXIT_AT: the step after which the end comes early, unless it has loaded something.
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import pillion


def main() -> None:
    steps, step_s = int(os.environ.get("STEPS", "1000000")), float(os.environ.get("STEP_S", "0.1"))
    distributed = "RANK" in os.environ
    rank = 0
    if distributed:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    numel = int(float(os.environ.get("MIB", "4")) * 2**20 / 4)
    say("started", rank=rank, torch=torch.__version__, client=os.path.dirname(pillion.__file__))
    with pillion.Checkpointer() as checkpointer:
        weights = values(0, rank, numel)
        state = {f"weights{rank}": weights, "step": 0}
        loaded = checkpointer.load(state)
        if loaded is not None:
            report = checkpointer.last_load
            assert report is not None
            equal = state["step"] == loaded and torch.equal(weights, values(loaded, rank, numel))
            say(
                "loaded",
                rank=rank,
                step=loaded,
                tier=str(report.tier),
                equal=bool(equal),
                elapsed_s=report.elapsed_s,
                refused=dict(report.refused),
            )
            if not equal:
                sys.exit("what was loaded is not what was saved")
        handles = []
        for step in range((loaded or 0) + 1, steps + 1):
            weights.copy_(values(step, rank, numel))
            state["step"] = step
            if distributed:
                dist.barrier()
            if rank == 0 and loaded is None and step == int(os.environ.get("DIE_AT", "-1")):
                say("dies", step=step)
                os.kill(os.getpid(), signal.SIGKILL)
            if checkpointer.due(step):
                handles.append(checkpointer.save(state, step))
            for handle in [each for each in handles if each.committed.done()]:
                handles.remove(handle)
                if error := handle.committed.exception():
                    say("failed", rank=rank, step=handle.step, error=str(error))
                else:
                    # One that stays in memory has no path.
                    event = "committed" if handle.committed.result().path else "snapshot"
                    say(event, rank=rank, step=handle.step)
            if step % 20 == 0:
                say("step", rank=rank, step=step)
            if loaded is None and step == int(os.environ.get("HANG_AT", "-1")):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                say("hangs", rank=rank, step=step)
                while True:
                    signal.pause()
            if loaded is None and step == int(os.environ.get("EXIT_AT", "-1")):
                break
            time.sleep(step_s)
        say("trained", rank=rank, step=steps)
    if distributed:
        dist.destroy_process_group()
    sys.exit(int(os.environ.get("EXIT", "0")))


def values(step: int, rank: int, numel: int) -> torch.Tensor:
    """A rank's state after a step."""
    return torch.arange(numel, dtype=torch.float32) + step * 3 + rank * 7


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, "time": time.time(), **fields}), flush=True)


if __name__ == "__main__":
    main()
