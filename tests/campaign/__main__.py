"""
The whole of: `make campaign RUNS=1000`: many runs by their seeds, some at a time, and their figures.

Called from: the Makefile. Exit status 1 when any run is not well; its folder is kept and named.
"""

import argparse
import itertools
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from campaign import plan, training
from campaign.runs import Result, Run, summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; each has the next")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--pods", type=int, choices=(1, 2), help="only runs of so many pods")
    parser.add_argument(
        "--disks",
        action="store_true",
        help="each pod has a disk of its node in front of storage; runs of odd seeds lose it with the pod",
    )
    parser.add_argument("--report", type=Path, help="file for the results, one JSON line a run")
    of = parser.parse_args()
    warm()
    reference = training.reference()
    begun = time.monotonic()
    results: list[Result] = []
    every = (seed for seed in itertools.count(of.seed) if of.pods in (None, plan.draw(seed).pods))
    seeds = list(itertools.islice(every, of.runs))
    # A process for each run: what one leaves behind by a defect does not reach the next.
    with multiprocessing.get_context("fork").Pool(
        of.jobs, initializer=_become, initargs=(reference, of.disks), maxtasksperchild=1
    ) as pool:
        for result in pool.imap_unordered(_one, seeds):
            results.append(result)
            if of.report is not None:
                with of.report.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result.document()) + "\n")
            if result.verdict != "ok":
                print(f"seed {result.seed}: {result.verdict}: {result.detail}", flush=True)
            if len(results) % 50 == 0:
                bad = sum(each.verdict != "ok" for each in results)
                print(f"{len(results)} runs, {bad} not well, {time.monotonic() - begun:.0f} s", flush=True)
    found = summary(results) | {"first_seed": of.seed, "elapsed_s": round(time.monotonic() - begun)}
    print(json.dumps(found, indent=2))
    return 0 if set(found["verdicts"]) <= {"ok"} else 1


def warm() -> None:
    """What torch makes once a process, before anything is forked."""
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.elastic.multiprocessing
    import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend

    torch.set_num_threads(1)
    dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


_REFERENCE: list[tuple[float, dict[str, torch.Tensor]]] = []


_DISKS: list[bool] = []


def _become(reference: list[tuple[float, dict[str, torch.Tensor]]], disks: bool) -> None:
    _REFERENCE[:] = reference
    _DISKS[:] = [disks]
    # Pool workers are daemons, which may have no children by multiprocessing's rule; ours are ended by `Run`.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def _one(seed: int) -> Result:
    drawn = plan.draw(seed)
    folder = Path(tempfile.mkdtemp(prefix=f"pillion-run-{seed}-"))
    try:
        result = Run(drawn, folder, _REFERENCE, disks=_DISKS[0]).run()
    except BaseException:
        result = Result(seed=seed, pods=drawn.pods, strikes=[], inside=drawn.inside.value, verdict="broken")
        result.detail = traceback.format_exc()
    if result.verdict == "ok":
        shutil.rmtree(folder, ignore_errors=True)
    else:
        result.detail = f"{folder}: {result.detail}"
    return result


if __name__ == "__main__":
    sys.exit(main())
