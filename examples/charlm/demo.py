"""
The whole of: the story that Pillion tells, run and checked on this machine.

Called from: `make demo`. Exit status 0 only when everything that it says turned out true.

    run without Pillion --------------------------------------------> weights, losses          A == it, bit for bit
    uninterrupted run ----------------------------------------------> weights, losses  (A)
    run, SIGKILL of one rank --- torchrun restarts --- load --------> weights, losses  (B)     A == B, bit for bit
                                    last checkpoint, stock DCP, 1 process, 1 and 3 ranks  (C)     C == A, bit for bit

With --s3 the checkpoints are in a bucket of S3, on a server of the demo's own, and nowhere else.

Must never: compare with a tolerance, or wait without a bound.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import verify

if TYPE_CHECKING:
    # The demo without --s3 needs nothing of it.
    from bucket import Bucket

HERE = Path(__file__).parent
NUM_RANKS = 2
KILLED_RANK = 1
RUN_LIMIT_S = 300.0
END_LIMIT_S = 60.0
OTHER_WORLDS = (1, 3)
TAIL_LINES = 40


class DemoFailed(Exception):
    """
    Something is not as the story tells it.
    """


class CannotRun(Exception):
    """
    The story cannot be told on this machine.
    """


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """
    What one run of train.py left.
    """

    folder: Path
    losses: dict[int, float]
    """By step. A step that was trained twice has had the same loss twice, or the run would have been refused."""
    num_repeated: int
    events: list[dict[str, Any]]

    @property
    def final(self) -> Path:
        return self.folder / "final.pt"

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line["event"] == event]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, kill a rank, resume, compare bit for bit.")
    parser.add_argument("--parallel", choices=("fsdp", "ddp", "both"), default="both")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--snapshot-every", type=int, default=5)
    parser.add_argument("--kill-at-step", type=int, default=38)
    parser.add_argument("--keep", type=Path, help="leave everything in this folder, which must not exist yet")
    parser.add_argument("--s3", action="store_true", help="keep the checkpoints in a bucket; needs Go, the first time")
    args = parser.parse_args()
    if args.steps % args.save_every or args.kill_at_step <= args.save_every or args.kill_at_step >= args.steps:
        parser.error("--steps must be a multiple of --save-every, and the kill has to come between the two")

    if args.keep is not None:
        args.keep.mkdir(parents=True)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="pillion-demo-"))
    kept = args.keep is not None
    try:
        with contextlib.ExitStack() as stack:
            bucket = in_bucket(stack, folder / "s3") if args.s3 else None
            for parallel in ("fsdp", "ddp") if args.parallel == "both" else (args.parallel,):
                tell_one(parallel, folder / parallel, args, bucket)
    except CannotRun as err:
        print(f"\nThis demo cannot run here: {err}", file=sys.stderr)
        return 1
    except DemoFailed as err:
        # What a rank said first is further up in its log than the end shown here.
        kept = True
        print(f"\nFAILED: {err}\n\nLogs, losses and checkpoints are left in {folder}", file=sys.stderr)
        return 1
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    print("\nEverything is equal, bit for bit.")
    return 0


def in_bucket(stack: contextlib.ExitStack, folder: Path) -> "Bucket":
    """
    A server of S3, until the end of the stack; all that is started from now on reaches it.

    Raises:
      CannotRun: there is none, and none can be built here; with the reason.
    """
    import bucket

    try:
        found = stack.enter_context(bucket.serving(folder))
    except bucket.NoServer as err:
        raise CannotRun(str(err)) from err
    os.environ.update(found.environment)
    return found


def tell_one(parallel: str, folder: Path, args: argparse.Namespace, bucket: "Bucket | None") -> None:
    """
    The whole story under one kind of parallelism.

    Args:
      bucket: where checkpoints go; None: below `folder`.

    Raises:
      DemoFailed: with what is not as it should be.
    """
    print(f"\n{parallel.upper()}, {NUM_RANKS} ranks, {args.steps} steps, on CPUs")

    whole = train(parallel, folder / "uninterrupted", args, bucket)
    trained = whole.of("trained")[0]
    step_ms = 1e3 * trained["elapsed_s"] / trained["steps"]
    line(1, "uninterrupted run", f"{args.steps} steps, {step_ms:.0f} ms each, last loss {whole.losses[args.steps]:.4f}")
    tell_saves(whole)
    compare(train(parallel, folder / "without", args, bucket, without=True), whole)
    line(None, "compared with a run", "without Pillion, from the first step on: equal")

    broken = train(parallel, folder / "killed", args, bucket, kill_at_step=args.kill_at_step)
    line(
        2,
        f"SIGKILL of rank {KILLED_RANK}",
        f"in the middle of step {args.kill_at_step}; torchrun starts all ranks again",
    )
    tell_load(broken, args)

    compare(whole, broken)
    line(3, "both runs compared", f"{len(whole.losses)} losses, all weights, all optimizer state: equal")

    checkpoint = last_checkpoint(broken, args.steps)
    verify_in(checkpoint, broken.final, None)
    line(4, "stock dcp.load", "one process without a process group: equal")
    for num_ranks in OTHER_WORLDS:
        verify_in(checkpoint, broken.final, num_ranks)
        line(4, "stock dcp.load", f"FSDP2 over {num_ranks} rank{'s' if num_ranks > 1 else ''}: equal")
    if bucket is not None:
        tell_bucket(bucket, checkpoint.rpartition("/")[0])


def tell_saves(outcome: Outcome) -> None:
    """
    What saving cost the training loop, and how fast the bytes went to storage.
    """
    failed = outcome.of("failed")
    if failed:
        raise DemoFailed(f"the save of step {failed[0]['step']} failed: {failed[0]['reason']}")
    stalls_ms = sorted(1e3 * save["stall_s"] for save in outcome.of("saved"))
    commits = outcome.of("committed")
    if not stalls_ms or not commits:
        raise DemoFailed("nothing was saved")
    line(
        None,
        f"{len(stalls_ms)} saves",
        f"training stood still for {stalls_ms[len(stalls_ms) // 2]:.1f} ms each (median; worst {stalls_ms[-1]:.1f})",
    )
    megabytes = commits[-1]["bytes"] / 1e6
    rate = sum(commit["bytes"] for commit in commits) / max(sum(commit["persist_s"] for commit in commits), 1e-9) / 1e6
    line(None, f"{len(commits)} commits", f"{megabytes:.1f} MB each, persisted beside the training at {rate:.0f} MB/s")


def tell_load(outcome: Outcome, args: argparse.Namespace) -> None:
    """
    Where the run that was killed went on.

    Raises:
      DemoFailed: it did not, or from an older step than the newest snapshot.
    """
    loads = outcome.of("loaded")
    if len(loads) != 1:
        raise DemoFailed(f"expected one load, after the restart; there were {len(loads)}")
    load = loads[0]
    newest = (args.kill_at_step - 1) // args.snapshot_every * args.snapshot_every
    stored = (args.kill_at_step - 1) // args.save_every * args.save_every
    line(
        None,
        f"resumed from step {load['step']}",
        f"out of the {load['tier']}, {1e3 * load['elapsed_s']:.0f} ms; "
        f"{outcome.num_repeated} steps trained again (from storage it would be step {stored})",
    )
    if load["step"] != newest:
        raise DemoFailed(f"the newest snapshot was of step {newest}")
    if load["tier"] != "arena":
        raise DemoFailed("the snapshot was in the arena")


def tell_bucket(bucket: "Bucket", url: str) -> None:
    """
    What lies in the bucket at the end.
    """
    line(5, "in the bucket", url)
    for name, (number, size) in sorted(bucket.folders(url).items()):
        line(None, f"  {name}", f"{number} object{'s' if number > 1 else ''}, {size / 1e6:.1f} MB")


def compare(whole: Outcome, broken: Outcome) -> None:
    """
    Raises:
      DemoFailed: naming the first differences between the two runs.
    """
    steps = [step for step in whole.losses if whole.losses[step] != broken.losses.get(step)]
    if steps or len(whole.losses) != len(broken.losses):
        raise DemoFailed(f"losses differ, from step {steps[:1]} on; {len(whole.losses)} and {len(broken.losses)} steps")
    one, other = (torch.load(outcome.final, weights_only=True) for outcome in (whole, broken))
    different = list(verify.differences(one, other))
    if different:
        raise DemoFailed(f"final state differs in {len(different)} places: {', '.join(different[:5])}")


def last_checkpoint(outcome: Outcome, step: int) -> str:
    """
    Path or URL of the committed checkpoint of the last step.
    """
    for commit in outcome.of("committed"):
        if commit["step"] == step:
            return str(commit["path"])
    raise DemoFailed(f"step {step} was not committed")


def train(
    parallel: str,
    folder: Path,
    args: argparse.Namespace,
    bucket: "Bucket | None",
    kill_at_step: int | None = None,
    *,
    without: bool = False,
) -> Outcome:
    """
    Runs train.py under torchrun and reads what it left.

    Blocks: up to RUN_LIMIT_S.
    """
    folder.mkdir(parents=True)
    root = str(folder / "checkpoints") if bucket is None else f"{bucket.url}/{parallel}/{folder.name}"
    arguments = [
        *("--parallel", parallel, "--steps", str(args.steps), "--root", root),
        *("--save-every", str(args.save_every), "--snapshot-every", str(args.snapshot_every)),
        *("--losses", str(folder / "losses.jsonl"), "--report", str(folder / "report.jsonl")),
        *("--final", str(folder / "final.pt")),
    ]
    if without:
        arguments += ["--no-checkpoint"]
    if kill_at_step is not None:
        arguments += ["--kill-rank", str(KILLED_RANK), "--kill-at-step", str(kill_at_step)]
    torchrun(
        HERE / "train.py", arguments, NUM_RANKS, folder / "torchrun.log", max_restarts=0 if kill_at_step is None else 1
    )

    losses: dict[int, float] = {}
    num_repeated = 0
    for entry in read_lines(folder / "losses.jsonl"):
        if entry["step"] in losses:
            num_repeated += 1
            if losses[entry["step"]] != entry["loss"]:
                raise DemoFailed(f"step {entry['step']} had another loss when it was trained again after the restart")
        losses[entry["step"]] = entry["loss"]
    return Outcome(folder=folder, losses=losses, num_repeated=num_repeated, events=read_lines(folder / "report.jsonl"))


def verify_in(checkpoint: str, final: Path, num_ranks: int | None) -> None:
    """
    Runs verify.py, under torchrun or (None) as a plain process.
    """
    arguments = ["--checkpoint", checkpoint, "--final", str(final)]
    log = final.parent / f"verify-{num_ranks}.log"
    if num_ranks is None:
        run([sys.executable, str(HERE / "verify.py"), *arguments], log)
    else:
        torchrun(HERE / "verify.py", arguments, num_ranks, log)


def torchrun(script: Path, arguments: Sequence[str], num_ranks: int, log: Path, max_restarts: int = 0) -> None:
    options = ["--standalone", f"--nproc-per-node={num_ranks}", f"--max-restarts={max_restarts}"]
    run([sys.executable, "-m", "torch.distributed.run", *options, str(script), *arguments], log)


def run(command: Sequence[str], log: Path) -> None:
    """
    Blocks: up to RUN_LIMIT_S; then the program is ended.

    Raises:
      DemoFailed: exit status other than 0, or the limit, with the end of the output.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A rank that dies of a signal then says in its log where.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        )
        try:
            status = process.wait(timeout=RUN_LIMIT_S)
        except subprocess.TimeoutExpired as err:
            raise DemoFailed(f"{command} still ran after {RUN_LIMIT_S:.0f} s\n{tail(log)}") from err
        finally:
            end(process)
    if status != 0:
        raise DemoFailed(f"{log.stem}: exit status {status}\n{tail(log)}")


def end(process: "subprocess.Popen[bytes]") -> None:
    """
    Asks a program that still runs to end (torchrun then ends its ranks), and kills it when it does not.

    Blocks: up to END_LIMIT_S.
    """
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="ascii").splitlines()]


def line(number: int | None, what: str, text: str) -> None:
    print(f"  {f'{number}.' if number else '':3}{what:24}{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
