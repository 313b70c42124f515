"""
DLRover's flash checkpoint, as its documentation has one use it: seconds of stall, until told and until durable, as JSON.

    torchrun --standalone --nproc-per-node=1 dlrover_saves.py DIRECTORY NUM_BYTES NUM_SAVES

Called from: bench_peers.py, in DLRover's own environment; imports nothing of Pillion. Told is when its tracker file names the
step (`wait_latest_checkpoint` needs that file to exist). It does not sync what it wrote, so the bytes are on the disk only
after an fsync, which is made here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback

import torch
import torch.distributed as dist

TIMEOUT_S = 120.0


def main() -> None:
    directory, num_bytes, num_saves = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo")
    ddp = importlib.import_module("dlrover.trainer.torch.flash_checkpoint.ddp")
    kinds = importlib.import_module("dlrover.trainer.torch.flash_checkpoint.checkpointer")
    numel = num_bytes // 64 // 4
    state_dict = {f"layer.{i}.weight": torch.randn(numel) for i in range(64)}
    checkpointer = ddp.DdpCheckpointer(directory)
    tracker = os.path.join(directory, "dlrover_latest.txt")
    found: list[tuple[float, float, float]] = []
    for step in range(1, num_saves + 1):
        path = os.path.join(directory, str(step), "rank_0.pt")
        begin_s = time.perf_counter()
        checkpointer.save_checkpoint(step, {"model": state_dict}, path, storage_type=kinds.StorageType.DISK)
        stall_s = time.perf_counter() - begin_s
        while _latest(tracker) != step:
            if time.perf_counter() - begin_s > TIMEOUT_S:
                raise TimeoutError(f"step {step} was not durable in {TIMEOUT_S:.0f} s")
            time.sleep(0.005)
        told_s = time.perf_counter() - begin_s
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        found.append((stall_s, told_s, time.perf_counter() - begin_s))
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    dist.destroy_process_group()
    print(json.dumps(found), flush=True)


def _end(before: set[str], status: int) -> None:
    """Its saver is a process that outlives the trainer (that is its point), and so does its memory: end both."""
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            for pid in file.read().split():
                os.kill(int(pid), signal.SIGKILL)
    # Its sockets: a folder for each run, in a fixed place.
    sockets = os.path.join(tempfile.gettempdir(), "ckpt_sock")
    shutil.rmtree(os.path.join(sockets, os.environ["TORCHELASTIC_RUN_ID"]), ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rmdir(sockets)
    for name in set(os.listdir("/dev/shm")) - before:
        if "_ckpt_shm_" in name:
            os.unlink(os.path.join("/dev/shm", name))
    os._exit(status)


def _latest(tracker: str) -> int:
    try:
        with open(tracker, encoding="ascii") as file:
            return int(file.read().strip() or -1)
    except (OSError, ValueError):
        return -1


if __name__ == "__main__":
    _before = set(os.listdir("/dev/shm"))
    try:
        main()
    except BaseException:
        traceback.print_exc()
        _end(_before, 1)
    _end(_before, 0)
