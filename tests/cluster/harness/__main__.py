"""
`python -m cluster.harness up|down|images|prepare`: a cluster for people. `make cluster-up`, `cluster-down` and `cluster-programs` call it.
"""

import argparse
import sys
import time

from cluster.harness import clusters
from cluster.harness.machine import HarnessError


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster.harness", description="A real Kubernetes of two nodes, for tests.")
    parser.add_argument("command", choices=("up", "down", "images", "prepare"))
    parser.add_argument("--cluster", choices=clusters.PROVIDERS, default="auto")
    given = parser.parse_args()
    begun = time.monotonic()
    try:
        cluster = clusters.choose(given.cluster)
        if given.command == "down":
            cluster.down()
        elif given.command == "prepare":
            cluster.prepare()
        elif given.command == "up":
            cluster.up()
            print(f"export KUBECONFIG={cluster.kubeconfig}")
        else:
            cluster.build_and_load()
    except HarnessError as err:
        print(f"cluster.harness: {err}", file=sys.stderr)
        return 1
    print(f"# {given.command} took {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
