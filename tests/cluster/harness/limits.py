"""
The whole of: how long the harness waits for the parts of a cluster, and where it keeps them.

Called from: every module of the harness.
Must never: be by-passed with a bare sleep. The tests' own waits are in `support.deadlines`.
"""

import enum
import os
from pathlib import Path
from typing import final

ROOT = Path(__file__).parents[3]
"""Of the repository."""
CACHE_VARIABLE = "PILLION_CLUSTER_CACHE"
STATE_VARIABLE = "PILLION_CLUSTER_STATE"


def cache_folder() -> Path:
    """Binaries and base images, kept from run to run."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "pillion" / "cluster")


def state_folder() -> Path:
    """Of the one cluster that is up: sockets, logs, disks of its nodes. Short, as socket paths end at 107 bytes."""
    return Path(os.environ.get(STATE_VARIABLE) or "/var/lib/pillion-cluster")


@final
class Limit(enum.Enum):
    """One row for each kind of wait: seconds on two cores, and why that many."""

    BUILD = (
        1800.0,
        "one binary, from empty caches, on a machine that others use too; the slowest takes 270 s on two quiet cores; the next try goes on where this one was",
    )
    PACKAGES = (900.0, "Debian packages downloaded and installed")
    NODE_PACKAGES = (900.0, "a program for node and what it needs, downloaded and installed")
    PYTHON_PACKAGES = (300.0, "wheels of some 30 MB downloaded and unpacked")
    BOOTSTRAP = (900.0, "a Debian root file system with torch in it")
    IMAGE = (1200.0, "an image built, exported or imported")
    MACHINE = (20.0, "namespaces made, process 1 answering")
    INTERRUPTED = (10.0, "a command that was ended cleans up after itself")
    COMMAND = (60.0, "a command that talks to the kernel or to a local daemon")
    CONTROL_PLANE = (90.0, "etcd, the API server and the controllers answer")
    NODE = (120.0, "a kubelet is registered and its node Ready")
    ADDONS = (120.0, "cluster DNS answers")
    STOP = (60.0, "a machine is gone with all that was in it")

    def __init__(self, s: float, reason: str) -> None:
        self.s = s
        self.reason = reason
