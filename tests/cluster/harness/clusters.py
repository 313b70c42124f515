"""
The whole of: which cluster the tests run on: `built`, `kind` or `existing`.

Called from: the tests' fixtures, `python -m cluster.harness` for people.
Must never: know what the tests do with it.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from cluster.harness.built import Built
from cluster.harness.existing import Existing
from cluster.harness.kind import Kind
from cluster.harness.machine import HarnessError

PROVIDERS: Final = ("auto", "built", "kind", "existing")


class Cluster(Protocol):
    """What the tests need of a cluster."""

    @property
    def name(self) -> str:
        """Of the provider."""

    @property
    def nodes(self) -> Sequence[str]:
        """Names of the nodes that run pods."""

    @property
    def kubeconfig(self) -> Path:
        """An administrator's."""

    @property
    def kubectl(self) -> Path:
        """The program."""

    def is_up(self) -> bool:
        """Whether it is there and answers."""

    def up(self) -> None:
        """Make it. Raises HarnessError, which says why it cannot be had here."""

    def down(self) -> None:
        """Take it down, with all that `up` made."""

    def prepare(self) -> None:
        """Make all that can be made before the cluster is up, and keep it in a cache. Raises HarnessError."""

    def build_and_load(self) -> None:
        """Build the product's images, and bring them to every node."""

    def volume(self, name: str) -> Path:
        """A path that is the same folder on every node, for a shared volume."""

    def small_volume(self, node: str, folder: Path, mib: int) -> AbstractContextManager[None]:
        """Mount a file system of so many MiB over a folder of `volume`, on one node."""

    def kill(self, node: str, container_id: str) -> None:
        """SIGKILL to the first process of a container, as the kernel would send it."""

    def lost(self, node: str) -> AbstractContextManager[None]:
        """A node has lost its link and its power while the block runs; then it boots, and is Ready again at the end."""


def choose(name: str) -> Cluster:
    """
    The cluster of that provider; `auto`: the one of KUBECONFIG where PILLION_TEST_EXISTING=1, kind where Docker runs, else built.

    Raises:
        HarnessError: there is no such provider.
    """
    if name == "auto":
        has_kind = shutil.which("kind") is not None and os.path.exists("/var/run/docker.sock")
        name = "existing" if os.environ.get("PILLION_TEST_EXISTING") == "1" else "kind" if has_kind else "built"
    if name == "built":
        return Built()
    if name == "kind":
        return Kind()
    if name == "existing":
        return Existing()
    raise HarnessError(f"there is no provider {name!r}; allowed: {', '.join(PROVIDERS)}")
