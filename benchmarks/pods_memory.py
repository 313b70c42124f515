"""
A trainer of a job of two pods, each with a sidecar of its own, which says how much memory that sidecar takes.

Called from: bench_memory, under torchrun with two processes: pods_memory.py ROOT STORE SAVES BYTES. Each rank prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys

import bench_memory
import measures
import torch.distributed as dist

# Each rank is a pod of its own. Set before the Checkpointer reads it.
os.environ["PILLION_POD"] = f"pod-{os.environ['RANK']}"

import pillion
from pillion.wire import control


def main(root: str, store: str, num_saves: int, num_bytes: int) -> None:
    """Save so often, and print the MiB of this pod's sidecar and executor after each save. Blocks: for the saves."""
    dist.init_process_group("gloo")
    # As two pods have it: other names on each rank.
    state_dict = measures.state(num_bytes, 64)
    state_dict[f"of-rank-{dist.get_rank()}"] = state_dict.pop("model")
    with pillion.Checkpointer(root, policy={"store": store, "retention": {"keepLast": 1}}) as checkpointer:
        checkpointer.load(state_dict)
        sizes = []
        for step in range(1, num_saves + 1):
            checkpointer.save(state_dict, step).result(measures.SAVE_TIMEOUT_S)
            status = checkpointer._session.request(control.ReadStatus(), measures.SAVE_TIMEOUT_S)
            if status.executor_pid is None:
                raise RuntimeError("the sidecar has no executor")
            sizes.append([bench_memory.private_mib(pid) for pid in (status.pid, status.executor_pid)])
        print(json.dumps({"rank": dist.get_rank(), "sizes": sizes}), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
