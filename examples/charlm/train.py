"""
The whole of: a training run that survives the death of a rank, under torchrun, on CPUs.

Called from: a person, or demo.py:

    torchrun --nproc-per-node=2 --max-restarts=1 examples/charlm/train.py --parallel fsdp --root /tmp/checkpoints

or in the pods of a job, as in examples/cluster/job.yaml.

Must never: do more for its checkpoints than the lines marked with "Pillion" show; they are what a user has to write.
"""

import argparse
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import distributed
from torch.nn import functional

import data
import pillion
import training

SEED = 20
ROWS_PER_RANK = 2
CONTEXT = 64


def main() -> None:
    """
    One attempt of one rank. torchrun starts it anew after a death, with TORCHELASTIC_RESTART_COUNT one higher.
    """
    args = parse()
    training.be_deterministic()
    rank = training.join()
    run = training.build(args.parallel, seed=SEED, num_steps=args.steps)
    text = data.load()
    with contextlib.ExitStack() as stack:
        losses = open_lines(stack, args.losses if rank == 0 else None)
        report = open_lines(stack, args.report if rank == 0 else None)

        checkpointer = None if args.no_checkpoint else stack.enter_context(open_checkpointer(args))  # Pillion
        handles: list[pillion.SaveHandle] = []

        if checkpointer is not None and checkpointer.find() is not None:  # Pillion
            # Only where there is something to load: the call makes the state of a new optimizer by a step of it, and Adam counts its
            # steps. A run that starts from nothing trains as it does without checkpoints.
            state_dict = run.state_dict(rank)
            checkpointer.load(state_dict)  # Pillion
            run.load_state_dict(state_dict, rank)
            last = checkpointer.last_load
            assert last is not None
            say(report, "loaded", step=last.step, tier=str(last.tier), elapsed_s=last.elapsed_s)

        begun = time.monotonic()
        first_step = run.step + 1
        for step in range(first_step, args.steps + 1):
            loss = one_step(run, text, step, rank, args)
            if losses is not None:
                print(json.dumps({"step": step, "loss": loss}), file=losses, flush=True)
            if checkpointer is not None and checkpointer.due(step):  # Pillion
                handles.append(checkpointer.save(run.state_dict(rank), step))  # Pillion
        elapsed_s = time.monotonic() - begun

        if checkpointer is not None:
            checkpointer.wait(timeout_s=60)  # Pillion
        tell(report, handles)
        say(report, "trained", steps=args.steps - first_step + 1, elapsed_s=elapsed_s)

        whole = run.whole()
        if rank == 0 and args.final is not None:
            torch.save(whole, args.final)
    distributed.destroy_process_group()


def open_checkpointer(args: argparse.Namespace) -> pillion.Checkpointer:
    """
    In a cluster everything comes from the CheckpointPolicy that the pod's annotation names; without one it is said here.
    """
    if "PILLION_RUNTIME_DIR" in os.environ:
        return pillion.Checkpointer()
    return pillion.Checkpointer(
        args.root,
        policy={
            "trigger": {"periodSteps": args.save_every, "snapshotSteps": args.snapshot_every},
            "retention": {"keepLast": 2},
        },
    )


def one_step(run: training.Training, text: torch.Tensor, step: int, rank: int, args: argparse.Namespace) -> float:
    """
    Trains one step; gives this rank's loss before it. Dies in the middle when it was asked to.
    """
    rows_BT, targets_BT = data.batch(text, seed=SEED, step=step, rank=rank, num_rows=ROWS_PER_RANK, context=CONTEXT)
    logits_BTV = run.network(rows_BT)
    loss = functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    loss.backward()
    if (rank, step) == (args.kill_rank, args.kill_at_step) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    run.step = step
    return loss.item()


def tell(report: TextIO | None, handles: list[pillion.SaveHandle]) -> None:
    """
    Reports what each save cost the training loop, and what became of it.
    """
    for handle in handles:
        say(report, "saved", step=handle.step, stall_s=handle.stall_s)
        if handle.committed.done() and handle.committed.exception() is None:
            checkpoint = handle.committed.result()
            # A save that the policy kept in memory only has no path.
            if checkpoint.path:
                say(
                    report,
                    "committed",
                    step=checkpoint.step,
                    path=checkpoint.path,
                    bytes=checkpoint.size_bytes,
                    persist_s=checkpoint.persist_s,
                )
        elif handle.committed.done():
            say(report, "failed", step=handle.step, reason=str(handle.committed.exception()))


def say(report: TextIO | None, event: str, **fields: Any) -> None:
    """
    One line of JSON, on rank 0.
    """
    if report is not None:
        print(json.dumps({"event": event, **fields}), file=report, flush=True)


def open_lines(stack: contextlib.ExitStack, path: Path | None) -> TextIO | None:
    """
    Opens a file to append lines: the attempt after a death goes on in the same one.
    """
    return None if path is None else stack.enter_context(path.open("a", encoding="ascii"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a character model, with checkpoints in a sidecar.")
    parser.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--root", default="checkpoints", help="where checkpoints go, without a cluster: a directory, or a bucket's URL"
    )
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS", help="to storage")
    parser.add_argument("--snapshot-every", type=int, default=5, metavar="STEPS", help="to memory")
    parser.add_argument("--no-checkpoint", action="store_true", help="train without Pillion")
    parser.add_argument("--losses", type=Path, help="rank 0 appends a line of JSON for each step")
    parser.add_argument("--report", type=Path, help="rank 0 appends a line of JSON for each load, save and commit")
    parser.add_argument("--final", type=Path, help="rank 0 writes the whole final state here, with torch.save")
    parser.add_argument("--kill-rank", type=int, help="this rank kills itself, in the first attempt only ...")
    parser.add_argument("--kill-at-step", type=int, help="... in the middle of this step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
