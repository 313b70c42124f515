"""
Pods that only agree: threads that speak the exchange of the executor, each with its own TCPStore client, and write nothing.

    python simulated_pods.py PORT LAYOUT_DIGEST NUM_SAVES RANK...

Called from: bench_commit.py, which runs the coordinator. A pod ends with the last save; every wait has a bound.
"""

from __future__ import annotations

import sys
import threading

from pillion_sidecar.executor.exchange import tcpstore

TIMEOUT_S = 120.0
GENERATION = "1"
"""As the coordinator's, bench_commit.py."""


def pod(port: int, layout_digest: str, num_saves: int, rank: int) -> None:
    keep, view = tcpstore.connect("127.0.0.1", port, "bench/")
    between = tcpstore.StoreExchange(view, keep, [(0,)], rank)
    for step in range(1, num_saves + 1):
        phase = f"save/0/{step}"
        between.post(f"{phase}/plan", {"failures": {}, "ranks": {str(rank): [layout_digest, []]}})
        decision = between.receive(f"{phase}/plan", TIMEOUT_S)
        if step == 1:
            between.receive(f"plan/{decision['plan_id']}", TIMEOUT_S)
        name = f"part-{rank:05d}.1.json"
        result = {
            "failures": {},
            "generation": GENERATION,
            "part": name,
            "digest": "0" * 32,
            "length": 1,
            "size_bytes": 1,
        }
        between.post(f"{phase}/0/result", result)
        between.receive(f"{phase}/0/outcome", TIMEOUT_S)


def main() -> None:
    port, layout_digest, num_saves, *ranks = sys.argv[1:]
    threads = [
        threading.Thread(target=pod, args=(int(port), layout_digest, int(num_saves), int(rank))) for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
