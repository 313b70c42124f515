"""
The whole of: the provider `existing`: a cluster that somebody else made, by its KUBECONFIG.

Called from: `clusters`. The images have to be where its nodes find them; PILLION_TEST_VOLUMES is a folder that its nodes share.
Must never: make or take down anything of the cluster itself.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from cluster.harness.machine import HarnessError, run


class Existing:
    """A cluster of this provider."""

    @property
    def name(self) -> str:
        return "existing"

    @property
    def nodes(self) -> Sequence[str]:
        items = json.loads(run(self.kubectl, f"--kubeconfig={self.kubeconfig}", "get", "nodes", "-o", "json"))["items"]
        return [item["metadata"]["name"] for item in items]

    @property
    def kubeconfig(self) -> Path:
        path = os.environ.get("KUBECONFIG", "")
        if not path:
            raise HarnessError("KUBECONFIG is not set: it names the cluster to test on")
        return Path(path)

    @property
    def kubectl(self) -> Path:
        found = shutil.which("kubectl")
        if found is None:
            raise HarnessError("kubectl is not on this machine")
        return Path(found)

    def is_up(self) -> bool:
        return bool(self.nodes)

    def up(self) -> None:
        if not self.is_up():
            raise HarnessError(f"the cluster of {self.kubeconfig} has no node")

    def down(self) -> None:
        """Nothing: it is not ours."""

    def prepare(self) -> None:
        """Nothing is made for a cluster that is there."""

    def build_and_load(self) -> None:
        """Nothing: whoever names an existing cluster has brought the images to it."""

    def volume(self, name: str) -> Path:
        folder = os.environ.get("PILLION_TEST_VOLUMES", "")
        if not folder:
            raise HarnessError(
                "PILLION_TEST_VOLUMES is not set: a folder that all nodes of the cluster share is needed"
            )
        return Path(folder) / name

    def small_volume(self, node: str, folder: Path, mib: int) -> AbstractContextManager[None]:
        raise HarnessError(f"nothing is mounted on {node}: it is not ours")

    def kill(self, node: str, container_id: str) -> None:
        raise HarnessError(f"{container_id} is not killed: {node} is not ours")

    def lost(self, node: str) -> AbstractContextManager[None]:
        raise HarnessError(f"{node} is not switched off: it is not ours")
