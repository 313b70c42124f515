"""
The whole of: the provider `kind`: Kubernetes in Docker, where its node image can be pulled.

Called from: `clusters`, and so by the workflow for hosted CI. Needs kind, kubectl and Docker; images are built by Docker.
Must never: touch a cluster of another name.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cluster.harness import progress
from cluster.harness.images import OPERATOR_IMAGE, SIDECAR_IMAGE
from cluster.harness.limits import ROOT, Limit, state_folder
from cluster.harness.machine import HarnessError, run

CLUSTER: Final = "pillion-test"
VOLUMES: Final = "/srv/pillion-test"
BASE: Final = "python:3.13-slim"


class Kind:
    """A cluster of this provider."""

    @property
    def name(self) -> str:
        return "kind"

    @property
    def nodes(self) -> Sequence[str]:
        return [f"{CLUSTER}-worker", f"{CLUSTER}-worker2"]

    @property
    def kubeconfig(self) -> Path:
        return state_folder() / "kind.kubeconfig"

    @property
    def kubectl(self) -> Path:
        found = shutil.which("kubectl")
        if found is None:
            raise HarnessError("kubectl is not on this machine")
        return Path(found)

    def is_up(self) -> bool:
        return self.kubeconfig.exists() and CLUSTER in run("kind", "get", "clusters").split()

    def up(self) -> None:
        """Two workers that share a folder of this machine. Blocks: up to Limit.CONTROL_PLANE and Limit.NODE."""
        self.down()
        self.kubeconfig.parent.mkdir(parents=True, exist_ok=True)
        mount = {"hostPath": VOLUMES, "containerPath": VOLUMES}
        config = {
            "kind": "Cluster",
            "apiVersion": "kind.x-k8s.io/v1alpha4",
            "nodes": [{"role": "control-plane"}, *({"role": "worker", "extraMounts": [mount]} for _ in range(2))],
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(config, file)
            file.flush()
            with progress.step("making the cluster with kind"):
                run(
                    *("kind", "create", "cluster", "--name", CLUSTER, "--config", file.name),
                    *("--kubeconfig", self.kubeconfig, "--wait", f"{Limit.NODE.s:.0f}s"),
                    limit=Limit.IMAGE,
                )

    def down(self) -> None:
        if CLUSTER in run("kind", "get", "clusters").split():
            run("kind", "delete", "cluster", "--name", CLUSTER, limit=Limit.NODE)

    def prepare(self) -> None:
        """Nothing: Docker has its own cache, which `build_and_load` fills."""

    def build_and_load(self) -> None:
        for number, (tag, target) in enumerate(((OPERATOR_IMAGE, "operator"), (SIDECAR_IMAGE, "sidecar")), start=1):
            with progress.step(f"building the image of the {target}, and bringing it to the nodes ({number} of 2)"):
                run(
                    *("docker", "build", "--target", target, "--build-arg", f"BASE={BASE}", "--tag", tag, ROOT),
                    limit=Limit.IMAGE,
                )
                run("kind", "load", "docker-image", tag, "--name", CLUSTER, limit=Limit.IMAGE)

    @contextlib.contextmanager
    def small_volume(self, node: str, folder: Path, mib: int) -> Iterator[None]:
        run("docker", "exec", node, "mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0777", "small", folder)
        try:
            yield
        finally:
            run("docker", "exec", node, "umount", folder)

    def kill(self, node: str, container_id: str) -> None:
        identity = container_id.removeprefix("containerd://")
        kill = ("ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", identity)
        run("docker", "exec", node, *kill)

    @contextlib.contextmanager
    def lost(self, node: str) -> Iterator[None]:
        run("docker", "kill", node)
        try:
            yield
        finally:
            run("docker", "start", node)
            ready = ("wait", "--for=condition=Ready", f"node/{node}", f"--timeout={Limit.NODE.s:.0f}s")
            run(self.kubectl, f"--kubeconfig={self.kubeconfig}", *ready, limit=Limit.NODE)

    def volume(self, name: str) -> Path:
        path = Path(VOLUMES) / name
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)
        return path
