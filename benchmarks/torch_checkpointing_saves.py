"""
torch_checkpointing's asynchronous saves: seconds of stall, until its future and until durable, as JSON.

    python torch_checkpointing_saves.py DIRECTORY NUM_BYTES NUM_SAVES

Called from: bench_peers.py, in an environment of its own; imports nothing of Pillion. The stall is the call and the wait for its lock, which a training loop
takes around its optimizer step; no step runs here, as none runs beside the others' saves. The future does not wait for the disk, so the files are
synced here. Its direct I/O, which is the default, ended with EINVAL where this was written (0.1.1, ext4), so it is off.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

TIMEOUT_S = 120.0


def main() -> None:
    directory, num_bytes, num_saves = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    library = importlib.import_module("torch_checkpointing")
    files = importlib.import_module("torch_checkpointing.storage.filesystem")
    manager = library.CheckpointManager.Config(
        storage_config=files.LocalFileSystemStorageConfig(use_direct_io=False)
    ).build()
    numel = num_bytes // 64 // 4
    state_dict = {f"layer.{i}.weight": torch.randn(numel) for i in range(64)}
    # As its page on performance advises; Pillion's arena is prepared too.
    manager.prewarm_staging({"model": state_dict})
    rows: list[tuple[float, float, float]] = []
    for step in range(1, num_saves + 1):
        path = directory / f"step-{step}"
        begin_s = time.perf_counter()
        written = manager.save(str(path), {"model": state_dict})
        with manager.lock():
            stall_s = time.perf_counter() - begin_s
        written.result(TIMEOUT_S)
        done_s = time.perf_counter() - begin_s
        for each in path.rglob("*"):
            if each.is_file():
                with each.open("rb") as file:
                    os.fsync(file.fileno())
        rows.append((stall_s, done_s, time.perf_counter() - begin_s))
        shutil.rmtree(path)
    manager.close()
    print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
