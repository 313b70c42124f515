"""
Pods that only agree: threads that speak the exchange of the executor, each with its own TCPStore client. They write a file of one byte for each save, which
the coordinator looks for.

    python simulated_pods.py PORT ROOT LAYOUT_DIGEST NUM_SAVES RANK...

Called from: bench_commit.py, which runs the coordinator. A pod ends with the last save; every wait has a bound.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from pillion.wire import names
from pillion_sidecar.executor.exchange import tcpstore, torch_store
from pillion_sidecar.storage import generation

TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 240.0
"""Timeout of a connection. Hundreds connect at once."""
GENERATION = generation.text(1, generation.save_number(0, rescued=False))
"""As the coordinator's, bench_commit.py: the first session, no load, no rescue."""


def pod(port: int, root: Path, layout_digest: str, num_saves: int, rank: int) -> None:
    # torch's client takes less of the processor than ours, and these pods share one with the coordinator, which has ours.
    view = torch_store.connect("127.0.0.1", port, "bench/", timeout_s=CONNECT_TIMEOUT_S)
    between = tcpstore.StoreExchange(view, None, [(0,)], rank)
    for step in range(1, num_saves + 1):
        phase = f"save/0/{step}"
        between.post(f"{phase}/plan", {"failures": {}, "ranks": {str(rank): [layout_digest, []]}})
        decision = between.receive(f"{phase}/plan", TIMEOUT_S)
        if step == 1:
            between.receive(f"plan/{decision['plan_id']}", TIMEOUT_S)
        name = names.part_file(rank, GENERATION)
        folder = root / names.step_directory(step)
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
        result = {
            "failures": {},
            "generation": GENERATION,
            "part": name,
            "files": {},
            "digest": "0" * 32,
            "length": 1,
            "size_bytes": 1,
        }
        between.post(f"{phase}/0/result", result)
        between.receive(f"{phase}/0/outcome", TIMEOUT_S)


def main() -> None:
    port, root, layout_digest, num_saves, *ranks = sys.argv[1:]
    shared = (int(port), Path(root), layout_digest, int(num_saves))
    threads = [threading.Thread(target=pod, args=(*shared, int(rank))) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
