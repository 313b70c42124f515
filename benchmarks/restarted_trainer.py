"""
One life of a trainer, for the benchmark of loads: it saves once and is killed, or loads once and says how long that took beside a copy.

Called from: bench_load, as `python restarted_trainer.py save|load ROOT BYTES`. The last line of `load` is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import floors
import measures
import torch

from pillion.wire import control


def save(root: Path, num_bytes: int) -> None:
    """Commit one step, and die without a word."""
    with measures.checkpointer(root) as checkpointer:
        state_dict = measures.state(num_bytes, 64)
        measures.prepare(checkpointer, state_dict)
        checkpointer.save(state_dict, 1).result(measures.SAVE_TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGKILL)


def load(root: Path, num_bytes: int) -> None:
    """Load the newest step, and print what it took."""
    source, target = floors.shared_memory(num_bytes), measures.private_memory(num_bytes)
    floor_s = min(measures.copy_floor_s(target, source) for _ in range(3))
    pieces = [
        view[start : start + num_bytes // 64]
        for view in (target, source)
        for start in range(0, num_bytes, num_bytes // 64)
    ]
    pieces_s = min(floors.memcpy_pieces_s(pieces[:64], pieces[64:], torch.get_num_threads()) for _ in range(3))
    with measures.checkpointer(root) as checkpointer:
        checkpointer.load(measures.state(num_bytes, 64))
        report = checkpointer.last_load
        session = checkpointer._session
        status = session.request(control.ReadStatus(), measures.SAVE_TIMEOUT_S)
        if report is None or not isinstance(status, control.Status):
            raise RuntimeError("no load, or no status")
        found = {"load_s": report.elapsed_s, "tier": report.tier, "floor_s": floor_s, "pieces_s": pieces_s}
        found["verified"] = status.metrics["snapshots_verified"]
    print(json.dumps(found))


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
