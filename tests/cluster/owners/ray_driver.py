"""
The driver of a RayJob: two ranks of the tests' trainer, an actor each, as Ray Train places its workers.

Runs in a pod, from a ConfigMap, with the pod's own Ray. The trainers are processes of their own, with what their actor's container
has in its environment; what they print comes back to the driver, which prints it. Exit status 1: a rank has failed.
"""

import os
import socket
import subprocess
import sys

import ray

RANKS = 2


class Rank:
    """One rank, on whatever node has a core for it."""

    def address(self) -> tuple[str, int]:
        """Where the ranks can meet: this node, and a port that is free."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def train(self, rank: int, address: str, port: int) -> tuple[int, str]:
        """Train to the end: the exit status, and what the trainer has printed."""
        world = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-u", "/trainer/trainer.py"],
            env=os.environ | world,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout


def main() -> None:
    ray.init()
    ranks = [ray.remote(num_cpus=1, max_restarts=0)(Rank).remote() for _ in range(RANKS)]
    address, port = ray.get(ranks[0].address.remote())
    ends = ray.get([each.train.remote(number, address, port) for number, each in enumerate(ranks)])
    for status, said in ends:
        print(said, f"status {status}", sep="\n", flush=True)
    sys.exit(1 if any(status for status, _ in ends) else 0)


if __name__ == "__main__":
    main()
